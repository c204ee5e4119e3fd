"""Where tensors live: the mesh of ranks, and how a model of models/ is laid out over it.

Siblings never import each other; apply.py alone sees all and is the one ordered recipe. A layout changes speed and
memory, never the run: it is right when its losses, gradients and weights equal those of one process. May import models
and configs; knows nothing of steps, files or the environment.
"""
