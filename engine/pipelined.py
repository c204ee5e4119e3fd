"""Running microbatches through the stages of a pipeline by one of torch's schedules.

torch orders the computations and moves activations and gradients; what FSDP2 does is decided here, because torch's
own handling keeps whole gradients until the end of a step, and under schedules that compute weight gradients apart
(zero bubble) it loses them: the pass over activations runs after a block's parameters are freed, so torch looks for
graph nodes of the shards and finds none, and FSDP2's reduction of a block comes before its weight gradients exist.
Here the blocks of such a stage stay gathered through the step, and the reduction follows each weight pass.

Sources: arXiv:2104.04473 (1F1B, interleaved), arXiv:2401.10241 (zero bubble).
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch._functorch.config as functorch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    _PipelineScheduleRuntime,
    get_schedule_class,
)

from configs.errors import ConfigError, LayoutError, problem
from configs.layout import ZERO_BUBBLE_SCHEDULES
from configs.schema import Config, ParallelConfig
from engine.data.batches import Batch
from engine.loss import HeadLoss
from engine.step import Forward, ForwardBackward, marks_of
from models.llama import Llama
from parallel.fsdp import DTYPES, finish_backward, reduce_gradients_at
from parallel.mesh import Layout
from parallel.pipeline import stages_of, stages_of_ranks, sum_tied_gradients

Schedule = PipelineScheduleSingle | PipelineScheduleMulti


class StageModule(nn.Module):
    """A stage as torch's pipeline calls it: hidden states in, hidden states or the loss out.

    No FSDPModule itself, so that torch leaves gathering and reduction alone. What a microbatch needs on every stage
    (positions, documents) each rank has from its own batch; only hidden states travel.
    """

    def __init__(self, model: Llama, head_loss: HeadLoss | None) -> None:
        """Wrap a stage; `head_loss` makes it the last one."""
        super().__init__()
        self.model = model
        self.head_loss = head_loss
        self.batch: Batch | None = None
        self.num_tokens: Tensor | None = None
        self.loss_sums: list[Tensor] = []
        self.loss_sum: Tensor | None = None

    def begin(self, batch: Batch | None, num_tokens: Tensor | None) -> None:
        """Start a step, or an evaluation's batch, which has no count to divide by."""
        self.batch, self.num_tokens = batch, num_tokens
        self.loss_sums.clear()

    def forward(self, taken: Tensor) -> Tensor:
        """Run the batch in hand from tokens or hidden states; the last stage keeps loss_sum and returns the loss."""
        batch = self.batch
        assert batch is not None, "no microbatch was given to the stage"
        positions = batch.positions
        if positions is None:
            # The hidden states may be a part of the sequence, so the stage can't count for itself.
            positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)[None]
        marks = marks_of(batch)
        out = self.model(taken, positions, batch.documents, None, marks)
        if self.head_loss is None:
            return out
        loss_sum = self.head_loss(self.model, out, batch.targets, marks)
        self.loss_sums.append(loss_sum.detach())
        if self.num_tokens is None:
            return loss_sum
        self.loss_sum = loss_sum
        return (loss_sum / self.num_tokens.clamp(min=1)).sum()


class Stage(PipelineStage):
    """torch's stage with FSDP2's flags set as the run wants its gradients reduced."""

    def __init__(self, module: StageModule, accumulate: str, apart: bool, **arguments: Any) -> None:
        """Take torch's own arguments as they are; `apart`: the schedule computes weight gradients apart."""
        super().__init__(module, **arguments)
        self._module, self._accumulate, self._apart = module, accumulate, apart
        self.microbatches: Sequence[Batch] = ()
        self._losses: dict[int, Tensor | None] = {}
        self._reduced = 0

    def begin(self, microbatches: Sequence[Batch], num_tokens: Tensor) -> None:
        """Start a step."""
        self.microbatches, self._reduced = microbatches, 0
        self._module.begin(None, num_tokens)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Run a microbatch forward."""
        self._module.batch = self.microbatches[fwd_chunk_id]
        out = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        # The weight pass begins at the loss's node; torch 2.11 frees a node of Python's after the input pass.
        self._losses[fwd_chunk_id], self._module.loss_sum = self._module.loss_sum, None
        return out

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """Run a microbatch backward, whole or to its inputs only."""
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        if full_backward:
            self._losses.pop(bwd_chunk_id, None)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """Compute a microbatch's weight gradients and free its graph."""
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        self._losses.pop(bwd_chunk_id, None)

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """Leave out messages to oneself, where a V turns: torch 2.11 sends them, gloo can't."""
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> Any:
        """Run a backward pass, or one of its halves, and reduce what it leaves."""
        root = cast(FSDPModule, self._module.model)
        self._reduced += backward_type != "input"
        last = self._reduced == len(self.microbatches)
        if backward_type == "full":
            self._reduce_at(last)
            return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        # FSDP2's hooks are on activations: in these passes they run too early, for some gradients or for none.
        root.set_is_last_backward(False)
        root.set_requires_gradient_sync(False)
        root.set_reshard_after_backward(False)
        result = super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        if backward_type == "weight":
            self._reduce_at(last)
            finish_backward(self._module.model)
        return result

    def _reduce_at(self, last: bool) -> None:
        """Say what the end of a microbatch's backward communicates, and frees."""
        root = cast(FSDPModule, self._module.model)
        if self._apart:
            root.set_requires_gradient_sync(True)
            root.set_reshard_after_backward(last)
        else:
            # The head is computed with outside of the model, so FSDP2 doesn't gather it anew for what is still to come.
            root.set_reshard_after_backward(last, recurse=False)
        reduce_gradients_at(self._module.model, last=last, accumulate=self._accumulate)


