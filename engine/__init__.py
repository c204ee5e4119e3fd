"""The run: data, loss, step, optimizer, checkpoints, metrics, and train.py, which puts them in order.

Reading order: train.py (build a run, then loop), step.py (the algorithm), loss.py, data/, checkpoint/. May import
parallel, models and configs; reads no environment and prints nothing: the launcher passes in who the process is and
the console to write to.
"""
