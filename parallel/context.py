"""Context parallelism: every rank of cp holds a head chunk and a tail chunk of each sequence.

A sequence is cut into 2 * cp chunks; rank r holds chunks r and 2 * cp - 1 - r, one early and one late, so that causal
work is the same for all (arXiv:2407.21783 section 3.3.2). Attention gathers keys and values over cp, in one collective,
and attends from each chunk to the keys up to its end; the backward pass sums the gradients of keys and values back to
their holders. Everything else of a model is per token and knows of it by the positions alone. No ring exchange.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from models.attention import Attend

collectives = torch.ops._c10d_functional


def held_positions(seq_len: int, degree: int, index: int) -> Tensor:
    """List the positions of a sequence that a rank of cp holds, rising; int64, (seq_len / degree,)."""
    assert seq_len % (2 * degree) == 0 and 0 <= index < degree, f"{seq_len} positions, rank {index} of {degree}"
    chunks = torch.arange(seq_len).view(2 * degree, -1)
    return torch.cat((chunks[index], chunks[2 * degree - 1 - index]))


def natural_order(parts: list[Tensor], dim: int) -> Tensor:
    """Put the parts of all ranks, in rank order, back into one sequence along `dim`."""
    heads, tails = zip(*(part.chunk(2, dim) for part in parts), strict=True)
    return torch.cat((*heads, *reversed(tails)), dim)


def ranks_parts(whole: Tensor, degree: int, dim: int) -> list[Tensor]:
    """Cut a sequence along `dim` into the parts of all ranks, in rank order; the inverse of natural_order."""
    chunks = whole.chunk(2 * degree, dim)
    return [torch.cat((chunks[index], chunks[2 * degree - 1 - index]), dim) for index in range(degree)]


def context_attention(attend: Attend, mesh: DeviceMesh) -> Attend:
    """Make an Attend whose queries, keys and values are this rank's part; `documents` stay the whole sequence's.

    `attend` does the work of one chunk; `mesh` is the mesh's cp axis. The same `attend` may serve all blocks.
    """
    group, degree, index = mesh.get_group().group_name, mesh.size(), mesh.get_local_rank()
    # A partial of a module's function, and a name instead of a group: one compiled graph serves all blocks.
    return partial(_attend_in_context, attend=attend, group=group, degree=degree, index=index)


def _attend_in_context(
    q: Tensor,  # (batch, heads, seq / cp, head_dim)
    k: Tensor,  # (batch, kv_heads, seq / cp, head_dim)
    v: Tensor,
    documents: Tensor | None,  # (batch, seq)
    *,
    attend: Attend,
    group: str,
    degree: int,
    index: int,
) -> Tensor:
    gathered: Tensor = _Gather.apply(torch.stack((k, v)), group, degree)  # pyright: ignore[reportAssignmentType]
    k, v = gathered.unbind(0)  # (batch, kv_heads, seq, head_dim)
    chunk = q.shape[2] // 2
    outs: list[Tensor] = []
    for queries, number in zip(q.split(chunk, dim=2), (index, 2 * degree - 1 - index), strict=True):
        end = (number + 1) * chunk
        known = None if documents is None else documents[:, :end]
        outs.append(attend(queries, k[:, :, :end], v[:, :, :end], known))
    return torch.cat(outs, dim=2)


class _Gather(torch.autograd.Function):
    """All ranks' parts of a sequence, the dim before the last, in natural order; gradients are summed to the holder."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: str, degree: int) -> Tensor:
        ctx.group, ctx.degree = group, degree
        gathered = collectives.wait_tensor(collectives.all_gather_into_tensor(part.contiguous(), degree, group))
        return natural_order(list(gathered.chunk(degree)), -2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        parts = torch.cat(ranks_parts(grad, ctx.degree, -2))
        return (
            collectives.wait_tensor(collectives.reduce_scatter_tensor(parts, "sum", ctx.degree, ctx.group)),
            None,
            None,
        )


def work(seq_len: int, degree: int, documents: Tensor | None = None) -> list[int]:
    """Count the pairs of query and key that each rank of cp attends to, for one sequence or the rows of `documents`.

    Without documents all ranks have the same; with them the largest over the mean is the imbalance. `documents` (batch,
    seq_len) should be on the host: the counting waits for it.
    """
    places = torch.arange(seq_len)[None]
    if documents is not None:
        begins = torch.ones_like(documents, dtype=torch.bool)
        begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
        starts = torch.where(begins, places, 0).cummax(dim=1).values
        places = places - starts
    keys = (places + 1).sum(dim=0)  # seen from each position, all rows together
    return [int(keys[held_positions(seq_len, degree, index)].sum()) for index in range(degree)]


def imbalance(counts: list[int]) -> float:
    """Return the largest count of pairs over the mean: 1.0 where all ranks wait for nobody."""
    return max(counts) * len(counts) / sum(counts)
