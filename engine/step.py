"""The train step: count, forward and backward, clip, set the learning rate, update.

Everything here stays on the device: a step that must not be applied (no target, or judged bad: engine/fault/guard.py)
is a flag that the optimizer reads, so no step waits for the host. Losses are sums over the global count of targets.

Where several adapters are trained at once, counts, losses, norms and flags are vectors, an element for each, and one
backward pass through the sum of their losses gives each the gradient that it would have alone: they share no trained
parameter and no row of a batch.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from engine.data.batches import Batch
from engine.fault.guard import Guard
from engine.loss import HeadLoss
from engine.optim import set_lr
from engine.optim.members import MemberOptimizer
from models.linear import Marks
from parallel.context import held_positions
from parallel.fsdp import finish_backward, reduce_gradients_at
from parallel.mesh import Layout
from parallel.pipeline import counted_parameters

Forward = Callable[[Batch], Tensor]
"""(batch) -> this rank's part of the batch's loss sum, () or (members,), nats; the caller turns gradients off."""

ForwardBackward = Callable[[Sequence[Batch], Tensor], Tensor]
"""(microbatches, num_tokens) -> this rank's loss sum, as num_tokens is; gradients of loss_sum / num_tokens are added up
on the way."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step leaves behind, on the device; each () or (members,)."""

    loss_sum: Tensor
    """Sum over all targets, nats, float64."""
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
    guard: Guard,
) -> StepResult:
    """Update the weights from the global batch of one step, unless the guard judges it bad."""
    num_tokens = layout.sum_over_tokens(count_targets(microbatches))
    own_loss_sum = forward_backward(microbatches, num_tokens).double()
    own_finite = own_loss_sum.isfinite()
    loss_sum = layout.sum_over_losses(own_loss_sum)
    grad_norm = clip_grad_norm(model, optimizer, max_grad_norm, layout)
    skipped = guard.judge(loss_sum, grad_norm, num_tokens, own_finite)
    set_lr(optimizer, lr)
    # Read by the optimizer where its gradients lie, which under CPU offload is the host.
    optimizer.found_inf = skipped.to(grad_norm.device)  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
    optimizer.zero_grad()
    return StepResult(loss_sum, num_tokens, grad_norm, skipped)


def direct(model: nn.Module, head_loss: HeadLoss, accumulate: str) -> tuple[Forward, ForwardBackward]:
    """Run microbatches one after the other through the whole model."""

    def passed(batch: Batch) -> tuple[Tensor, Tensor]:
        marks = marks_of(batch)
        hidden = model(batch.tokens, batch.positions, batch.documents, None, marks)
        return hidden, head_loss(model, hidden, batch.targets, marks)

    def forward(batch: Batch) -> Tensor:
        return passed(batch)[1]

    def forward_backward(microbatches: Sequence[Batch], num_tokens: Tensor) -> Tensor:
        sums: list[Tensor] = []
        for index, batch in enumerate(microbatches):
            reduce_gradients_at(model, last=index == len(microbatches) - 1, accumulate=accumulate)
            hidden, loss_sum = passed(batch)
            # A step without any target has loss 0 and gradient 0; the flag keeps the optimizer from applying it.
            (loss_sum / num_tokens.clamp(min=1)).sum().backward()
            if not hidden.requires_grad:  # only the head is trained, which is computed with outside of the model
                finish_backward(model)
            sums.append(loss_sum.detach())
        return torch.stack(sums).sum(dim=0)

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
    """Count the targets of this rank's microbatches, () or (members,); int64 on their device."""
    return torch.stack([batch.num_targets() for batch in microbatches]).sum(dim=0)


def clip_grad_norm(model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float, layout: Layout) -> Tensor:
    """Scale the gradients down to `max_norm` (0: leave them) and return their global norm before that.

    Each member's gradients have a norm of their own, (members,).
    """
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, f"trained, and without a gradient: {without[:5]}"
    if isinstance(optimizer, MemberOptimizer):
        parts = optimizer.parameters
        norms = layout.norm_over_stages(torch.stack([_norm_of(part, model) for part in parts]))
        clipped = list(zip(parts, norms.unbind(), strict=True))
    else:
        norms = layout.norm_over_stages(_norm_of(counted_parameters(model), model))
        clipped = [(list(model.parameters()), norms)]
    for part, norm in clipped:
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_([p for p in part if p.grad is not None], max_norm, norm)
    return norms


def _norm_of(parameters: Iterable[nn.Parameter], model: nn.Module) -> Tensor:
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:  # a stage of a pipeline that trains nothing: its zero looks like the others' norms
        like = next(p for p in model.parameters() if p.is_floating_point())
        return torch.zeros((), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
