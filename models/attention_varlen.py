"""Variable-length flash kernels: every document is a sequence of its own, all of them in one call.

`varlen` is torch's own, `flash` the flash-attn package's. Both align causal masks to the bottom right, so the queries
of a document that begin after its first key need no more than their own bounds. How many documents there are is data:
counting them waits for the device once per call and does not compile. A leaf of attention.py, which chooses; GPUs and
16 bits only.
"""

import functools
import inspect
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor


def bounds(q_len: int, k_len: int, batch: int, documents: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Say where each segment of the flattened queries and keys begins, and the end; int32, (segments + 1,).

    A segment is a run of one document in one row. The queries are the last q_len of the row's k_len positions: a
    segment may have none, and otherwise they are its last positions.
    """
    if documents is None:
        rows = torch.arange(batch + 1, dtype=torch.int32, device=device)
        return rows * q_len, rows * k_len
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    end = torch.full((1,), batch * k_len, device=device)
    keys = torch.cat((begins.flatten().nonzero()[:, 0], end))
    queries = keys // k_len * q_len + (keys % k_len - (k_len - q_len)).clamp(min=0)
    return queries.to(torch.int32), keys.to(torch.int32)


def varlen(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    """Attend by torch.nn.attention.varlen."""
    batch, _, q_len, _ = q.shape
    k_len = k.shape[2]
    starts_q, starts_k = bounds(q_len, k_len, batch, documents, q.device)
    return _unflat(_varlen_kernel()(_flat(q), _flat(k), _flat(v), starts_q, starts_k, q_len, k_len), batch)


def flash(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    """Attend by the flash-attn package."""
    import flash_attn  # pyright: ignore[reportMissingImports] - optional

    batch, _, q_len, _ = q.shape
    k_len = k.shape[2]
    if documents is None:
        return flash_attn.flash_attn_func(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True
        ).transpose(1, 2)
    starts_q, starts_k = bounds(q_len, k_len, batch, documents, q.device)
    out = flash_attn.flash_attn_varlen_func(_flat(q), _flat(k), _flat(v), starts_q, starts_k, q_len, k_len, causal=True)
    return _unflat(out, batch)


@functools.cache
def _varlen_kernel() -> Callable[..., Tensor]:
    """Find the causal kernel; before it had `enable_gqa` it took fewer KV heads unasked."""
    from torch.nn.attention.varlen import varlen_attn

    asked = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return functools.partial(cast(Callable[..., Tensor], varlen_attn), window_size=(-1, 0), **asked)


def _flat(tensor: Tensor) -> Tensor:
    """(batch, heads, seq, head_dim) to (batch * seq, heads, head_dim)."""
    return tensor.transpose(1, 2).flatten(0, 1)


def _unflat(tensor: Tensor, batch: int) -> Tensor:
    return tensor.unflatten(0, (batch, -1)).transpose(1, 2)
