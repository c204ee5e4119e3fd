"""Which faults a run is to meet: drawn once, from the config, the number of steps and the number of ranks.

A pure function, so that every rank, every later start and whoever watches a rehearsal know the same list.
"""

import random
from dataclasses import dataclass
from typing import get_args

from configs.faults import LEADER_STAGES, RANDOM_KINDS, InjectConfig, SaveStage


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One fault that is to happen."""

    number: int
    """Its place in the list."""
    kind: str
    rank: int
    step: int
    stage: str
    """Where in a save kill_in_save strikes."""
    seed: int
    """Draws the moment, the file, the byte."""


def plan_faults(config: InjectConfig, steps: int, world_size: int) -> list[Planned]:
    """List the faults of a run of so many steps on so many ranks, in the order of their steps."""
    if config.kind == "none":
        return []
    draw = random.Random(config.seed)
    # None is drawn in the last step: what takes until its end to strike would find the run done.
    last = max(1, steps - 1)
    if config.kind != "random":
        rank = config.rank if config.rank >= 0 else draw.randrange(world_size)
        step, seed = config.step or draw.randint(1, last), draw.getrandbits(32)
        return [Planned(number=0, kind=config.kind, rank=rank, step=step, stage=config.stage, seed=seed)]
    drawn: list[tuple[int, str, int, str, int]] = []
    # A run whose only rank is stopped is taken to be suspended.
    kinds = config.kinds or tuple(kind for kind in RANDOM_KINDS if world_size > 1 or kind != "freeze")
    for _ in range(config.count):
        kind = draw.choice(kinds)
        rank, step = draw.randrange(world_size), draw.randint(1, last)
        stage, seed = draw.choice(get_args(SaveStage)), draw.getrandbits(32)
        drawn.append((step, kind, 0 if kind == "kill_in_save" and stage in LEADER_STAGES else rank, stage, seed))
    return [
        Planned(number=number, kind=kind, rank=rank, step=step, stage=stage, seed=seed)
        for number, (step, kind, rank, stage, seed) in enumerate(sorted(drawn))
    ]
