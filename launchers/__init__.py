"""Launchers: how processes start. Nothing here knows what a run computes.

`train.py` is the entry point of every rank, under torchrun, under `srun` or alone. `slurm.py` puts a run into SLURM's
queue through submitit; its jobs end in the same `train.py`. `env.py` is the one place of the project that reads the
environment: it turns what torchrun or SLURM left there into a `Launch` or says what is missing.

A launcher may import every room below and is imported by none. Nothing else in the project reads `os.environ`.
"""
