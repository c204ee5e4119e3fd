"""Quantised bases on several ranks and under the compiler: the same bits, the same gradients, nothing dense kept."""

from typing import Any, cast

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from configs.schema import ModelConfig, ParallelConfig, PrecisionConfig, RecomputeConfig
from models.init import initial_rows
from models.linear import Linear
from models.llama import Llama
from models.quantized import dequantize, quantize, quantize_frozen
from parallel.fsdp import DTYPES, shard
from parallel.materialise import materialise
from parallel.recompute import recompute
from parallel.tensor import split_tensors
from tests.ranks import run_ranks

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    vocab_size=36, dim=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, ffn_dim=256, max_seq_len=8
)
SEED = 5
TRAINED = ("embed_tokens.weight", "input_layernorm.weight")  # so that every layer's input has a gradient


def whole_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    return initial_rows(CONFIG, SEED, name, shape, 0, shape[0], torch.float64)


def fill(local: Tensor, name: str, shape: tuple[int, ...], offset: tuple[int, ...]) -> None:
    part = tuple(slice(begin, begin + size) for begin, size in zip(offset, local.shape, strict=True))
    module, _, key = name.partition(".quantized.")
    if not key:
        local.copy_(whole_weight(name, shape)[part])
        return
    shapes = {"q": (128, 128), "k": (64, 128), "v": (64, 128), "o": (128, 128), "gate": (256, 128), "up": (256, 128)}
    weight = whole_weight(f"{module}.weight", shapes.get(module.split(".")[-1].removesuffix("_proj"), (128, 256)))
    local.copy_(quantize(fill.kind, weight)[key][part])  # type: ignore[attr-defined]


def tokens() -> Tensor:
    return torch.randint(CONFIG.vocab_size, (2, 8), generator=torch.Generator().manual_seed(1))


def frozen_model(kind: str, dtype: torch.dtype) -> Llama:
    """A model on the meta device whose projections are quantised."""
    fill.kind = kind  # type: ignore[attr-defined]
    with torch.device("meta"):
        model = Llama(CONFIG).to(dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(TRAINED))
    quantize_frozen(model, kind)
    return model


def projections(model: nn.Module) -> dict[str, Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear) and module.quantized}


