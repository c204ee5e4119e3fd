"""Every optimizer on shards equals itself on whole tensors: updates, skipped steps, and a resume on other ranks.

Gradients are given, not computed, so that nothing but the optimizer can differ; then a real training in fp64.
"""

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from configs.schema import CheckpointConfig, Config, OptimConfig
from engine.checkpoint.checkpointer import Checkpointer
from engine.optim import build_optimizer, set_lr
from tests.ranks import run_ranks
from tests.training import Trained, layout_config, train_on
from tests.training import assert_same as assert_same_training

KINDS = ["adamw", "muon", "lion"]
SHARDED = {"2": (2,), "3, some empty": (3,), "hsdp 2x2": (2, 2)}
STEPS, SKIPPED = 5, (1, 3)


class Deep(nn.Module):
    """More matrices than ranks and of all proportions, with rows that divide by nothing, and biases and a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed_tokens = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 10), nn.Linear(10, 6), nn.Linear(6, 6), nn.Linear(6, 2)])
        self.norm = nn.RMSNorm(6)
        self.lm_head = nn.Linear(6, 11, bias=False)


def shard(model: nn.Module, shape: tuple[int, ...]) -> None:
    """FSDP2, or HSDP for two numbers, in a group a layer."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp_replicate", "dp_shard")[-len(shape) :])
    for layer in model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def shard_over_tp(model: nn.Module) -> None:
    """Tensor parallelism over 2 ranks of 4, by columns and by rows in turn, with FSDP2 over it."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    for index, layer in enumerate(model.layers):  # type: ignore[arg-type]
        weight = distribute_tensor(layer.weight.detach(), mesh["tp"], [Shard(index % 2)])
        layer.weight = nn.Parameter(weight)
        layer.bias = nn.Parameter(distribute_tensor(layer.bias.detach(), mesh["tp"], [Replicate()]))
        fully_shard(layer, mesh=mesh["fsdp"])
    fully_shard(model, mesh=mesh["fsdp"])


def give_gradients(model: nn.Module, step: int) -> None:
    """The same whole gradients on any layout, all NaN in a step that is to be skipped."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        grad = grad * math.nan if step in SKIPPED else grad
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            whole = DTensor.from_local(grad, mesh, [Replicate()] * mesh.ndim, run_check=False)
            grad = whole.redistribute(placements=parameter.placements)
        parameter.grad = grad


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        give_gradients(model, step)
        set_lr(optimizer, 1e-2 / (step + 1))
        before = parts(model, optimizer)
        optimizer.found_inf = torch.tensor(float(step in SKIPPED))  # type: ignore[attr-defined]
        optimizer.step()
        if step in SKIPPED:
            after = parts(model, optimizer)
            assert after.keys() == before.keys(), f"step {step}"
            for name, value in after.items():
                assert torch.equal(before[name], value), f"step {step} changed {name}"
        optimizer.zero_grad()


def parts(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """A copy of what this rank holds of the weights; and of their state, once there is some."""
    found = {}
    for name, parameter in model.named_parameters():
        state: dict[str, Any] = {"weight": parameter.detach(), **optimizer.state[parameter]}
        for key, value in state.items():
            found[f"{name} {key}"] = (value.to_local() if isinstance(value, DTensor) else value).clone()
    return found


def wholes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        state: dict[str, Any] = {"weight": parameter.detach(), **optimizer.state[parameter]}
        for key, value in state.items():
            assert not isinstance(parameter, DTensor) or key == "step" or value.placements == parameter.placements
            found[f"{name} {key}"] = (value.full_tensor() if isinstance(value, DTensor) else value).clone()
    return found


def build(kind: str, layout: tuple[int, ...] | str | None, dtype: torch.dtype) -> tuple[Deep, torch.optim.Optimizer]:
    model = Deep().to(dtype)
    if layout == "tp":
        shard_over_tp(model)
    elif layout is not None:
        shard(model, layout)  # type: ignore[arg-type]
    return model, build_optimizer(model, OptimConfig(kind=kind, weight_decay=0.2))  # type: ignore[arg-type]


def train_here(kind: str, layout: tuple[int, ...] | str | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model, optimizer = build(kind, layout, dtype)
    take_steps(model, optimizer, 0, STEPS)
    return wholes(model, optimizer)


def assert_same(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], bound: float) -> None:
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        error = ((found[name] - value).norm() / value.norm()).item()
        assert error <= bound, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [*SHARDED.values(), "tp"], ids=[*SHARDED, "fsdp 2 x tp 2"])