class Pipeline:
    """The stages of this rank and the schedules that run them, one for each shape of a step."""

    def __init__(
        self, model: nn.Module, layout: Layout, parallel: ParallelConfig, compute: str, head_loss: HeadLoss
    ) -> None:
        """Wrap the stages; schedules are built when the first microbatches show their shape."""
        self._model, self._layout, self._parallel, self._dtype = model, layout, parallel, DTYPES[compute]
        self._group, self._here = layout.mesh.get_group("pp"), layout.index("pp")
        placed = stages_of_ranks(parallel)
        self._owners = {stage: rank for rank, stages in enumerate(placed) for stage in stages}
        self._last = len(self._owners) - 1
        self._modules = {
            index: StageModule(stage, head_loss if index == self._last else None)
            for index, stage in zip(placed[self._here], stages_of(model), strict=True)
        }
        self._apart = _computes_weights_apart(parallel)
        self._schedules: dict[tuple[int, ...], tuple[Schedule, list[Stage]]] = {}
        if self._apart:
            _keep_saved_tensors()
            for module in self._modules.values():
                cast(FSDPModule, module.model).set_reshard_after_forward(False)

    def forward_backward(self, microbatches: Sequence[Batch], num_tokens: Tensor) -> Tensor:
        """Run a step's microbatches, all of one shape; returns this rank's loss sum, 0 without the last stage."""
        assert len({batch.tokens.shape for batch in microbatches}) == 1, "microbatches of a pipeline are of one shape"
        shape = (len(microbatches), *microbatches[0].tokens.shape)
        if shape not in self._schedules:
            self._schedules[shape] = self._build(microbatches)
        schedule, stages = self._schedules[shape]
        for stage in stages:
            stage.begin(microbatches, num_tokens)
        tokens = [torch.cat([batch.tokens for batch in microbatches])] if 0 in self._modules else []
        # torch wants a target for each microbatch; the stages have theirs already.
        schedule.step(*tokens, target=torch.zeros(len(microbatches)), return_outputs=False)
        sum_tied_gradients(self._model, self._parallel, self._group)
        sums = [loss_sum for module in self._modules.values() for loss_sum in module.loss_sums]
        return torch.stack(sums).sum(dim=0) if sums else self._no_loss(microbatches[0])

    @torch.no_grad()
    def forward(self, batch: Batch) -> Tensor:
        """Run one batch without gradients; returns this rank's loss sum, 0 without the last stage.

        A rank goes on to its next batch once it has sent this one on, so batches follow each other like microbatches.
        """
        out = self._no_loss(batch)
        for index, module in self._modules.items():
            module.begin(batch, None)
            before, after = self._owners.get(index - 1), self._owners.get(index + 1)
            if before is not None and before != self._here:
                out = torch.empty(self._hidden_shape(batch), dtype=self._dtype, device=self._layout.device)
                dist.recv(out, group=self._group, group_src=before)
            out = module(batch.tokens if before is None else out)
            if after is not None and after != self._here:
                dist.send(out.contiguous(), group=self._group, group_dst=after)
        return out if self._last in self._modules else self._no_loss(batch)

    def _build(self, microbatches: Sequence[Batch]) -> tuple[Schedule, list[Stage]]:
        """Build the stages and the schedule for steps of this shape."""
        # Shapes are given, so torch runs no forward and backward of its own to find them.
        tokens = microbatches[0].tokens.to("meta")
        hidden = torch.empty(self._hidden_shape(microbatches[0]), dtype=self._dtype, device="meta", requires_grad=True)
        scalar = torch.empty((), dtype=self._loss_dtype, device="meta", requires_grad=True)
        stages = [
            Stage(
                module,
                self._parallel.accumulate,
                self._apart,
                stage_index=index,
                num_stages=self._last + 1,
                device=self._layout.device,
                input_args=hidden if index else tokens,
                output_args=scalar if index == self._last else hidden,
                group=self._group,
            )
            for index, module in self._modules.items()
        ]
        return _schedule(stages, self._parallel, len(microbatches)), stages

    def _hidden_shape(self, batch: Batch) -> tuple[int, ...]:
        """Shape of what travels between stages: under tensor parallelism each rank has a part of the sequence."""
        rows, seq = batch.tokens.shape
        return rows, seq // self._layout.degree("tp"), stages_of(self._model)[0].config.dim

    @property
    def _loss_dtype(self) -> torch.dtype:
        return torch.promote_types(self._dtype, torch.float32)

    def _no_loss(self, batch: Batch) -> Tensor:
        shape = (batch.members,) if batch.members else ()
        return torch.zeros(shape, dtype=self._loss_dtype, device=self._layout.device)


