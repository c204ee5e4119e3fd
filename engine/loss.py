"""Cross entropy of the next token, over chunks of tokens, so that the logits of a batch never exist.

A loss is a sum over a count: here is the sum, the step divides by the global count of targets. The gradient of a chunk
is computed in its forward pass, while its logits are at hand: the logits are multiplied once and kept nowhere, and the
backward pass only scales two stored gradients. Source of the idea: arXiv:2410.10989 (Liger), section 3.2.

Under tensor parallelism a rank has some rows of the head and so some columns of a chunk's logits: the ranks agree on
each token's largest logit, sum of exponentials and wanted logit, and no rank sees another's columns (arXiv:1909.08053,
section 3). Every rank then has the whole loss, and its part of the gradient of the hidden states.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from configs.schema import ObjectiveConfig
from engine.data.batches import IGNORE
from models.adapters.lora import Lora
from models.linear import Linear, Marks
from parallel.tensor import VocabularyShard, vocabulary_shard

ChunkLoss = Callable[[Tensor, Tensor, VocabularyShard | None], tuple[Tensor, Tensor]]


def chunk_cross_entropy(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"], shard: VocabularyShard | None = None
) -> tuple[Float[Tensor, ""], Float[Tensor, "tokens vocab"]]:
    """Return the summed loss of a chunk in nats, in at least fp32, and its gradient in the logits' own format.

    With a shard the logits are those of its rows only, the loss is that of the whole vocabulary.
    """
    if shard is not None:
        return _sharded_cross_entropy(logits, targets, shard)
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = targets != IGNORE
    wanted = torch.where(counted, targets, 0)[:, None]
    lse = torch.logsumexp(precise, dim=-1, keepdim=True)
    loss_sum = ((lse - precise.gather(1, wanted))[:, 0] * counted).sum()
    is_target = torch.arange(logits.shape[1], device=logits.device) == wanted
    grad = (torch.exp(precise - lse) - is_target.to(precise.dtype)) * counted[:, None]
    return loss_sum, grad.to(logits.dtype)


def _sharded_cross_entropy(logits: Tensor, targets: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = targets != IGNORE
    place = (targets - shard.first)[:, None]
    here = counted[:, None] & (place >= 0) & (place < logits.shape[1])
    shifted = precise - _reduced(precise.amax(dim=-1, keepdim=True), "max", shard)
    exp = torch.exp(shifted)
    wanted = torch.where(here, shifted.gather(1, torch.where(here, place, 0)), 0)
    # One message: columns of the sum of exponentials and of the wanted logit.
    total, wanted = _reduced(torch.cat([exp.sum(dim=-1, keepdim=True), wanted], dim=1), "sum", shard).split(1, dim=1)
    loss_sum = ((total.log() - wanted)[:, 0] * counted).sum()
    is_target = here & (torch.arange(logits.shape[1], device=logits.device) == place)
    grad = (exp / total - is_target.to(precise.dtype)) * counted[:, None]
    return loss_sum, grad.to(logits.dtype)


def _reduced(values: Tensor, operation: str, shard: VocabularyShard) -> Tensor:
    """Sum or take the largest over the ranks that share the vocabulary; an operator that can be compiled."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(values, operation, shard.group))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross entropies of `hidden @ weight.T + z @ b.T`, (tokens, dim) and (vocab, dim), chunk by chunk.

    z (tokens, rank) and b (vocab, rank) are an adapter's, or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        z: Tensor | None,
        b: Tensor | None,
        targets: Tensor,
        chunk: int,
        chunk_loss: ChunkLoss,
        shard: VocabularyShard | None,
    ) -> Tensor:
        precise = torch.promote_types(hidden.dtype, torch.float32)
        loss_sum = torch.zeros((), dtype=precise, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # fp32 over the chunks: bf16 sums of many chunks would lose the small ones.
        grad_weight = torch.zeros_like(weight, dtype=precise) if ctx.needs_input_grad[1] else None
        grad_z = torch.empty_like(z) if z is not None else None
        grad_b = torch.zeros_like(b, dtype=precise) if b is not None else None
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = hidden[part] @ weight.T
            if z is not None and b is not None:
                logits = torch.addmm(logits, z[part], b.T)
            part_loss, grad_logits = chunk_loss(logits, targets[part], shard)
            loss_sum += part_loss
            if grad_hidden is not None:
                grad_hidden[part] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[part]
            if z is not None and b is not None and grad_z is not None and grad_b is not None:
                grad_z[part] = grad_logits @ b
                grad_b += grad_logits.T @ z[part]
        ctx.save_for_backward(grad_hidden, grad_weight, grad_z, grad_b)
        ctx.dtype = weight.dtype
        return loss_sum

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        # Scaled in the format of the sum: 1 / num_tokens in bf16 would scale the blocks' gradients, and not the head's.
        scaled = [None if kept is None else (kept.to(grad.dtype) * grad).to(ctx.dtype) for kept in ctx.saved_tensors]
        return *scaled, None, None, None, None


def cross_entropy_sum(
    hidden: Float[Tensor, "batch seq dim"],
    weight: Float[Tensor, "vocab dim"],
    targets: Int[Tensor, "batch seq"],
    chunk_tokens: int,
    chunk_loss: ChunkLoss = chunk_cross_entropy,
    factors: tuple[Float[Tensor, "batch seq rank"], Float[Tensor, "rows rank"]] | None = None,
) -> Float[Tensor, ""]:
    """Return the sum of the cross entropies of all targets, in nats; `chunk_loss` may be a compiled one.

    A weight that is a DTensor has its rows on the ranks of tp, all of which call this with the same hidden states; the
    gradient of these is then a partial sum on each. `factors` are what an adapter multiplies beside this rank's rows.
    """
    rows, shard = vocabulary_shard(weight)
    z, b = (None, None) if factors is None else (factors[0].flatten(0, 1), factors[1])
    loss_sum: Tensor = _ChunkedCrossEntropy.apply(  # pyright: ignore[reportAssignmentType]
        hidden.flatten(0, 1), rows, z, b, targets.flatten(), chunk_tokens, chunk_loss, shard
    )
    return loss_sum


def compiled_chunk_loss() -> ChunkLoss:
    """Compile the cross entropy of a chunk: its passes over the logits become two."""
    # Static: the last, shorter chunk would otherwise make every later graph one of any length.
    return torch.compile(chunk_cross_entropy, fullgraph=True, dynamic=False)


HeadLoss = Callable[[nn.Module, Tensor, Tensor, Marks | None], Tensor]
"""(model with a head, hidden states after the final norm, targets, marks) -> the summed loss of the targets, nats; of
each member's targets where there are several, (members,)."""


def next_token(config: ObjectiveConfig, chunk_loss: ChunkLoss, members: int = 0) -> HeadLoss:
    """Make the objective: the summed cross entropy of every next token that is a target, a sum for each member."""

    def head_loss(model: nn.Module, hidden: Tensor, targets: Tensor, marks: Marks | None) -> Tensor:
        head = cast(Linear, model.lm_head)
        factors = head.beside.factors(head, hidden, marks) if isinstance(head.beside, Lora) else None
        if not members:
            return cross_entropy_sum(hidden, head.weight, targets, config.chunk_tokens, chunk_loss, factors)
        # No chunk has rows of two members. Unbound, so that their gradients come back as one stack.
        of_hidden, of_targets = (t.unflatten(0, (members, -1)).unbind() for t in (hidden, targets))
        of_factors = [None] * members if factors is None else [
            (z[None], b) for z, b in zip(factors[0].unbind(), factors[1].unbind(), strict=True)
        ]  # fmt: skip
        each = zip(of_hidden, of_targets, of_factors, strict=True)
        return torch.stack(
            [cross_entropy_sum(h, head.weight, t, config.chunk_tokens, chunk_loss, f) for h, t, f in each]
        )

    return head_loss
