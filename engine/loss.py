"""Cross entropy of the next token, over chunks of tokens, so that the logits of a batch never exist.

A loss is a sum over a count: here is the sum, the step divides by the global count of targets. The gradient of a chunk
is computed in its forward pass, while its logits are at hand: the logits are multiplied once and kept nowhere, and the
backward pass only scales two stored gradients. Source of the idea: arXiv:2410.10989 (Liger), section 3.2.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from configs.schema import ObjectiveConfig
from engine.data.batches import IGNORE, Batch

ChunkLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def chunk_cross_entropy(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "tokens vocab"]]:
    """Return the summed loss of a chunk in nats, in at least fp32, and its gradient in the logits' own format."""
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = targets != IGNORE
    wanted = torch.where(counted, targets, 0)[:, None]
    lse = torch.logsumexp(precise, dim=-1, keepdim=True)
    loss_sum = ((lse - precise.gather(1, wanted))[:, 0] * counted).sum()
    is_target = torch.arange(logits.shape[1], device=logits.device) == wanted
    grad = (torch.exp(precise - lse) - is_target.to(precise.dtype)) * counted[:, None]
    return loss_sum, grad.to(logits.dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross entropies of `hidden @ weight.T`, (tokens, dim) and (vocab, dim), chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, chunk_loss: ChunkLoss) -> Tensor:
        precise = torch.promote_types(hidden.dtype, torch.float32)
        loss_sum = torch.zeros((), dtype=precise, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # fp32 over the chunks: bf16 sums of many chunks would lose the small ones.
        grad_weight = torch.zeros_like(weight, dtype=precise) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            part_loss, grad_logits = chunk_loss(hidden[part] @ weight.T, targets[part])
            loss_sum += part_loss
            if grad_hidden is not None:
                grad_hidden[part] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss_sum

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            # In the format of the sum: 1 / num_tokens in bf16 would scale the blocks' gradients, and not the head's.
            grad_hidden = (grad_hidden.to(grad.dtype) * grad).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def cross_entropy_sum(
    hidden: Float[Tensor, "batch seq dim"],
    weight: Float[Tensor, "vocab dim"],
    targets: Int[Tensor, "batch seq"],
    chunk_tokens: int,
    chunk_loss: ChunkLoss = chunk_cross_entropy,
) -> Float[Tensor, ""]:
    """Return the sum of the cross entropies of all targets, in nats; `chunk_loss` may be a compiled one."""
    loss_sum: Tensor = _ChunkedCrossEntropy.apply(  # pyright: ignore[reportAssignmentType]
        hidden.flatten(0, 1), weight, targets.flatten(), chunk_tokens, chunk_loss
    )
    return loss_sum


def compiled_chunk_loss() -> ChunkLoss:
    """Compile the cross entropy of a chunk: its passes over the logits become two."""
    # Static: the last, shorter chunk would otherwise make every later graph one of any length.
    return torch.compile(chunk_cross_entropy, fullgraph=True, dynamic=False)


def next_token(config: ObjectiveConfig, chunk_loss: ChunkLoss) -> Callable[[nn.Module, Batch], Tensor]:
    """Make the objective of pretraining: (model, batch) -> the summed cross entropy of the batch's targets, nats."""

    def objective(model: nn.Module, batch: Batch) -> Tensor:
        hidden = model(batch.tokens, batch.positions, batch.documents)
        head = cast(nn.Linear, model.lm_head)
        return cross_entropy_sum(hidden, head.weight, batch.targets, config.chunk_tokens, chunk_loss)

    return objective
