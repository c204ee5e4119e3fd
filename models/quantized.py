"""The quantised weight of a frozen projection: read in 16 bits for each product, and again for each gradient.

    y = x W^T, W read from codes;  dx = dy W, W read again

Between the two passes nothing in 16 bits is kept, and W gets no gradient. The codes are frozen parameters that FSDP
and tensor parallelism shard as they would the weight; what they mean is in quantized_formats.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from configs.errors import CheckpointError, problem
from models.linear import Linear
from models.quantized_formats import FORMAT, Place, can_quantize, decode, encode, parts


def quantize_frozen(model: nn.Module, kind: str) -> None:
    """Put a quantised weight in the place of each frozen one of the layers' projections, in place, without values.

    Before tensor parallelism and FSDP; a projection whose shape the format doesn't take is left as it is.
    """
    for linear in _frozen_projections(model).values():
        if can_quantize(kind, *linear.weight.shape):
            linear.quantized = Quantized(kind, *linear.weight.shape, device=linear.weight.device)
            linear.sides |= {f"quantized.{name}": part.sides for name, part in linear.quantized.parts.items()}
            del linear.weight
            linear.register_parameter("weight", None)


def left_in_16_bits(model: nn.Module, kind: str) -> list[str]:
    """List the layers' frozen projections that the format doesn't take, by their names."""
    frozen = _frozen_projections(model)
    return [name for name, linear in frozen.items() if kind != "none" and not can_quantize(kind, *linear.weight.shape)]


def quantize(kind: str, whole: Float[Tensor, "out in"], name: str = "a projection") -> dict[str, Tensor]:
    """Return what a whole weight is kept in, by the names of `Quantized`'s parameters, whatever the weight's dtype.

    The weight's bf16 rounding is what is quantised, so that a base is the same under every precision.compute.
    """
    if not whole.isfinite().all():
        why = "a scale would make numbers of it that look like weights"
        raise CheckpointError(problem(name, "", "holds an infinity or a NaN, and is to be quantised", why))
    return encode(kind, whole.to(FORMAT))


def dequantize(kind: str, found: dict[str, Tensor], dtype: torch.dtype) -> Float[Tensor, "out in"]:
    """Return the whole weight that is multiplied with, from what `quantize` returned."""
    codes = found["codes"]
    place = Place(kind, codes.shape[0], codes.shape[1] * (2 if kind == "nf4" else 1))
    return decode(place, codes, found["scales"], found.get("constants"), dtype, codes)


def held_bytes(kind: str, height: int, width: int) -> int:
    """Count the bytes of a whole weight; 16-bit ones where the format doesn't take its shape."""
    if not can_quantize(kind, height, width):
        return height * width * FORMAT.itemsize
    return sum(part.dtype.itemsize * torch.Size(part.shape).numel() for part in parts(kind, height, width).values())


class Quantized(nn.Module):
    """The weight of a projection; the projection knows which part of it is here."""

    codes: nn.Parameter
    scales: nn.Parameter
    constants: nn.Parameter | None

    def __init__(self, kind: str, height: int, width: int, device: torch.device | None = None) -> None:
        """Take memory for a whole weight, (height, width) = (outputs, inputs)."""
        super().__init__()
        self.kind, self.shape = kind, (height, width)
        self.parts = parts(kind, height, width)
        for name, part in self.parts.items():
            empty = torch.empty(part.shape, dtype=part.dtype, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        if "constants" not in self.parts:
            self.constants = None

    def forward(self, x: Float[Tensor, "*places in"], linear: Linear) -> Float[Tensor, "*places out"]:
        """Multiply with the part that `linear` has."""
        return _Product.apply(x, *self._read(linear))  # pyright: ignore[reportReturnType]

    @torch.no_grad()
    def dense(self, linear: Linear, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """Return the part that `linear` has, as it is multiplied with."""
        codes, scales, constants, place = self._read(linear)
        return decode(place, codes, scales, constants, dtype, codes)

    def _read(self, linear: Linear) -> tuple[Tensor, Tensor, Tensor | None, Place]:
        """Return the outputs that are computed here, by the inputs that are, and where they lie in the whole."""
        codes, scales = (linear.outputs(linear.held(tensor)) for tensor in (self.codes, self.scales))
        constants = None if self.constants is None else linear.held(self.constants)
        width = codes.shape[1] * self.shape[1] // self.parts["codes"].shape[1]
        place = Place(self.kind, *self.shape, linear.first_output(codes.shape[0]), linear.first_input(width))
        return codes, scales, constants, place


class _Product(torch.autograd.Function):
    """x W^T, and nothing but codes kept for its gradient; under FSDP they are freed and gathered again in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, constants: Tensor | None, place: Place) -> Tensor:
        ctx.save_for_backward(codes, scales, constants)
        ctx.place = place
        return F.linear(x, decode(place, codes, scales, constants, x.dtype, x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # pyright: ignore
        codes, scales, constants = ctx.saved_tensors
        return grad @ decode(ctx.place, codes, scales, constants, grad.dtype, grad), None, None, None, None


def _frozen_projections(model: nn.Module) -> dict[str, Linear]:
    """List the projections of the layers whose weights are frozen and dense, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Linear)
        and name.startswith("layers.")
        and module.quantized is None
        and not module.weight.requires_grad
    }
