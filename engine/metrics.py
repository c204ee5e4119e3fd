"""What a run measures: time, tokens, FLOPs and memory between logged steps, as one record each.

Every number names its unit, and docs/metrics.md its formula. Clocks are read without waiting for the device: a logged
step has already synchronised when its loss became a float, so the time between two logged steps is exact and the steps
in between are undisturbed. Losses arrive here as floats that are already reduced over ranks; nothing in this file
communicates or writes: the records go to the sinks that the launcher gave to one rank (engine/metrics_log.py).
"""

import math
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import torch

from configs.schema import ModelConfig
from engine.peaks import Peak, PeakKind
from engine.stopwatch import Throughput
from models.flops import flops_per_token

MemoryKind = Literal["cuda_allocated", "rss"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberStep:
    """What a logged step was to one of several adapters that are trained at once."""

    loss: float
    grad_norm: float
    lr: float
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberEval:
    """An evaluation of one of several adapters that are trained at once."""

    heldout_loss: float
    bits_per_byte: float | None
    heldout_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One logged step; "the interval" is the time since the previous logged step."""

    kind: Literal["step"] = "step"
    step: int
    """Optimizer steps done."""
    loss: float
    """Mean cross entropy of this step's target tokens, nats."""
    perplexity: float
    grad_norm: float
    """Global norm before clipping."""
    lr: float
    num_tokens: int
    """Target tokens since the first step of the run."""
    tokens_per_s: float
    """Target tokens a second over all devices, in the interval."""
    positions_per_s: float
    """Positions that were computed: prompts, which are no targets, and padding too."""
    num_devices: int
    """Ranks that shared the work."""
    tflops_per_device: float
    """Model FLOPs a second and device, full-attention convention."""
    mfu: float
    """tflops_per_device / peak_tflops."""
    mfu_causal: float
    """The same with half of attention's FLOPs."""
    gemm_share: float
    """tflops_per_device / gemm_tflops."""
    step_time_s: float
    """Mean over the interval, without evaluations and checkpoint stalls."""
    data_wait_s: float
    """The part of step_time_s spent waiting for the next batch."""
    checkpoint_stall_s: float
    """Seconds of the interval in which training stood still for a checkpoint, in all."""
    wall_s: float
    """Length of the interval, everything included."""
    memory_gib: float
    """Peak since the process started."""
    memory_kind: MemoryKind
    goodput: float
    """Productive time over the time of all starts of the run, so far."""
    cp_imbalance: float
    """Attention's work of the busiest rank of cp over the mean, in this step; 1 where all have the same."""
    peak_tflops: float
    peak_kind: PeakKind
    gemm_tflops: float
    time: float
    """Seconds since 1970."""
    members: dict[str, MemberStep] | None = None
    """Each member's own, by name; loss, grad_norm and lr are then means over them. Only where there are several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRecord:
    """One evaluation on held-out documents."""

    kind: Literal["eval"] = "eval"
    step: int
    heldout_loss: float
    """Mean cross entropy of the held-out target tokens, nats."""
    heldout_perplexity: float
    bits_per_byte: float | None
    """heldout_loss in bits for each byte of the text; None where the store does not count bytes."""
    heldout_tokens: int
    eval_s: float
    """Seconds the evaluation took."""
    time: float
    """Seconds since 1970."""
    members: dict[str, MemberEval] | None = None
    """Each member's own, by name; heldout_loss and bits_per_byte are then means over them. Only where there are
    several."""


Record = StepRecord | EvalRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Yardstick:
    """What turns tokens a second into utilisation."""

    flops_per_token: float
    """Forward and backward of one token, attention counted in full."""
    flops_per_token_causal: float
    positions_per_step: int
    """Positions that a step computes over all devices, whether they have a target or not."""
    num_devices: int
    """Ranks that share the global batch's work."""
    peak: Peak
    gemm_tflops: float
    """Measured GEMM rate of one device in compute precision."""


def yardstick(
    model: ModelConfig,
    seq_len: int,
    positions_per_step: int,
    num_devices: int,
    peak: Peak,
    gemm_tflops: float,
    trained: Sequence[Mapping[str, tuple[int, ...]]] = (),
) -> Yardstick:
    """Take the FLOPs of a token from the shapes of the model and of what is trained; `model` is resolved.

    `trained` are the trained shapes of each adapter, whose tokens are as many; none: all of the model.
    """

    def mean(*, causal: bool) -> float:
        each = [flops_per_token(model, seq_len, causal=causal, trained=one) for one in trained or [None]]
        return sum(each) / len(each)

    return Yardstick(
        flops_per_token=mean(causal=False),
        flops_per_token_causal=mean(causal=True),
        positions_per_step=positions_per_step,
        num_devices=num_devices,
        peak=peak,
        gemm_tflops=gemm_tflops,
    )


@dataclass(frozen=True, slots=True)
class RankCosts:
    """What each rank measures by itself; the run reports the largest over ranks."""

    data_wait_s: float
    memory_gib: float
    gemm_share: float
    """Of the last logged step."""
    cp_imbalance: float = 1.0
    goodput: float = 0.0
    """Known to rank 0 only."""


class Sink(Protocol):
    """Where records go."""

    def write(self, record: Record) -> None:
        """Take one record."""
        ...

    def sync(self) -> None:
        """Return when everything written is on disk."""
        ...

    def close(self) -> None:
        """Finish."""
        ...


class Metrics:
    """Turns reduced floats and the stopwatch into records, and hands them to the sinks of the rank that has any."""

    def __init__(
        self,
        yard: Yardstick,
        device: torch.device,
        *,
        step: int = 0,
        num_tokens: int = 0,
        sinks: tuple[Sink, ...] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start the clock at `step` steps done; make it right before the first step."""
        self._yard, self._device, self._sinks = yard, device, sinks
        self._throughput = Throughput(step, num_tokens, clock)
        self._gemm_share = 0.0
        self.waiting_for_data = self._throughput.waiting_for_data
        self.add_data_wait = self._throughput.add_data_wait
        self.productive_s = self._throughput.productive_s

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Leave the block (an evaluation) out of step time; waits first, so that queued steps pay for themselves."""
        self._synchronize()
        with self._throughput.excluded():
            yield

    @contextmanager
    def checkpointing(self) -> Iterator[None]:
        """Count the block as checkpoint stall. Lines up to here are on disk first, as the checkpoint relies on them."""
        self._synchronize()
        with self._throughput.checkpointing():
            for sink in self._sinks:
                sink.sync()
            yield

    def rank_costs(self, step: int, cp_imbalance: float = 1.0, goodput: float = 0.0) -> RankCosts:
        """Return this rank's own costs at a logged step, for the loop to take the largest over ranks."""
        data_wait_s = self._throughput.data_wait_per_step(step)
        return RankCosts(data_wait_s, peak_memory_gib(self._device)[0], self._gemm_share, cp_imbalance, goodput)

    def raise_gemm_rate(self, tflops: float) -> None:
        """Take a newly measured GEMM rate where it is above the known one, which something else had slowed then."""
        if tflops > self._yard.gemm_tflops:
            peak = self._yard.peak
            if peak.kind == "measured":
                peak = replace(peak, tflops=tflops)
            self._yard = replace(self._yard, peak=peak, gemm_tflops=tflops)

    def record(
        self,
        step: int,
        loss: float,
        grad_norm: float,
        lr: float,
        num_tokens: int,
        costs: RankCosts | None = None,
        members: dict[str, MemberStep] | None = None,
    ) -> StepRecord:
        """Record a logged step: `step` steps and `num_tokens` target tokens done since the run's first.

        `costs` are the largest over ranks; without them this rank's own are written.
        """
        costs = costs or self.rank_costs(step)
        interval, yard = self._throughput.lap(step, num_tokens), self._yard
        tokens_per_s = interval.num_tokens / interval.step_s
        positions_per_s = interval.steps * yard.positions_per_step / interval.step_s
        of_device = positions_per_s / yard.num_devices / 1e12
        tflops = of_device * yard.flops_per_token
        record = StepRecord(
            step=step,
            loss=loss,
            perplexity=perplexity(loss),
            grad_norm=grad_norm,
            lr=lr,
            num_tokens=num_tokens,
            tokens_per_s=tokens_per_s,
            positions_per_s=positions_per_s,
            num_devices=yard.num_devices,
            tflops_per_device=tflops,
            mfu=tflops / yard.peak.tflops,
            mfu_causal=of_device * yard.flops_per_token_causal / yard.peak.tflops,
            gemm_share=tflops / yard.gemm_tflops,
            step_time_s=interval.step_s / interval.steps,
            data_wait_s=costs.data_wait_s,
            checkpoint_stall_s=interval.checkpoint_stall_s,
            wall_s=interval.wall_s,
            memory_gib=costs.memory_gib,
            memory_kind=peak_memory_gib(self._device)[1],
            goodput=costs.goodput,
            cp_imbalance=costs.cp_imbalance,
            peak_tflops=yard.peak.tflops,
            peak_kind=yard.peak.kind,
            gemm_tflops=yard.gemm_tflops,
            time=time.time(),
            members=members,
        )
        self._gemm_share = record.gemm_share
        self._write(record)
        return record

    def record_eval(
        self,
        step: int,
        heldout_loss: float,
        bits_per_byte: float | None,
        heldout_tokens: int,
        eval_s: float,
        members: dict[str, MemberEval] | None = None,
    ) -> EvalRecord:
        """Record an evaluation after `step` steps."""
        record = EvalRecord(
            step=step,
            heldout_loss=heldout_loss,
            heldout_perplexity=perplexity(heldout_loss),
            bits_per_byte=bits_per_byte,
            heldout_tokens=heldout_tokens,
            eval_s=eval_s,
            time=time.time(),
            members=members,
        )
        self._write(record)
        return record

    def close(self) -> None:
        """Close the sinks."""
        for sink in self._sinks:
            sink.close()

    def _write(self, record: Record) -> None:
        for sink in self._sinks:
            sink.write(record)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def perplexity(loss: float) -> float:
    """Return exp(loss); infinite where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def peak_memory_gib(device: torch.device) -> tuple[float, MemoryKind]:
    """Return the most memory used since the start: CUDA's allocator on a GPU, resident memory of the process else."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30, "cuda_allocated"
    status = Path("/proc/self/status")
    # Linux: ru_maxrss survives exec, so a child of a large launcher would report the launcher's peak. VmHWM does not.
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE) if status.exists() else None
    if found:
        return int(found[1]) / 2**20, "rss"
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes / 2**30, "rss"
