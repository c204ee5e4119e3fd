"""The train step: count, forward and backward, clip, set the learning rate, update.

Everything here stays on the device: a step that must not be applied (no target, or a gradient that is not finite) is a
flag that the optimizer reads, so no step waits for the host. Losses are sums over the global count of targets.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from engine.data.batches import IGNORE, Batch
from engine.loss import HeadLoss
from engine.optim import set_lr
from models.linear import Marks
from parallel.context import held_positions
from parallel.fsdp import reduce_gradients_at
from parallel.mesh import Layout
from parallel.pipeline import counted_parameters

Forward = Callable[[Batch], Tensor]
"""(batch) -> this rank's part of the batch's loss sum, nats; the caller turns gradients off."""

ForwardBackward = Callable[[Sequence[Batch], Tensor], Tensor]
"""(microbatches, num_tokens) -> this rank's loss sum; gradients of loss_sum / num_tokens are added up on the way."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step leaves behind, on the device."""

    loss_sum: Tensor
    """This rank's part of the loss, nats."""
    num_tokens: Tensor
    """Targets of the step over all ranks, int64."""
    grad_norm: Tensor
    """Global norm before clipping."""
    skipped: Tensor
    """1.0 where the update was not applied, else 0.0."""


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    forward_backward: ForwardBackward,
    microbatches: Sequence[Batch],
    lr: float,
    max_grad_norm: float,
    layout: Layout,
) -> StepResult:
    """Update the weights from the global batch of one step."""
    num_tokens = layout.sum_over_tokens(count_targets(microbatches))
    loss_sum = forward_backward(microbatches, num_tokens)
    grad_norm = clip_grad_norm(model, max_grad_norm, layout)
    skipped = (~torch.isfinite(grad_norm) | (num_tokens == 0)).to(torch.float32)
    set_lr(optimizer, lr)
    # Read by the optimizer where its gradients lie, which under CPU offload is the host.
    optimizer.found_inf = skipped.to(grad_norm.device)  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
    optimizer.zero_grad()
    return StepResult(loss_sum, num_tokens, grad_norm, skipped)


def direct(model: nn.Module, head_loss: HeadLoss, accumulate: str) -> tuple[Forward, ForwardBackward]:
    """Run microbatches one after the other through the whole model."""

    def forward(batch: Batch) -> Tensor:
        marks = marks_of(batch)
        hidden = model(batch.tokens, batch.positions, batch.documents, None, marks)
        return head_loss(model, hidden, batch.targets, marks)

    def forward_backward(microbatches: Sequence[Batch], num_tokens: Tensor) -> Tensor:
        sums: list[Tensor] = []
        for index, batch in enumerate(microbatches):
            reduce_gradients_at(model, last=index == len(microbatches) - 1, accumulate=accumulate)
            loss_sum = forward(batch)
            # A step without any target has loss 0 and gradient 0; the flag keeps the optimizer from applying it.
            (loss_sum / num_tokens.clamp(min=1)).backward()
            sums.append(loss_sum.detach())
        return torch.stack(sums).sum()

    return forward, forward_backward


def marks_of(batch: Batch) -> Marks | None:
    """Return what adapters must know of the batch's positions."""
    bare = batch.places is None and batch.virtual is None
    return None if bare else Marks(batch.places, batch.virtual)


def part_of_rank(batch: Batch, layout: Layout) -> Batch:
    """Return this rank's part of the sequences of a batch, where ranks share sequences."""
    degree, index = layout.degree("cp"), layout.index("cp")
    if degree == 1:
        return batch
    return batch.part(held_positions(batch.tokens.shape[1], degree, index), counts_bytes=index == 0)


def count_targets(microbatches: Sequence[Batch]) -> Tensor:
    """Count the targets of this rank's microbatches; int64 on their device."""
    return torch.stack([(batch.targets != IGNORE).sum() for batch in microbatches]).sum()


def clip_grad_norm(model: nn.Module, max_norm: float, layout: Layout) -> Tensor:
    """Scale the gradients down to `max_norm` (0: leave them) and return their global norm before that."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in counted_parameters(model) if p.grad is not None])
    norm = layout.norm_over_stages(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_([p for p in model.parameters() if p.grad is not None], max_norm, norm)
    return norm
