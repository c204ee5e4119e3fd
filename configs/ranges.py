"""The numbers that each field may hold, as one table.

A field alone is judged here; fields that must agree are in check.py. Every number of the schema has a line (a test
walks the schema), so that a new field can't be left without a range.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from configs.errors import problem
from configs.fields import INDEX, as_list
from configs.schema import Config


@dataclasses.dataclass(frozen=True, slots=True)
class Range:
    """The numbers that a field may hold: from `least` or above `above`, up to `most` or below `below`."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        """Say whether a value is within the range."""
        low = (self.least is None or value >= self.least) and (self.above is None or value > self.above)
        return low and (self.most is None or value <= self.most) and (self.below is None or value < self.below)

    def __str__(self) -> str:
        bounds = {"at least": self.least, "more than": self.above, "at most": self.most, "less than": self.below}
        return "must be " + " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)


_POSITIVE, _FROM_0, _FROM_1 = Range(above=0), Range(least=0), Range(least=1)
RANGES = {
    "run.steps": _FROM_1,
    "run.seed": Range(least=0, below=2**63),
    "run.threads": _FROM_0,
    "model.vocab_size": Range(least=2),
    "model.dim": _FROM_1,
    "model.num_layers": _FROM_1,
    "model.num_heads": _FROM_1,
    "model.num_kv_heads": _FROM_0,
    "model.head_dim": _FROM_0,
    "model.ffn_dim": _FROM_1,
    "model.max_seq_len": _FROM_1,
    "model.rope_theta": _POSITIVE,
    "model.rope_scaling.factor": _FROM_1,
    "model.rope_scaling.low_freq_factor": _POSITIVE,
    "model.rope_scaling.high_freq_factor": _POSITIVE,
    "model.rope_scaling.original_max_seq_len": _FROM_1,
    "model.norm_eps": _POSITIVE,
    "model.init_std": _POSITIVE,
    "data.stores.N.weight": _POSITIVE,
    "data.stores.N.train_tokenizer": _FROM_0,
    "data.stores.N.max_bytes": _FROM_0,
    "data.seq_len": _FROM_1,
    "data.global_batch_size": _FROM_1,
    "data.micro_batch_size": _FROM_0,
    "adapter.rank": _FROM_1,
    "adapter.alpha": _POSITIVE,
    "adapter.dropout": Range(least=0, below=1),
    "adapter.overrides.N.rank": _FROM_1,
    "adapter.overrides.N.alpha": _FROM_0,
    "adapter.lora_plus_ratio": _POSITIVE,
    "adapter.bottleneck_dim": _FROM_1,
    "adapter.num_virtual_tokens": _FROM_1,
    "adapter.last_layers": _FROM_0,
    "adapter.members.N.rank": _FROM_0,
    "adapter.members.N.alpha": _FROM_0,
    "adapter.members.N.lr": _FROM_0,
    "adapter.members.N.seed": Range(least=-1, below=2**63),
    "objective.chunk_tokens": _FROM_1,
    "optim.lr": _POSITIVE,
    "optim.beta1": Range(least=0, below=1),
    "optim.beta2": Range(least=0, below=1),
    "optim.eps": _POSITIVE,
    "optim.momentum": Range(least=0, below=1),
    "optim.weight_decay": _FROM_0,
    "optim.max_grad_norm": _FROM_0,
    "lr.warmup_steps": _FROM_0,
    "lr.decay_steps": _FROM_0,
    "lr.min_ratio": Range(least=0, most=1),
    "parallel.dp_replicate": _FROM_1,
    "parallel.dp_shard": Range(least=-1),
    "parallel.cp": _FROM_1,
    "parallel.tp": _FROM_1,
    "parallel.pp": _FROM_1,
    "parallel.stages_per_rank": _FROM_0,
    "parallel.prefetch_blocks": _FROM_0,
    "recompute.every_blocks": _FROM_1,
    "checkpoint.every_steps": _FROM_0,
    "checkpoint.keep_last": _FROM_1,
    "checkpoint.keep_every": _FROM_0,
    "checkpoint.max_failures": _FROM_1,
    "metrics.every_steps": _FROM_1,
    "metrics.peak_tflops": _FROM_0,
    "metrics.gemm_seconds": _POSITIVE,
    "metrics.gc_every_steps": _FROM_1,
    "eval.every_steps": _FROM_0,
    "eval.max_sequences": _FROM_0,
    "fault.first_step_timeout_s": _FROM_1,
    "fault.step_timeout_s": _FROM_1,
    "fault.rendezvous_timeout_s": _FROM_1,
    "fault.hang_factor": Range(above=1),
    "fault.hang_min_s": _POSITIVE,
    "fault.time_limit_s": _FROM_0,
    "fault.max_fruitless_starts": _FROM_0,
    "fault.skip_limit": _FROM_0,
    "fault.rollback_limit": _FROM_0,
    "fault.spike_threshold": _FROM_0,
    "fault.spike_window": Range(least=8, most=4096),
    "fault.replica_check_steps": _FROM_0,
    "fault.straggler_factor": Range(above=1),
    "fault.straggler_windows": _FROM_1,
    "fault.inject.rank": Range(least=-1),
    "fault.inject.step": _FROM_0,
    "fault.inject.seconds": _FROM_0,
    "fault.inject.steps": _FROM_1,
    "fault.inject.seed": Range(least=0, below=2**63),
    "fault.inject.count": _FROM_0,
}


def out_of_range(config: Config) -> Iterator[str]:
    """Say which numbers are out of their range."""
    for key, value in numbers(config):
        allowed = RANGES[re.sub(r"\.\d+\.", f".{INDEX}.", key)]
        if not allowed.holds(value):
            yield problem(key, value, str(allowed))


def numbers(section: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Go through every number of a config, with its dotted key."""
    for part in dataclasses.fields(section):
        value, key = getattr(section, part.name), prefix + part.name
        tables = {f"{key}.{index}.": item for index, item in enumerate(as_list(value) or [])}
        if dataclasses.is_dataclass(value):
            tables = {f"{key}.": value}
        for name, table in tables.items():
            if dataclasses.is_dataclass(table):
                yield from numbers(table, name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield key, value
