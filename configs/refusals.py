"""Combinations of features that are refused, in one table: what, why, and what to do instead.

docs/layouts.md holds the same table and a test compares the two; another test walks the rows and sees each `example`
refused. A row is here because the combination can't be made right, or not yet: never silently wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass

from configs.errors import problem
from configs.layout import V_SCHEDULES, ZERO_BUBBLE_SCHEDULES
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
        what="model.tie_embeddings under a schedule that turns back (ZBVZeroBubble, DualPipeV)",
        when=lambda config: (
            config.model.tie_embeddings
            and config.parallel.pp > 1
            and not config.parallel.schedule_csv
            and config.parallel.schedule in V_SCHEDULES
        ),
        why="one rank would hold the weight twice under one name, on its first and its last stage",
        do="Use Interleaved1F1B or InterleavedZeroBubble.",
        example="--model.tie_embeddings true --model.num_layers 4 --parallel.pp 2 --parallel.schedule ZBVZeroBubble",
    ),
    Refusal(
        what="recompute.mode selective under a zero-bubble schedule without compile.blocks",
        when=lambda config: (
            config.recompute.mode == "selective"
            and not config.compile.blocks
            and config.parallel.pp > 1
            and (bool(config.parallel.schedule_csv) or config.parallel.schedule in ZERO_BUBBLE_SCHEDULES)
        ),
        why="the two halves of a backward pass would each ask for what is kept, and it is given once",
        do="Set compile.blocks = true, or recompute.mode full.",
        example="--recompute.mode selective --model.num_layers 4 --parallel.pp 2 --parallel.schedule DualPipeV",
    ),
    Refusal(
        what="model.attention varlen or flash with data.document_mask and compile.blocks",
        when=lambda config: (
            config.model.attention in ("varlen", "flash") and config.data.document_mask and config.compile.blocks
        ),
        why="how many documents there are is data, which one static graph can't hold",
        do="Use model.attention flex.",
        example="--model.attention varlen --data.document_mask true --compile.blocks true",
    ),
    Refusal(
        what="precision.float8 with parallel.tp",
        when=lambda config: config.precision.float8 != "none" and config.parallel.tp > 1,
        why="torchao's float8 layers multiply whole matrices; tensor parallelism here computes with parts of them",
        do="Use parallel.dp_shard in place of tp, or leave float8 out.",
        example="--precision.float8 tensorwise --parallel.tp 2",
    ),
    Refusal(
        what="precision.float8 with an adapter.kind",
        when=lambda config: config.precision.float8 != "none" and config.adapter.kind != "none",
        why="torchao's float8 layers take the place of the projections that adapters sit on",
        do="Use adapter.quantization for a smaller base, or leave float8 out.",
        example="--precision.float8 tensorwise --adapter.kind lora",
    ),
    Refusal(
        what="parallel.cpu_offload with adapter.base replicated",
        when=lambda config: config.parallel.cpu_offload and config.adapter.base == "replicated",
        why="a replicated base stays on the device, which offloading is to relieve of it",
        do="Use adapter.base sharded.",
        example="--parallel.cpu_offload true --adapter.kind lora --adapter.base replicated",
    ),
    Refusal(
        what="optim.kind adamw_8bit",
        when=lambda config: config.optim.kind == "adamw_8bit",
        why="torchao cuts 8-bit state into blocks along each rank's own shard: the run would depend on the layout, no "
        "other could resume it, and the device can't skip its steps",
        do="Use adamw, or lion for half of its state.",
        example="--optim.kind adamw_8bit",
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
