"""Everything that a run is made of, on this rank: what engine/build.py builds, engine/train.py takes to its last step
and launchers/rank.py closes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from configs.schema import Config
from engine.checkpoint.checkpointer import Checkpointer, Found
from engine.data.batches import Batch, Batches
from engine.data.members import MemberBatches
from engine.fault.care import Care
from engine.folder import RunFolder
from engine.metrics import Metrics, Sink, yardstick
from engine.metrics_log import JsonLines, TensorBoard, truncate_after
from engine.peaks import choose_peak, describe_peak
from engine.progress import ProgressDisplay
from engine.step import Forward, ForwardBackward
from models.adapters import trained_shapes
from models.peft_config import adapter_of
from parallel.fsdp import DTYPES
from parallel.mesh import Layout


@dataclass(slots=True)
class Run:
    """Everything that a run is made of, on this rank."""

    config: Config
    layout: Layout
    folder: RunFolder
    data: Batches | MemberBatches
    heldout: Callable[[], Iterable[Batch]]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    forward: Forward
    forward_backward: ForwardBackward
    checkpointer: Checkpointer
    care: Care
    progress: ProgressDisplay | None
    """What a person sees; on rank 0 only."""
    base: str = ""
    """Identity of a frozen base; empty where all is trained."""
    step: int = 0
    """Steps done."""
    first_step: int = 0
    """Steps that were done when this start of the run began; -1 once it has gone back, and its start is behind it."""
    num_tokens: int = 0
    """Targets seen, as of the last logged step."""
    tokens_of_members: list[int] = field(default_factory=list)
    """The same of each member of adapter.members."""
    productive_s: float = 0.0
    """Time of the steps and evaluations that led to the present weights, over all starts."""
    gemm_tflops: float = 0.0
    metrics: Metrics | None = field(default=None)

    def start_metrics(self) -> Metrics:
        """Start the clocks, right before the first step; opens the logs on rank 0."""
        if self.metrics is None:
            config, device = self.config, self.layout.device
            peak = choose_peak(config.metrics.peak_tflops, device, DTYPES[config.precision.compute], self.gemm_tflops)
            adapter, ranks = config.adapter, self.layout.world_size
            # A token passes through one member's part only.
            alone = [adapter_of(adapter, member) for member in adapter.members] or [adapter]
            trained = [trained_shapes(config.model, one) for one in alone if one.kind != "none"]
            seq_len = config.data.seq_len
            positions = len(alone) * config.data.global_batch_size * seq_len
            yard = yardstick(config.model, seq_len, positions, ranks, peak, self.gemm_tflops, trained)
            if self.progress is not None and self.first_step >= 0:
                self.progress.say(describe_peak(peak, self.gemm_tflops))
            sinks = self._sinks() if self.layout.rank == 0 else ()
            self.metrics = Metrics(yard, device, step=self.step, num_tokens=self.num_tokens, sinks=sinks)
        return self.metrics

    def restore(self, found: Found) -> None:
        """Stand where a proved checkpoint stood."""
        self.checkpointer.load(found, self.model, self.optimizer)
        self.step = self.first_step = found.step
        self.num_tokens = int(found.meta["num_tokens"])
        self.tokens_of_members = [found.meta["num_tokens_of"][one.name] for one in self.config.adapter.members]
        self.productive_s = found.meta.get("productive_s", 0.0)
        self.care.load(found.meta, found.step)

    def rewind(self, found: Found) -> None:
        """Go back to a proved checkpoint in the middle of a start; what was recorded after it goes."""
        if self.metrics is not None:
            self.metrics.close()
            self.metrics = None
        self.restore(found)
        self.first_step = -1
        if self.care.attempts is not None:
            self.care.attempts.advance(self.step, self.productive_s)

    def close(self) -> None:
        """Finish what is being written; in this order, since the checkpoint's group needs the run's."""
        try:
            self.checkpointer.close()
        finally:
            if self.metrics is not None:
                self.metrics.close()
            self.care.close()
            self.folder.release()

    def _sinks(self) -> tuple[Sink, ...]:
        # What starts over writes its evaluation of step 0 again.
        last_kept = self.step or -1
        truncate_after(self.folder.metrics, last_kept)
        lines = JsonLines(self.folder.metrics)
        if not self.config.metrics.tensorboard:
            return (lines,)
        return (lines, TensorBoard(self.folder.tensorboard, last_kept))
