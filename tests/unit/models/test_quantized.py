"""Quantised weights against torchao's NF4 and against plain arithmetic: bits, rectangles, gradients, bytes."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.errors import CheckpointError
from configs.schema import ModelConfig
from models import quantized_formats
from models.linear import Linear
from models.llama import Llama
from models.quantized import (
    Quantized,
    can_quantize,
    dequantize,
    held_bytes,
    left_in_16_bits,
    quantize,
    quantize_frozen,
)
from models.quantized_formats import scale_block

KINDS = ["nf4", "int8", "float8"]
SHAPES = [(96, 128), (20, 64), (7, 192), (256, 4096)]
"""Scales a factor: 64, 4, 1 and 256."""


def drawn(height: int, width: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A weight whose rows differ in size, as those of real models do."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(height, 1, generator=generator) + 0.1
    return (torch.randn(height, width, generator=generator) * rows * 0.02).to(dtype)


class Part(Linear):
    """A projection that holds a rectangle of a weight, as a rank of tensor parallelism does."""

    rows: slice
    columns: slice

    def held(self, parameter: Tensor) -> Tensor:
        sides = next(self.sides[f"quantized.{n}"] for n, p in self.quantized.named_parameters() if p is parameter)  # type: ignore[union-attr]
        for dim, (side, whole) in enumerate(zip(sides, parameter.shape, strict=True)):
            part, count = {"out": (self.rows, self.out_features), "in": (self.columns, self.in_features)}.get(
                side or "", (slice(0, whole), whole)
            )
            parameter = parameter.narrow(  # type: ignore[assignment]
                dim, part.start * whole // count, (part.stop - part.start) * whole // count
            )
        return parameter

    def first_output(self, count: int) -> int:
        return self.rows.start

    def first_input(self, width: int) -> int:
        return self.columns.start


def holding(kind: str, weight: Tensor, rows: slice | None = None, columns: slice | None = None) -> Linear:
    """A projection with the weight quantised, or a rectangle of it."""
    height, width = weight.shape
    owner = nn.Module()
    linear = Linear(width, height, bias=False).requires_grad_(False)
    owner.layers = nn.ModuleDict({"0": linear})
    quantize_frozen(owner, kind)
    for name, value in quantize(kind, weight).items():
        getattr(linear.quantized, name).copy_(value)
    if rows or columns:
        linear.__class__ = Part
        linear.rows = rows or slice(0, height)  # type: ignore[assignment]
        linear.columns = columns or slice(0, width)  # type: ignore[assignment]
    return linear


def torchaos(weight: Tensor) -> Any:
    from torchao.quantization import to_nf4

    return to_nf4(weight, 64, scale_block(*weight.shape))


# -------------------- bits


@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_is_torchaos_bit_for_bit(shape: tuple[int, int]) -> None:
    weight = drawn(*shape)
    theirs, ours = torchaos(weight), quantize("nf4", weight)
    assert torch.equal(ours["codes"].flatten(), theirs.quantized_data)
    assert torch.equal(ours["scales"].flatten(), theirs.quantized_scalers)
    constants = torch.cat([theirs.quantization_factor, theirs.scaler_mean[None], theirs.nf4])
    assert torch.equal(ours["constants"], constants)
    read = dequantize("nf4", ours, torch.bfloat16)
    assert torch.equal(read, theirs.get_original_weight())
    assert 0.05 < (read.float() - weight.float()).norm() / weight.float().norm() < 0.1


def test_every_bf16_has_torchaos_nearest_level() -> None:
    """Ties, which bf16's rounding of distances makes many of, included."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    inside = values[values.abs() <= 1]
    # A one in each block, its scale, and 63 of the values.
    weight = torch.ones(-(-len(inside) // 63), 64, dtype=torch.bfloat16)
    weight[:, 1:] = F.pad(inside, (0, len(weight) * 63 - len(inside))).view(-1, 63)
    assert torch.equal(quantize("nf4", weight)["codes"].flatten(), torchaos(weight).quantized_data)


def test_pieces_do_not_change_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = drawn(37, 192)
    wholes = {kind: quantize(kind, weight) for kind in KINDS}
    monkeypatch.setattr(quantized_formats, "ENCODED_AT_ONCE", 5 * 192)
    for kind, whole in wholes.items():
        for name, value in quantize(kind, weight).items():
            assert torch.equal(value, whole[name]), f"{kind} {name}"


def test_the_bits_do_not_depend_on_the_number_of_threads() -> None:
    weight, threads = drawn(1024, 4096), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(quantize("nf4", weight))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(other[name], value) for name, value in found[0].items())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_quantised_is_the_bf16_rounding(kind: str) -> None:
    precise = drawn(32, 64, dtype=torch.float64)
    found, truth = quantize(kind, precise), quantize(kind, precise.to(torch.bfloat16))
    assert all(torch.equal(found[name], value) for name, value in truth.items())
    for dtype in (torch.float32, torch.float64):
        read = dequantize(kind, found, dtype)
        assert read.dtype == dtype
        assert torch.equal(read, dequantize(kind, truth, torch.bfloat16).to(dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_rectangle_reads_the_bits_of_the_whole(kind: str, shape: tuple[int, int]) -> None:
    height, width = shape
    weight = drawn(height, width)
    whole = dequantize(kind, quantize(kind, weight), torch.bfloat16)
    for rows in (slice(0, height // 2), slice(height // 2, height), slice(3, 4)):
        read = holding(kind, weight, rows=rows)
        assert torch.equal(read.dense(torch.bfloat16), whole[rows]), rows
    for columns in (slice(0, 64), slice(width - 64, width)):
        part = holding(kind, weight, columns=columns)
        assert torch.equal(part.dense(torch.bfloat16), whole[:, columns]), columns
        assert torch.equal(
            holding(kind, weight, slice(3, 5), columns).dense(torch.float32), whole[3:5, columns].float()
        )


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind: str) -> None:
    """torchao reads a block of zeros as minus the error of its scale."""
    weight = drawn(64, 128)
    weight[5, 64:] = 0
    weight[9] = 0
    read = dequantize(kind, quantize(kind, weight), torch.bfloat16)
    assert not read[5, 64:].any()
    assert not read[9].any()
    assert read.isfinite().all()
    assert not dequantize(kind, quantize(kind, torch.zeros(8, 64)), torch.bfloat16).any()


def test_equal_scales_read_as_their_mean() -> None:
    weight = torch.full((8, 64), 0.5)
    assert torch.equal(dequantize("nf4", quantize("nf4", weight), torch.float32), weight)


def test_int8_is_the_nearest_of_255_steps_a_row() -> None:
    weight = drawn(33, 70)
    found = quantize("int8", weight)
    scale = (weight.abs().amax(dim=1, keepdim=True) / 127).bfloat16()
    assert torch.equal(found["scales"], scale)
    read = dequantize("int8", found, torch.float32)
    # Half a step, and bf16's rounding of the quotient and of the product.
    assert ((read - weight.float()).abs() <= scale.float() * 0.5 + 2**-8 * weight.float().abs() * 2).all()
    assert (read - weight.float()).norm() / weight.float().norm() < 0.01


def test_float8_is_e4m3_of_each_row() -> None:
    weight = drawn(33, 70)
    found = quantize("float8", weight)
    scale = (weight.abs().amax(dim=1, keepdim=True) / 448).bfloat16()
    assert torch.equal(found["scales"], scale)
    values = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(found["codes"], values.view(torch.uint8))
    assert torch.equal(dequantize("float8", found, torch.bfloat16), values.bfloat16() * scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused_by_name(kind: str, value: float) -> None:
    weight = drawn(32, 64)
    weight[3, 4] = value
    with pytest.raises(CheckpointError) as caught:
        quantize(kind, weight, "layers.0.mlp.up_proj.weight")
    assert str(caught.value) == (
        "layers.0.mlp.up_proj.weight: holds an infinity or a NaN, and is to be quantised"
        " (a scale would make numbers of it that look like weights)."
    )


# -------------------- products


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_product_and_gradient_are_those_of_the_dense_weight(kind: str, dtype: torch.dtype) -> None:
    linear = holding(kind, drawn(48, 128))
    x, upstream = torch.randn(2, 5, 128, dtype=dtype), torch.randn(2, 5, 48, dtype=dtype)
    found = x.clone().requires_grad_()
    truth = x.clone().requires_grad_()
    out = linear(found)
    out.backward(upstream)
    expected = F.linear(truth, dequantize(kind, quantize(kind, drawn(48, 128)), dtype))
    expected.backward(upstream)
    assert torch.equal(out, expected)
    assert found.grad is not None
    assert truth.grad is not None
    assert torch.equal(found.grad, truth.grad)
    assert all(parameter.grad is None for parameter in linear.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_backward_pass_keeps_nothing_but_the_codes(kind: str) -> None:
    linear = holding(kind, drawn(48, 128))
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(1, 5, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        linear(x)
    held = {parameter.untyped_storage().data_ptr() for parameter in linear.parameters()}
    assert kept
    assert all(tensor.untyped_storage().data_ptr() in held for tensor in kept)


# -------------------- which, and how many bytes

CONFIG = ModelConfig(vocab_size=32, dim=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, ffn_dim=96)


def model() -> Llama:
    with torch.device("meta"):
        return Llama(replace(CONFIG)).requires_grad_(False)


def quantized(module: nn.Module) -> Iterator[str]:
    return (name for name, part in module.named_modules() if isinstance(part, Quantized))


def test_frozen_projections_of_layers_are_quantised_and_others_listed() -> None:
    llama = model()
    llama.layers["1"].requires_grad_(True)
    assert left_in_16_bits(llama, "nf4") == ["layers.0.mlp.down_proj"]
    quantize_frozen(llama, "nf4")
    expected = [f"layers.0.self_attn.{one}_proj.quantized" for one in "qkvo"]
    expected += [f"layers.0.mlp.{one}_proj.quantized" for one in ("gate", "up")]
    assert list(quantized(llama)) == expected
    assert left_in_16_bits(llama, "nf4") == ["layers.0.mlp.down_proj"]
    names = [name for name, _ in llama.get_submodule("layers.0.self_attn.q_proj").named_parameters()]
    assert names == ["quantized.codes", "quantized.scales", "quantized.constants"]
    assert llama.get_parameter("layers.0.mlp.down_proj.weight").shape == (64, 96)
    assert not any(parameter.requires_grad for parameter in llama.layers["0"].parameters())


def test_nothing_is_quantised_unasked() -> None:
    llama = model()
    quantize_frozen(llama, "none")
    assert list(quantized(llama)) == left_in_16_bits(llama, "none") == []
    assert not can_quantize("none", 64, 64)


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4.126), ("int8", 8.0011), ("float8", 8.0011)])
def test_bits_of_a_parameter(kind: str, bits: float) -> None:
    assert held_bytes(kind, 4096, 14336) * 8 / (4096 * 14336) == pytest.approx(bits, abs=1e-4)
    with torch.device("meta"):
        module = Quantized(kind, 96, 128)
    assert sum(part.nbytes for part in module.parameters()) == held_bytes(kind, 96, 128)


def test_what_is_not_quantised_has_16_bits() -> None:
    assert held_bytes("nf4", 64, 96) == held_bytes("none", 64, 96) == 64 * 96 * 2
