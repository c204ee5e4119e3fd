"""Causal attention behind one function, with documents kept apart when sequences are packed.

`sdpa` is torch's scaled_dot_product_attention. `blocked` takes blocks of queries against the keys up to each and
recomputes the scores in the backward pass, as FlashAttention does (arXiv:2205.14135 section 3): it is exact, holds no
S x S tensor, takes document masks of any shape, and once compiled is about twice as fast as SDPA's CPU kernel where
there is no AMX. No dense S x S mask is ever built: documents always run blocked.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Backend = Literal["sdpa", "blocked"]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(q, k, v, documents) -> out, each (batch, heads, seq, head_dim); the queries are the last positions of the keys."""

# Rows of scores that exist at once in the blocked backend: 64 to 256 measured alike, 128 best, on two x86 CPUs.
BLOCK = 128


def attention(
    q: Float[Tensor, "batch heads seq head_dim"],
    k: Float[Tensor, "batch kv_heads seq head_dim"],
    v: Float[Tensor, "batch kv_heads seq head_dim"],
    documents: Int[Tensor, "batch seq"] | None = None,
    backend: Backend = "sdpa",
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Attend causally, and within one document where `documents` numbers them; heads share keys in groups."""
    if documents is not None or backend == "blocked":
        return _blocked(q, k, v, documents)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def attention_to_cache(
    q: Float[Tensor, "batch heads new head_dim"],
    k: Float[Tensor, "batch kv_heads known head_dim"],
    v: Float[Tensor, "batch kv_heads known head_dim"],
) -> Float[Tensor, "batch heads new head_dim"]:
    """Attend from the newest tokens to all that are known, themselves included; for generation only."""
    new, known = q.shape[2], k.shape[2]
    mask = torch.ones(new, known, dtype=torch.bool, device=q.device).tril(known - new)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def _blocked(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    """Fold batch and KV heads into one dim, and the queries that share a KV head into another."""
    batch, heads, seq, head_dim = q.shape
    kv_heads = k.shape[1]
    groups = heads // kv_heads
    out: Tensor = _Blocked.apply(  # pyright: ignore[reportAssignmentType]
        q.reshape(batch * kv_heads, groups, seq, head_dim),
        k.reshape(batch * kv_heads, seq, head_dim),
        v.reshape(batch * kv_heads, seq, head_dim),
        None if documents is None else documents.repeat_interleave(kv_heads, dim=0),
    )
    return out.reshape(batch, heads, seq, head_dim)


def _scores(q: Tensor, k: Tensor, first_query: int, first_key: int, documents: Tensor | None) -> Tensor:
    """Scaled scores of some queries (rows, groups, queries, head_dim) on some keys (rows, keys, head_dim).

    In at least fp32, (rows, groups, queries, keys); minus infinity where a query may not see a key. The numbers of the
    first query and key place them in the sequence and in `documents` (rows, seq).
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


class _Blocked(torch.autograd.Function):
    """Attention by blocks; (rows, groups, seq, head_dim) queries on (rows, seq, head_dim) keys and values."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
        rows, _, seq, _ = q.shape
        outs: list[Tensor] = []
        lses: list[Tensor] = []
        for start in range(0, seq, BLOCK):
            stop = min(start + BLOCK, seq)
            queries = q[:, :, start:stop]
            scores = _scores(queries, k[:, :stop], start, 0, documents)
            highest = scores.amax(dim=-1, keepdim=True)
            weights = torch.exp(scores - highest)
            total = weights.sum(dim=-1, keepdim=True)
            mixed = (weights.to(q.dtype).reshape(rows, -1, stop) @ v[:, :stop]).view(queries.shape)
            outs.append((mixed / total).to(q.dtype))
            lses.append(highest + total.log())
        out, lse = torch.cat(outs, dim=2), torch.cat(lses, dim=2)
        ctx.save_for_backward(q, k, v, out, lse, documents)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore
        q, k, v, out, lse, documents = ctx.saved_tensors
        rows, _, seq, head_dim = q.shape
        grad_q = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        grads_k: list[Tensor] = []
        grads_v: list[Tensor] = []
        # d softmax: dS = P * (dP - sum(dO * O)), so the row sum needs no probabilities.
        delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(dim=-1, keepdim=True)
        # By blocks of keys: each block's key and value gradients come whole, only the queries' are added up.
        for start in range(0, seq, BLOCK):
            stop = min(start + BLOCK, seq)
            queries, keys, values = q[:, :, start:], k[:, start:stop], v[:, start:stop]
            scores = _scores(queries, keys, start, start, documents)
            weights = torch.exp(scores - lse[:, :, start:])
            flat_grad = grad[:, :, start:].reshape(rows, -1, head_dim)
            grads_v.append(weights.to(q.dtype).view(rows, -1, stop - start).transpose(1, 2) @ flat_grad)
            grad_weights = (flat_grad @ values.transpose(1, 2)).view(weights.shape)
            grad_scores = (weights * (grad_weights - delta[:, :, start:]) / math.sqrt(head_dim)).to(q.dtype)
            flat = grad_scores.view(rows, -1, stop - start)
            grads_k.append(flat.transpose(1, 2) @ queries.reshape(rows, -1, head_dim))
            grad_q[:, :, start:] += (flat @ keys).view(queries.shape)
        return grad_q.to(q.dtype), torch.cat(grads_k, dim=1), torch.cat(grads_v, dim=1), None
