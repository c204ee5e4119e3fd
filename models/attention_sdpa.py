"""torch's scaled_dot_product_attention, also for queries that are only the end of the sequence.

SDPA's flash kernels take a square causal mask or none. Queries at the end of more keys are the sum of two such calls,
the keys before the first query (all seen) and the square at the end (causal), merged by their log-sum-exps. The
backward pass calls the kernels' own backward for each part with the merged output and log-sum-exp: FlashAttention's
formulas (arXiv:2205.14135 section 3) read the softmax from those, so each part's gradients are exact.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def fused(q: Tensor, k: Tensor) -> bool:
    """Tell whether a kernel without an S x S tensor takes these queries and keys."""
    square = q.shape[2] == k.shape[2]
    if q.device.type == "cpu":
        return True
    half = q.dtype in (torch.bfloat16, torch.float16)
    # The flash kernel itself; F.scaled_dot_product_attention would pad other widths first.
    return (half or q.dtype == torch.float32) if square else half and q.shape[3] % 8 == 0 and q.shape[3] <= 256


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend causally from the last positions to all keys up to each."""
    if q.shape[2] == k.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    out: Tensor = _Merged.apply(q, k, v)  # pyright: ignore[reportAssignmentType]
    return out


class _Merged(torch.autograd.Function):
    """Attention to the keys before the queries and to the queries' own, as one."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        before = k.shape[2] - q.shape[2]
        far, far_lse, far_rest = _flash(q, k[:, :, :before], v[:, :, :before], causal=False)
        near, near_lse, near_rest = _flash(q, k[:, :, before:], v[:, :, before:], causal=True)
        lse = torch.logaddexp(far_lse, near_lse)
        out = far * torch.exp(far_lse - lse)[..., None] + near * torch.exp(near_lse - lse)[..., None]
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rests = far_rest, near_rest
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore
        q, k, v, out, lse = ctx.saved_tensors
        before = k.shape[2] - q.shape[2]
        far_rest, near_rest = ctx.rests
        far = _flash_backward(grad, q, k[:, :, :before], v[:, :, :before], out, lse, far_rest, causal=False)
        near = _flash_backward(grad, q, k[:, :, before:], v[:, :, before:], out, lse, near_rest, causal=True)
        return far[0] + near[0], torch.cat((far[1], near[1]), dim=2), torch.cat((far[2], near[2]), dim=2)


def _flash(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Return the output, its log-sum-exp (batch, heads, q_len), and what the device's backward wants besides."""
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
        return out, lse, ()
    out, lse, *rest, _ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    return out, lse, tuple(rest)


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rest: tuple[Any, ...], *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal)
    starts_q, starts_k, max_q, max_k, seed, offset = rest
    return aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, starts_q, starts_k, max_q, max_k, 0.0, causal, seed, offset
    )