def dense_truth(kind: str, compute: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights that are multiplied with, and the gradients of a model that has them dense, on one process."""
    dtype = DTYPES[compute]
    fill.kind = kind  # type: ignore[attr-defined]
    model = Llama(CONFIG).to(dtype)
    weights = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight = whole_weight(name, tuple(parameter.shape))
            if name.endswith("_proj.weight"):
                weight = dequantize(kind, quantize(kind, weight), dtype)
                weights[name.removesuffix(".weight")] = weight
            parameter.copy_(weight)
            parameter.requires_grad_(name.endswith(TRAINED))
    model(tokens()).square().sum().backward()
    return weights, gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad: Any = parameter.grad
            found[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).double().clone()
    return found


def assert_same(found: dict[str, Tensor], truth: dict[str, Tensor], bound: float) -> None:
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        error = ((found[name] - value).norm() / value.norm()).item()
        assert error <= bound, f"{name}: relative error {error:.2e}"


def train_sharded(kind: str, compute: str, tp: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What every rank multiplies with in a gathered layer, and the gradients; under tp, weights by columns or rows."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks // tp, tp), mesh_dim_names=("fsdp", "tp"))
    model = frozen_model(kind, DTYPES[compute])
    if tp > 1:
        split_tensors(model, mesh["tp"])
    formats = PrecisionConfig(compute=compute, master=compute)  # type: ignore[arg-type]
    shard(model, list(model.layers.values()), mesh["fsdp"], ParallelConfig(), formats)
    materialise(model, CPU, fill)
    out = model(tokens())
    # Every rank has the whole batch, and gradients are summed over both axes.
    (out.square().sum() / ranks).backward()
    grads = gradients(model)
    weights = {}
    for layer in model.layers.values():
        cast(FSDPModule, layer).unshard()
    for name, linear in projections(model).items():
        weights[name] = linear.dense(DTYPES[compute]).clone()
    return weights, grads


@pytest.mark.parametrize(
    ("kind", "n", "compute"), [("nf4", 2, "bf16"), ("nf4", 3, "fp64"), ("int8", 2, "fp64"), ("float8", 3, "bf16")]
)
def test_shards_are_gathered_freed_and_gathered_again(kind: str, n: int, compute: str) -> None:
    """Three ranks have uneven parts of 64 and 128 rows; a layer's codes are freed between its two passes."""
    weights, grads = dense_truth(kind, compute)
    for found, found_grads in run_ranks(n, train_sharded, kind, compute, 1):
        assert found.keys() == weights.keys()
        for name, weight in weights.items():
            assert torch.equal(found[name], weight), name
        assert_same(found_grads, grads, 1e-13 if compute == "fp64" else 0.1)


@pytest.mark.parametrize(("kind", "n"), [("nf4", 2), ("nf4", 4), ("int8", 4)])
def test_rectangles_over_tp_are_those_of_the_whole(kind: str, n: int) -> None:
    kind_weights, grads = dense_truth(kind, "fp64")
    for rank, (found, found_grads) in enumerate(run_ranks(n, train_sharded, kind, "fp64", 2)):
        assert found.keys() == kind_weights.keys()
        for name, weight in kind_weights.items():
            dim = 1 if name.endswith(("o_proj", "down_proj")) else 0
            assert torch.equal(found[name], weight.chunk(2, dim=dim)[rank % 2]), name
        assert_same(found_grads, grads, 1e-12)


# -------------------- compiled


def train_traced(kind: str, compute: str, recomputed: bool) -> tuple[dict[str, Tensor], int, int]:
    """The gradients, the size of the largest tensor but parameters that is kept for them, and the number of graphs.

    What is kept is chosen before code is made, which takes long and is left out.
    """
    model = frozen_model(kind, DTYPES[compute])
    materialise(model, CPU, fill)
    graphs = torch._dynamo.utils.counters["stats"]
    if recomputed:
        recompute(list(model.layers.values()), RecomputeConfig(mode="full"))
    for layer in model.layers.values():
        layer.compile(fullgraph=True, dynamic=False, backend="aot_eager_decomp_partition")
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = [0]

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(tokens())
    out.square().sum().backward()
    return gradients(model), max(kept), graphs["unique_graphs"]


@pytest.mark.parametrize(
    ("kind", "recomputed"),
    [
        pytest.param("nf4", False, marks=pytest.mark.long),
        ("nf4", True),
        pytest.param("float8", False, marks=pytest.mark.long),
    ],
)
def test_one_graph_serves_all_layers_and_keeps_nothing_of_a_weight(kind: str, recomputed: bool) -> None:
    _, grads = dense_truth(kind, "fp64")
    ((found, kept, graphs),) = run_ranks(1, train_traced, kind, "fp64", recomputed)
    assert_same(found, grads, 1e-12)
    assert kept < 128 * 64  # the codes of q_proj; activations have 16 rows
    assert graphs == 1


def read_compiled() -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """Weights, as products and as gradients, by the compiler's code."""
    found = {}
    for kind, compute in COMPILED:
        model = frozen_model(kind, DTYPES[compute])
        materialise(model, CPU, fill)
        linear = cast(Linear, model.get_submodule("layers.0.self_attn.k_proj"))
        x = torch.eye(128, dtype=DTYPES[compute])[None].requires_grad_()
        out = torch.compile(linear, fullgraph=True, dynamic=False)(x)
        out.backward(F.pad(torch.eye(64, dtype=DTYPES[compute]), (0, 0, 0, 64))[None])
        assert x.grad is not None
        found[kind, compute] = out[0].T.detach(), x.grad[0, :64]
    return found


COMPILED = [("nf4", "bf16"), ("nf4", "fp64")]


def test_the_compiler_changes_no_bit_of_a_weight() -> None:
    """It skips roundings to bf16 where it can, and a weight would be off by 1e-3."""
    (found,) = run_ranks(1, read_compiled, timeout_s=300)
    for (kind, compute), weights in found.items():
        truth = dense_truth(kind, compute)[0]["layers.0.self_attn.k_proj"]
        for weight in weights:
            assert torch.equal(weight, truth), f"{kind} in {compute}"
