"""Formats of a frozen matrix: what is kept in the place of its 16-bit numbers, how that is made, and how it is read.

    nf4            w = level[code] * scale    a scale for 64 inputs: number / factor + mean, a factor for 256 scales
    int8, float8   w = value(code) * scale    a scale for an output

A matrix is quantised whole, from its bf16 rounding, and cut afterwards, so that what is read depends on no layout. The
arithmetic of nf4 is that of torchao's NF4Tensor, in its order and in bf16, so that both read the same bits, compiled or
not. Two things differ in what is written: the mean is taken in fp64, so that it depends on no number of threads, and a
block of zeros is read as zeros, where torchao reads minus its scale's error. Only plain tensors: FSDP, tensor
parallelism and checkpoints know how to part those.

Sources: arXiv:2305.14314 (NF4, double quantisation), arXiv:2209.05433 (e4m3).
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import BFloat16, UInt8
from torch import Tensor

from configs.layout import NF4_BLOCK

FORMAT = torch.bfloat16
"""What a matrix is quantised from and read in."""
LARGEST_SCALE_BLOCK = 256
ENCODED_AT_ONCE = 1 << 20  # elements whose temporary tensors exist at once
_LEVELS = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407,
           0.5626, 0.7230, 1.0)  # fmt: skip
_ZERO = _LEVELS.index(0.0)
_LARGEST = {"int8": 127.0, "float8": 448.0}


class Part(NamedTuple):
    """One of the tensors that a matrix is kept in."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    sides: tuple[Literal["out", "in"] | None, ...]
    """What each dim follows: the outputs, the inputs, or neither."""


class Place(NamedTuple):
    """Which rectangle of which matrix is read: constants of a compiled graph, the same in all layers."""

    kind: str
    height: int
    """Outputs of the whole matrix."""
    width: int
    """Inputs of the whole matrix."""
    row: int = 0
    """The first output that is here."""
    column: int = 0
    """The first input that is here."""


def can_quantize(kind: str, height: int, width: int) -> bool:
    """Say whether the whole shape allows the format; a matrix that doesn't fit stays in 16 bits."""
    return kind in _LARGEST or (kind == "nf4" and height > 0 and width % NF4_BLOCK == 0)


