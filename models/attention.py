"""Causal attention behind one function, with documents kept apart when sequences are packed.

    sdpa     torch's scaled_dot_product_attention; it takes no document mask, so documents run blocked
    blocked  blocks of queries in plain tensor operations: any device, any format, documents of any shape
    flex     torch's FlexAttention, documents included; GPUs only
    varlen   torch's variable-length flash kernel; GPUs and 16 bits only
    flash    the flash-attn package, when installed; GPUs and 16 bits only

The queries may be fewer than the keys; they are then the last positions (a mask aligned to the bottom right), which is
what context parallelism asks for. No S x S tensor or mask exists on any path, forward or backward. Each kernel is a
leaf, attention_NAME.py; here is only the choice among them.
"""

import importlib.util
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from models.attention_blocked import BLOCK, blocked
from models.attention_flex import flex
from models.attention_sdpa import fused, sdpa
from models.attention_varlen import flash, varlen

__all__ = ["BLOCK", "Attend", "Backend", "attention", "attention_to_cache", "why_not"]

Backend = Literal["sdpa", "blocked", "flex", "varlen", "flash"]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(q, k, v, documents) -> out, each (batch, heads, length, head_dim); the queries are the keys' last positions."""


def attention(
    q: Float[Tensor, "batch heads q_len head_dim"],
    k: Float[Tensor, "batch kv_heads k_len head_dim"],
    v: Float[Tensor, "batch kv_heads k_len head_dim"],
    documents: Int[Tensor, "batch k_len"] | None = None,
    backend: Backend = "sdpa",
) -> Float[Tensor, "batch heads q_len head_dim"]:
    """Attend causally from the last q_len positions, and within one document where `documents` numbers them.

    Heads share keys in groups; a row's documents are runs of one number, and the numbers rise.
    """
    assert q.shape[2] <= k.shape[2], f"{q.shape[2]} queries are no end of {k.shape[2]} keys"
    match backend:
        case "flex":
            return flex(q, k, v, documents)
        case "varlen":
            return varlen(q, k, v, documents)
        case "flash":
            return flash(q, k, v, documents)
        case "sdpa" if documents is None and fused(q, k):
            return sdpa(q, k, v)
        case _:
            return blocked(q, k, v, documents)


def why_not(backend: Backend, device_type: str, dtype: torch.dtype) -> str:
    """Say why a backend does not run here, in a clause; empty when it does."""
    if backend in ("sdpa", "blocked"):
        return ""
    if device_type == "cpu":
        if backend == "flex":
            return "torch has no backward pass of FlexAttention on CPUs"
        return "its kernels are for GPUs"
    if backend == "flex":
        return ""
    if dtype not in (torch.bfloat16, torch.float16):
        return "its kernels take 16-bit formats only"
    if backend == "flash" and importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    return ""


def attention_to_cache(
    q: Float[Tensor, "batch heads new head_dim"],
    k: Float[Tensor, "batch kv_heads known head_dim"],
    v: Float[Tensor, "batch kv_heads known head_dim"],
) -> Float[Tensor, "batch heads new head_dim"]:
    """Attend from the newest tokens to all that are known, themselves included; for generation only."""
    new, known = q.shape[2], k.shape[2]
    mask = torch.ones(new, known, dtype=torch.bool, device=q.device).tril(known - new)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