class _TwoResults(torch.autograd.Function):
    """(x, w) -> (x w, x + w): one node of the graph with two gradients into it, as a compiled block is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, w)
        return x * w, x + w

    @staticmethod
    def backward(ctx: Any, grad_product: Tensor, grad_sum: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        x, w = ctx.saved_tensors
        return grad_product * w + grad_sum, grad_product * x + grad_sum


def gives_each_result_its_gradient() -> bool:
    """Tell whether torch's weight pass is right for a node with several results; that of 2.11 adds their gradients."""
    x, w = torch.tensor(3.0, requires_grad=True), torch.tensor(5.0, requires_grad=True)
    product, total = _TwoResults.apply(x * 1, w)  # pyright: ignore
    _, groups = stage_backward_input([2 * product + 7 * total], [torch.ones(())], [x], iter([w]))  # pyright: ignore
    stage_backward_weight(iter([w]), groups)  # pyright: ignore
    return w.grad is not None and w.grad.item() == 2 * 3 + 7


def check_schedule(config: Config) -> None:
    """Refuse what torch can't compute weight gradients apart for: compiled blocks, and several adapters in one run."""
    parallel = config.parallel
    refused = [(config.compile.blocks, "compiled blocks"), (bool(config.adapter.members), "adapter.members")]
    asked = " and ".join(what for is_asked, what in refused if is_asked)
    if parallel.pp == 1 or not asked or not _computes_weights_apart(parallel):
        return
    if not gives_each_result_its_gradient():
        given = parallel.schedule_csv or parallel.schedule
        expected = f"can't run {asked} under torch {torch.__version__}"
        why = "its weight pass is wrong for functions that have a backward of their own; torch 2.13 has it mended"
        do = "Install torch 2.13 or newer, or use the schedule 1F1B or Interleaved1F1B."
        raise ConfigError(problem("parallel.schedule", given, expected, why, do))


def pipelined(
    model: nn.Module, layout: Layout, parallel: ParallelConfig, compute: str, head_loss: HeadLoss
) -> tuple[Forward, ForwardBackward]:
    """Make the passes of a model that is cut into stages; `compute` is the format that hidden states travel in."""
    pipeline = Pipeline(model, layout, parallel, compute, head_loss)
    return pipeline.forward, pipeline.forward_backward


def _schedule(stages: list[Stage], parallel: ParallelConfig, count: int) -> Schedule:
    """Build torch's schedule; gradients aren't divided by the number of microbatches, the loss is already."""
    arguments: dict[str, Any] = {"n_microbatches": count, "loss_fn": _as_it_is, "scale_grads": False}
    if parallel.schedule_csv:
        schedule = _PipelineScheduleRuntime(stages, **arguments)
        try:
            schedule._load_csv(parallel.schedule_csv, format=_csv_format(parallel.schedule_csv))
        except (AssertionError, RuntimeError, ValueError, KeyError) as error:
            expected = f"must be a schedule of {count} microbatches that can run"
            raise LayoutError(problem("parallel.schedule_csv", parallel.schedule_csv, expected, str(error))) from error
        return schedule
    kind = get_schedule_class(parallel.schedule)
    return kind(stages[0] if issubclass(kind, PipelineScheduleSingle) else stages, **arguments)  # pyright: ignore


def _keep_saved_tensors() -> None:
    """Have compiled backward passes leave saved tensors alone: the two halves of a pass read the same ones.

    The compiler's cache on disk does not tell such graphs from those that overwrite them, and would hand out one that
    another schedule left there, to wrong gradients without a word: the key gets a word of ours.
    """
    functorch.donated_buffer = False
    tag, kept = torch.compiler.config.cache_key_tag, "saved-tensors-kept"
    if kept not in tag:
        torch.compiler.config.cache_key_tag = f"{tag} {kept}".strip()


def _as_it_is(loss: Tensor, target: Tensor) -> Tensor:
    """Stand for the loss function, which the last stage has applied."""
    return loss


def _csv_format(path: str) -> Any:
    """Tell a schedule of computations from one that says when to send and receive too."""
    return "compute_comms" if "SEND" in Path(path).read_text(encoding="utf-8") else "compute_only"


def _computes_weights_apart(parallel: ParallelConfig) -> bool:
    if parallel.schedule_csv:
        return re.search(r"\dW\d", Path(parallel.schedule_csv).read_text(encoding="utf-8")) is not None
    return parallel.schedule in ZERO_BUBBLE_SCHEDULES
