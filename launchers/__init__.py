"""Launchers: how processes start. Nothing here knows what a run computes.

`train.py` is the entry point of every rank, under torchrun, under `srun` or alone. `slurm.py` puts a run into SLURM's
queue through submitit, with the variables of `exports.py`; in the job `slurm_job.py` has the nodes meet (`meeting.py`),
starts the same `train.py`, and queues the job again where that leads on (`requeue.py`). `env.py` turns what torchrun or
SLURM left in the environment into a `Launch` or says what is missing.

A launcher may import every room below and is imported by none. Nothing else in the project reads `os.environ`.
"""
