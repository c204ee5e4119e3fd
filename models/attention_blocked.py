"""Attention by blocks of queries in plain tensor operations: exact, on any device, in any format.

Blocks of queries meet the keys up to each; the backward pass recomputes the scores by blocks of keys, as FlashAttention
does (arXiv:2205.14135 section 3). No S x S tensor exists, documents of any shape are kept apart, and once compiled it
is about twice as fast as SDPA's CPU kernel where there is no AMX. A leaf of attention.py, which chooses.
"""

import math
from typing import Any

import torch
from torch import Tensor

# Rows of scores that exist at once: 64 to 256 measured alike, 128 best, on two x86 CPUs.
BLOCK = 128


def blocked(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    """Fold batch and KV heads into one dim, and the queries that share a KV head into another."""
    batch, heads, q_len, head_dim = q.shape
    kv_heads, k_len = k.shape[1], k.shape[2]
    groups = heads // kv_heads
    out: Tensor = _Blocked.apply(  # pyright: ignore[reportAssignmentType]
        q.reshape(batch * kv_heads, groups, q_len, head_dim),
        k.reshape(batch * kv_heads, k_len, head_dim),
        v.reshape(batch * kv_heads, k_len, head_dim),
        None if documents is None else documents.repeat_interleave(kv_heads, dim=0),
    )
    return out.reshape(batch, heads, q_len, head_dim)


def _scores(q: Tensor, k: Tensor, first_query: int, first_key: int, documents: Tensor | None) -> Tensor:
    """Scaled scores of some queries (rows, groups, queries, head_dim) on some keys (rows, keys, head_dim).

    In at least fp32, (rows, groups, queries, keys); minus infinity where a query may not see a key. The numbers of the
    first query and key place them in the sequence and in `documents` (rows, k_len).
    """
    rows, groups, queries, head_dim = q.shape
    keys = k.shape[1]
    product = (q.reshape(rows, groups * queries, head_dim) @ k.transpose(1, 2)).view(rows, groups, queries, keys)
    query_at = torch.arange(first_query, first_query + queries, device=q.device)
    key_at = torch.arange(first_key, first_key + keys, device=q.device)
    allowed = key_at <= query_at[:, None]
    if documents is not None:
        same = documents[:, query_at, None] == documents[:, None, key_at]
        allowed = (allowed & same)[:, None]
    product = product.to(torch.promote_types(q.dtype, torch.float32)) / math.sqrt(head_dim)
    return torch.where(allowed, product, -math.inf)


def _forward(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention and the log-sum-exp of each query's scores."""
    rows, _, q_len, _ = q.shape
    before = k.shape[1] - q_len  # keys before the first query
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for start in range(0, q_len, BLOCK):
        stop = min(start + BLOCK, q_len)
        queries, keys = q[:, :, start:stop], before + stop
        scores = _scores(queries, k[:, :keys], before + start, 0, documents)
        highest = scores.amax(dim=-1, keepdim=True)
        weights = torch.exp(scores - highest)
        total = weights.sum(dim=-1, keepdim=True)
        mixed = (weights.to(q.dtype).reshape(rows, -1, keys) @ v[:, :keys]).view(queries.shape)
        outs.append((mixed / total).to(q.dtype))
        lses.append(highest + total.log())
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


@torch.library.custom_op("ropewalk::blocked_attention", mutates_args=())
def _as_one_operator(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same under one name, by which selective recompute can keep what it returns."""
    return _forward(q, k, v, documents)


class _Blocked(torch.autograd.Function):
    """(rows, groups, q_len, head_dim) queries, the last of the sequence, on (rows, k_len, head_dim) keys and values."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
        # The compiler is to see what is inside, and fuse it.
        forward = _forward if torch.compiler.is_compiling() else _as_one_operator
        out, lse = forward(q, k, v, documents)
        ctx.save_for_backward(q, k, v, out, lse, documents)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore
        q, k, v, out, lse, documents = ctx.saved_tensors
        rows, _, q_len, head_dim = q.shape
        k_len = k.shape[1]
        before = k_len - q_len
        grad_q = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        grads_k: list[Tensor] = []
        grads_v: list[Tensor] = []
        # d softmax: dS = P * (dP - sum(dO * O)), so the row sum needs no probabilities.
        delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(dim=-1, keepdim=True)
        # By blocks of keys: each block's key and value gradients come whole, only the queries' are added up. Fewer
        # queries than keys leave room for wider blocks: as many scores at once as in the forward, and a shorter graph.
        width = BLOCK * (k_len // q_len)
        for start in range(0, k_len, width):
            stop = min(start + width, k_len)
            first = max(start - before, 0)  # the first query that sees a key of the block
            queries, keys, values = q[:, :, first:], k[:, start:stop], v[:, start:stop]
            scores = _scores(queries, keys, before + first, start, documents)
            weights = torch.exp(scores - lse[:, :, first:])
            flat_grad = grad[:, :, first:].reshape(rows, -1, head_dim)
            grads_v.append(weights.to(q.dtype).view(rows, -1, stop - start).transpose(1, 2) @ flat_grad)
            grad_weights = (flat_grad @ values.transpose(1, 2)).view(weights.shape)
            grad_scores = (weights * (grad_weights - delta[:, :, first:]) / math.sqrt(head_dim)).to(q.dtype)
            flat = grad_scores.view(rows, -1, stop - start)
            grads_k.append(flat.transpose(1, 2) @ queries.reshape(rows, -1, head_dim))
            grad_q[:, :, first:] += (flat @ keys).view(queries.shape)
        return grad_q.to(q.dtype), torch.cat(grads_k, dim=1), torch.cat(grads_v, dim=1), None
