"""Combinations of features that are refused, in one table: what, why, and what to do instead.

docs/layouts.md holds the same table and a test compares the two; another test walks the rows and sees each `example`
refused. A row is here because the combination can't be made right, or not yet: never silently wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass

from configs.errors import problem
from configs.schema import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """One combination that doesn't run."""

    what: str
    """The settings, as a user writes them."""
    when: Callable[[Config], bool]
    why: str
    do: str
    example: str
    """Overrides of a sound config that meet it, and nothing else that is refused."""


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        what="parallel.async_tp without parallel.tp and compile.blocks",
        when=lambda config: config.parallel.async_tp and not (config.parallel.tp > 1 and config.compile.blocks),
        why="the compiler finds the pairs of collective and matrix product in a block's graph",
        do="Set compile.blocks = true and parallel.tp, or leave async_tp out.",
        example="--parallel.async_tp true --parallel.tp 2",
    ),
    Refusal(
        what="recompute.every_blocks without recompute.mode",
        when=lambda config: config.recompute.mode == "none" and config.recompute.every_blocks > 1,
        why="nothing is recomputed",
        do="Set recompute.mode to full or selective.",
        example="--recompute.every_blocks 2",
    ),
)


def refused(config: Config) -> list[str]:
    """List the rows of the table that a config meets."""
    return [problem(row.what, "", "is refused", row.why, row.do) for row in REFUSALS if row.when(config)]