def test_shards_are_updated_like_whole_tensors(kind: str, layout: tuple[int, ...] | str) -> None:
    truth = train_here(kind, None, torch.float64)
    n = 4 if isinstance(layout, str) else math.prod(layout)
    for found in run_ranks(n, train_here, kind, layout, torch.float64):
        assert_same(found, truth, 1e-15)


def test_muon_in_fp32_is_the_same_bits_on_shards_given_the_same_gradients() -> None:
    """The bf16 of Newton-Schulz is no source of difference: each matrix is computed whole, once, by one rank."""
    truth = train_here("muon", None, torch.float32)
    hidden = [name for name in truth if name.startswith("layers") and ".weight " in name]
    assert hidden
    for found in run_ranks(2, train_here, "muon", (2,), torch.float32):
        for name in hidden:
            assert torch.equal(found[name], truth[name]), name


# -------------------- resuming


def save_half(folder: Path, kind: str) -> None:
    model, optimizer = build(kind, (dist.get_world_size(),), torch.float64)
    take_steps(model, optimizer, 0, 3)
    with Checkpointer(folder, CheckpointConfig(keep_last=10, keep_best=False)) as checkpointer:
        checkpointer.save(3, model, optimizer, {"step": 3, "num_tokens": 1}, None)
        checkpointer.wait()


def resume(folder: Path, kind: str, layout: tuple[int, ...] | None) -> dict[str, torch.Tensor]:
    model, optimizer = build(kind, layout, torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with Checkpointer(folder, CheckpointConfig(keep_last=10, keep_best=False)) as checkpointer:
        found = checkpointer.find_latest()
        assert found is not None, found
        checkpointer.load(found, model, optimizer)
    take_steps(model, optimizer, 3, STEPS)
    return wholes(model, optimizer)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_elsewhere_as_if_never_stopped(kind: str, tmp_path: Path) -> None:
    truth = train_here(kind, None, torch.float64)
    run_ranks(2, save_half, tmp_path, kind)
    for n, layout in ((1, None), (1, (1,)), (3, (3,))):
        for found in run_ranks(n, resume, tmp_path, kind, layout):
            assert_same(found, truth, 1e-15)


# -------------------- in a training


@functools.cache
def one_process(kind: str, format: str) -> Trained:
    return train_on(1, training_config(kind, format, {}))


def training_config(kind: str, format: str, parallel: dict[str, Any]) -> Config:
    return layout_config(3, optim={"kind": kind}, parallel=parallel, precision={"compute": format, "master": format})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n", "parallel"), [pytest.param(2, {}, marks=pytest.mark.long), (4, {"dp_replicate": 2})], ids=["2", "hsdp 2x2"]
)
def test_a_training_on_shards_equals_one_process(kind: str, n: int, parallel: dict[str, Any]) -> None:
    """Newton-Schulz takes the last digit of a gradient up by about 500 (3.44 ** 5): under Muon 1e-13, not 1e-15."""
    assert_same_training(train_on(n, training_config(kind, "fp64", parallel)), one_process(kind, "fp64"), 1e-10)


def test_muon_in_fp32_differs_by_bf16s_roundings_of_nearly_equal_gradients() -> None:
    found, truth = train_on(2, training_config("muon", "fp32", {})), one_process("muon", "fp32")
    assert found.losses == pytest.approx(truth.losses, rel=1e-5)
    for name, weight in truth.weights.items():
        assert (found.weights[name] - weight).norm() / weight.norm() < 5e-3, name
