"""What a [fault.inject] section must satisfy: settings that have an effect under its kind, and places that exist.

Rules as those of check.py, which calls them. What can never strike is refused: a rehearsal that injects nothing would
prove nothing and look like a success.
"""

import difflib
from collections.abc import Iterator
from typing import get_args

from configs.errors import problem
from configs.faults import LEADER_STAGES, InjectKind
from configs.fields import default_value, listed, plain
from configs.load import toml_value
from configs.schema import Config

KINDS: tuple[str, ...] = tuple(kind for kind in get_args(InjectKind) if kind not in ("none", "random"))
"""Every fault that can be made to happen."""

_SINGLE = KINDS
_LASTING = ("nan_loss", "nan_grad", "spike", "straggle", "disk_full", "read_only_disk", "random")
EFFECTS: dict[str, tuple[str, ...]] = {
    "rank": _SINGLE,
    "step": _SINGLE,
    "stage": ("kill_in_save",),
    "seconds": ("straggle", "slow_disk", "random"),
    "steps": _LASTING,
    "repeat": _SINGLE,
    "seed": (*_SINGLE, "random"),
    "count": ("random",),
    "kinds": ("random",),
}
"""The kinds under which a setting does anything."""


def inject_problems(config: Config) -> Iterator[str]:
    """Say what is wrong with the section on any number of ranks."""
    inject, steps = config.fault.inject, config.run.steps
    for name, kinds in EFFECTS.items():
        value = getattr(inject, name)
        if inject.kind not in kinds and value != default_value(inject, name):
            expected = f"has no effect under fault.inject.kind = {inject.kind!r}"
            yield problem(f"fault.inject.{name} = {toml_value(plain(value))}", "", expected, do="Remove it.")
    for kind in inject.kinds:
        if kind not in KINDS:
            near = difflib.get_close_matches(kind, KINDS, n=1)
            do = f"Did you mean {near[0]!r}?" if near else f"Use some of {listed(KINDS, 'and')}."
            yield problem("fault.inject.kinds", kind, "no such fault", do=do)
    if inject.kind == "random" and inject.count == 0:
        yield problem("fault.inject.count", 0, "must be at least 1 under fault.inject.kind = 'random'")
    if inject.step > steps:
        yield problem("fault.inject.step", inject.step, f"must be at most run.steps = {steps}")
    if inject.kind == "kill_in_save" and inject.stage in LEADER_STAGES and inject.rank != 0:
        why = f"only rank 0 comes to stage {inject.stage!r} of a save"
        yield problem("fault.inject.rank", inject.rank, "must be 0", why)


def inject_place(config: Config, world_size: int) -> list[str]:
    """Say what is wrong with the section on so many ranks."""
    inject = config.fault.inject
    if inject.rank < world_size:
        return []
    expected = f"must be less than the {world_size} rank{'s' * (world_size > 1)} of the run"
    return [problem("fault.inject.rank", inject.rank, expected, do="Use -1 to have it drawn.")]