def parts(kind: str, height: int, width: int) -> dict[str, Part]:
    """List what a whole matrix is kept in, by name."""
    assert can_quantize(kind, height, width), f"{kind} doesn't take {height} x {width}"
    if kind != "nf4":
        return {
            "codes": Part((height, width), torch.uint8, ("out", "in")),
            "scales": Part((height, 1), FORMAT, ("out", None)),
        }
    blocks = width // NF4_BLOCK
    constants = height * blocks // scale_block(height, width) + 1 + len(_LEVELS)
    return {
        "codes": Part((height, width // 2), torch.uint8, ("out", "in")),
        "scales": Part((height, blocks), torch.int8, ("out", "in")),
        # Factors, mean and levels in one: each tensor costs a gather its share of time.
        "constants": Part((constants,), FORMAT, (None,)),
    }


def scale_block(height: int, width: int) -> int:
    """Give the number of nf4's scales that share a factor: a power of two that divides them all."""
    count = height * width // NF4_BLOCK
    return min(count & -count, LARGEST_SCALE_BLOCK)


# -------------------- writing


def encode(kind: str, whole: BFloat16[Tensor, "out in"]) -> dict[str, Tensor]:
    """Quantise a whole matrix on its device, in pieces: little but the result takes memory."""
    height, width = whole.shape
    found = {
        name: torch.empty(part.shape, dtype=part.dtype, device=whole.device)
        for name, part in parts(kind, height, width).items()
    }
    rows = max(1, ENCODED_AT_ONCE // width)
    tops = torch.empty(height, found["scales"].shape[1], dtype=FORMAT, device=whole.device)
    nearest = _nearest_levels().to(whole.device) if kind == "nf4" else None
    for first in range(0, height, rows):
        piece = slice(first, first + rows)
        blocks = whole[piece].unflatten(1, (tops.shape[1], -1))
        top = blocks.abs().amax(dim=2, keepdim=True)
        if nearest is None:
            top = (top / _LARGEST[kind]).to(FORMAT)
            codes = _rounded(kind, blocks / top)
        else:
            level = nearest[(blocks / top).view(torch.int16).to(torch.int32) + 2**15]
            codes = level[..., ::2] << 4 | level[..., 1::2]
        tops[piece] = top[..., 0]
        found["codes"][piece] = codes.flatten(1)
    if kind == "nf4":
        found["scales"], found["constants"] = _twice_quantized(tops, scale_block(height, width))
    else:
        found["scales"] = tops
    return found


def _rounded(kind: str, values: Tensor) -> Tensor:
    """Return the bytes of values in units of their scale."""
    # A scale that was rounded down leaves values a little beyond the largest; one of 0 leaves no number.
    values = values.nan_to_num(0.0).clamp(-_LARGEST[kind], _LARGEST[kind])
    codes = values.round().to(torch.int8) if kind == "int8" else values.to(torch.float8_e4m3fn)
    return codes.view(torch.uint8)


def _nearest_levels() -> UInt8[Tensor, "65536"]:
    """Return the nearest level of every bf16, by its bits from -2^15 on: a look-up in place of 16 comparisons.

    Distances are rounded to bf16 as torchao's are, and the first of equal ones counts.
    """
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(FORMAT)
    nearest = (values[:, None] - torch.tensor(_LEVELS, dtype=FORMAT)).abs().argmin(dim=1)
    nearest[values.isnan()] = _ZERO  # 0 / 0 in a block of zeros
    return nearest.to(torch.uint8)


def _twice_quantized(tops: BFloat16[Tensor, "out blocks"], block: int) -> tuple[Tensor, Tensor]:
    """Quantise the scales themselves: 8 bits each, and what reads them."""
    mean = tops.double().mean().to(FORMAT)
    apart = (tops - mean).view(-1, block)
    factors = 256 / (2 * apart.abs().amax(dim=1))
    numbers = (apart * factors[:, None]).round().clamp(-128, 127)
    # Where all scales are the mean: 0 times an infinite factor.
    numbers = numbers.nan_to_num(0.0).to(torch.int8).view(tops.shape)
    levels = torch.tensor(_LEVELS, dtype=FORMAT, device=tops.device)
    return numbers, torch.cat([factors, mean[None], levels])


# -------------------- reading


def decode(
    place: Place, codes: Tensor, scales: Tensor, constants: Tensor | None, dtype: torch.dtype, after: Tensor
) -> Tensor:
    """Read (rows, inputs) of a matrix, in bf16 and then `dtype`.

    FSDP of torch 2.11 hands out integers in its parameters' dtype: exactly, as they have 8 bits. `after` only keeps two
    readings apart, see `_scales_and_values`.
    """
    scale, values, zero = _scales_and_values(
        place.kind, scales, constants, place.height, place.width, place.row, place.column, after
    )
    found = F.embedding((codes + zero).to(torch.int32), values)
    dense = (found.view(*scale.shape, -1) * scale[..., None]).flatten(1)
    return dense if dtype == FORMAT else _in_16_bits(dense).to(dtype)


@torch.library.custom_op("ropewalk::scales_and_values", mutates_args=())
def _scales_and_values(
    kind: str, scales: Tensor, constants: Tensor | None, height: int, width: int, row: int, column: int, after: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scales (rows, blocks), what each byte stands for (256, numbers in a byte), and a zero.

    An operator, since the compiler would skip the roundings to bf16 between its steps, and divide by other rules. And
    since it would find that the backward pass reads what the forward pass has read, and keep that, or the codes as wide
    integers, which is the very memory that quantising saves: what comes `after` the gradient is not the same to it.
    """
    zero = torch.zeros(1, dtype=torch.int32, device=scales.device)
    byte = torch.arange(256, dtype=torch.uint8, device=scales.device)
    if constants is None:
        number = torch.int8 if kind == "int8" else torch.float8_e4m3fn
        return scales.to(FORMAT, copy=True), byte.view(number).to(FORMAT)[:, None], zero
    factors, mean, levels = constants.to(FORMAT).split([constants.numel() - 1 - len(_LEVELS), 1, len(_LEVELS)])
    rows = torch.arange(row, row + scales.shape[0], device=scales.device)
    columns = torch.arange(scales.shape[1], device=scales.device) + column // NF4_BLOCK
    number = rows[:, None] * (width // NF4_BLOCK) + columns
    scale = scales.to(torch.int8) / factors[number // scale_block(height, width)] + mean
    return scale, torch.stack([levels[(byte >> 4).int()], levels[(byte & 15).int()]], dim=1), zero


@_scales_and_values.register_fake
def _(
    kind: str, scales: Tensor, constants: Tensor | None, height: int, width: int, row: int, column: int, after: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    values = scales.new_empty((256, 1 if constants is None else 2), dtype=FORMAT)
    return scales.new_empty(scales.shape, dtype=FORMAT), values, scales.new_empty(1, dtype=torch.int32)


@torch.library.custom_op("ropewalk::in_16_bits", mutates_args=())
def _in_16_bits(dense: Tensor) -> Tensor:
    """Copy: the compiler would skip the rounding to bf16 on the way to a wider format."""
    return dense.clone()


@_in_16_bits.register_fake
def _(dense: Tensor) -> Tensor:
    return torch.empty_like(dense)
