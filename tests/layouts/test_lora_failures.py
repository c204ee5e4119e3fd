"""What goes wrong with adapters elsewhere, each with a test that it doesn't here.

Exchange, checkpoints and data have theirs where their other tests are.
"""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from configs.check import resolve
from configs.schema import CheckpointConfig, Config
from configs.targets import trained_parameters
from engine.build import build_passes
from engine.checkpoint.checkpointer import Checkpointer
from engine.fault.guard import Guard
from engine.optim import build_optimizer
from engine.step import train_step
from engine.weights import starting_weights
from models.linear import Linear
from parallel.apply import build_model
from parallel.mesh import Layout, build_layout
from tests.ranks import run_ranks
from tests.training import (
    Trained,
    adapted_batch,
    assert_same,
    layout_config,
    my_microbatches,
    train_each,
    train_on,
    whole,
)

LOWER = {"compute": "bf16", "master": "fp32"}
WIDE = {"num_layers": 2, "dim": 64, "num_heads": 4, "head_dim": 32, "ffn_dim": 128}


def a_config(adapter: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Config:
    given = {"model": {"num_layers": 2}, "data": {"micro_batch_size": 3}} | sections
    return layout_config(3, adapter={"kind": "lora", "rank": 4} | (adapter or {}), **given)


# ---- a first stage that trains nothing

LAST = {"kind": "freeze", "last_layers": 1}
TOP = {"kind": "lora", "rank": 4, "targets": ["layers.3.*"]}
SCHEDULES = ("1F1B", "GPipe", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")


def staged(adapter: dict[str, Any], **parallel: Any) -> Config:
    data = {"micro_batch_size": 1 if "dp_shard" in parallel else 3, "packing": "best_fit"}
    return layout_config(3, model={"num_layers": 4}, adapter=adapter, data=data, parallel=parallel)


@functools.cache
def whole_runs() -> dict[str, Trained]:
    return train_each(1, {"last": staged(LAST), "top": staged(TOP)}, documents=True)


@functools.cache
def staged_runs(n: int) -> dict[str, Trained]:
    more = {"pp": 2} | ({"dp_shard": 2} if n == 4 else {})
    adapters = {"last": LAST, "top": TOP | {"base": "replicated"}}
    schedules = SCHEDULES if n == 2 else SCHEDULES[-3:]
    configs = {
        f"{name} {schedule}": staged(adapter, schedule=schedule, **more)
        for name, adapter in adapters.items()
        for schedule in schedules
    }
    return train_each(n, configs, documents=True)


@pytest.mark.parametrize(
    ("n", "schedule"),
    [
        *((2, schedule) for schedule in SCHEDULES),
        *(pytest.param(4, schedule, marks=pytest.mark.long) for schedule in SCHEDULES[-3:]),
    ],
)
def test_a_frozen_first_stage_leaves_the_next_ones_gradients_whole(n: int, schedule: str) -> None:
    """torch leaves weight gradients of the next stage None under InterleavedZeroBubble, silently."""
    for name, truth in whole_runs().items():
        assert_same(staged_runs(n)[f"{name} {schedule}"], truth, 1e-10)


# ---- what is trained, and in which format


class Built:
    """A run's parts on this rank, and its steps."""

    def __init__(self, config: Config) -> None:
        self.config = resolve(config, dist.get_world_size())
        self.layout: Layout = build_layout(self.config.parallel, torch.device("cpu"))
        self.model: nn.Module = build_model(self.config, self.layout, starting_weights(self.config))
        self.optimizer = build_optimizer(self.model, self.config.optim, stage=self.config.parallel.pp > 1)
        _, self.forward_backward = build_passes(self.config, self.layout, self.model)

    def step(self, number: int) -> None:
        size = self.config.data.micro_batch_size
        batches = my_microbatches(adapted_batch(number, False, self.config), self.layout, size)
        guard = Guard(self.config.fault, 0, self.layout.device)
        train_step(self.model, self.optimizer, self.forward_backward, batches, 1e-2, 1.0, self.layout, guard)


def trained_after_layout(config: Config) -> set[str]:
    built = Built(config)
    built.step(0)
    return {name for name, parameter in built.model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("adapter", [{}, {"dora": True}, {"bias": "lora_only"}, LAST | {"rank": 16}], ids=str)
def test_tensor_parallelism_leaves_the_base_frozen(adapter: dict[str, Any]) -> None:
    """Making matrices distributed makes them trainable elsewhere."""
    biases = {"num_layers": 2, "attention_bias": True}
    config = a_config(adapter, model=biases, parallel={"tp": 2})
    names = run_ranks(2, trained_after_layout, config)
    assert names[0] == names[1]
    own = set(trained_parameters(config.model, config.adapter))
    assert own == {name for name in names[0] if "lora_" not in name}
    assert any("lora_" in name for name in names[0]) == (config.adapter.kind == "lora")


def formats_seen(config: Config) -> dict[str, set[str]]:
    """The formats of what projections take, give and multiply with, of masters, gradients and of what is frozen."""
    built = Built(config)
    seen: dict[str, set[str]] = {name: set() for name in ("x", "y", "factor", "master", "gradient", "frozen")}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen["x"].add(str(inputs[0].dtype))
        seen["y"].add(str(output.dtype))
        seen["factor"].add(str(module.lora_A.weight.dtype))  # pyright: ignore

    for module in built.model.modules():
        if isinstance(module, Linear) and module.beside is not None:
            module.register_forward_hook(note)
    size = built.config.data.micro_batch_size
    built.forward_backward(my_microbatches(adapted_batch(0, False, built.config), built.layout, size), torch.tensor(9))
    for parameter in built.model.parameters():
        seen["master" if parameter.requires_grad else "frozen"].add(str(parameter.dtype))
        if parameter.grad is not None:
            assert parameter.requires_grad
            seen["gradient"].add(str(parameter.grad.dtype))
    return seen


@pytest.mark.parametrize("base", ["sharded", "replicated"])
@pytest.mark.parametrize("parallel", [{"dp_shard": 2}, {"tp": 2}], ids=str)
def test_adapters_in_fp32_beside_a_base_in_bf16_compute_in_bf16(parallel: dict[str, Any], base: str) -> None:
    """Nothing is widened to the adapter's format, and no master is rounded to the base's."""
    for seen in run_ranks(2, formats_seen, a_config({"base": base}, precision=LOWER, parallel=parallel)):
        low, high = {"torch.bfloat16"}, {"torch.float32"}
        assert seen == {"x": low, "y": low, "factor": low, "frozen": low, "master": high, "gradient": high}


# ---- copies


def replicas_after_steps(config: Config) -> dict[str, tuple[tuple[int, ...], Tensor]]:
    """What this rank has of each trained parameter, and its place along the axes that cut it."""
    built = Built(config)
    for number in range(3):
        built.step(number)
    found = {}
    for name, parameter in built.model.named_parameters():
        if parameter.requires_grad:
            assert isinstance(parameter.data, DTensor)
            mesh = parameter.data.device_mesh
            where = mesh.get_coordinate()
            assert where is not None
            cut = tuple(
                at for at, placed in zip(where, parameter.data.placements, strict=True) if isinstance(placed, Shard)
            )
            found[name] = (cut, parameter.data.to_local().detach().clone())
    return found


@pytest.mark.parametrize("base", ["sharded", pytest.param("replicated", marks=pytest.mark.long)])
def test_copies_of_a_factor_are_the_same_bits_after_training(base: str) -> None:
    """In bf16, where ranks that forgot to add up their gradients, or added them up in another order, would show."""
    more = {"dora": True} if base == "sharded" else {"targets": ["all-linear", "embed_tokens"]}
    adapter = {"base": base, "dropout": 0.2} | more
    of_ranks = run_ranks(
        4, replicas_after_steps, a_config(adapter, precision=LOWER, parallel={"dp_replicate": 2, "tp": 2})
    )
    copies = 0
    for name in of_ranks[0]:
        held: dict[tuple[int, ...], Tensor] = {}
        for of_rank in of_ranks:
            cut, local = of_rank[name]
            copies += cut in held
            assert torch.equal(held.setdefault(cut, local), local), name
            assert local.abs().sum() > 0, f"{name} was not trained"
    # Of each pair of factors one is on 4 ranks and one on 2 x 2.
    assert copies >= (3 + 2) * 2 * 7


# ---- nothing to learn from


@pytest.mark.parametrize(
    ("model", "adapter"),
    [
        pytest.param({"num_layers": 2}, {"dropout": 0.5, "dora": True}, marks=pytest.mark.long),
        (WIDE, {"quantization": "nf4"}),
    ],
    ids=str,
)
def test_a_step_without_targets_leaves_the_adapter_as_it_was(model: dict[str, Any], adapter: dict[str, Any]) -> None:
    sections = {"model": model, "lr": {"schedule": "constant", "warmup_steps": 0}, "parallel": {"tp": 2}}
    config = a_config(adapter, **sections)
    found = train_on(2, config, all_ignored_at=2)
    shorter = train_on(2, replace(config, run=replace(config.run, steps=2)))
    assert found.skipped == [0.0, 0.0, 1.0]
    assert found.norms[2] == 0.0
    for name, weight in shorter.weights.items():
        assert torch.equal(found.weights[name], weight), name
        assert weight.isfinite().all()


# ---- a stage that trains nothing has nothing to save


def saved_and_read_again(config: Config, folder: Path) -> dict[str, Tensor]:
    """Train two steps with a checkpoint between, and again from it; what is trained, after a check of both."""
    first = Built(config)
    first.step(0)
    with Checkpointer(folder, CheckpointConfig()) as checkpointer:
        checkpointer.save(1, first.model, first.optimizer, {"step": 1, "num_tokens": 0})
        checkpointer.wait()
    first.step(1)
    again = Built(config)
    with Checkpointer(folder, CheckpointConfig()) as checkpointer:
        found = checkpointer.find_latest()
        assert found is not None
        checkpointer.load(found, again.model, again.optimizer)
    again.step(1)
    pairs = zip(first.model.named_parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(whole(mine), whole(theirs)) for (_, mine), theirs in pairs)
    return {name: whole(parameter) for name, parameter in first.model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("adapter", [LAST, {"kind": "prompt", "num_virtual_tokens": 3}], ids=lambda a: a["kind"])
def test_a_stage_without_anything_trained_saves_and_continues(adapter: dict[str, Any], tmp_path: Path) -> None:
    config = staged(adapter, pp=2)
    saved = run_ranks(2, saved_and_read_again, config, tmp_path)
    assert sorted(map(bool, saved)) == [False, True]


# ---- only the head is trained, which the loss multiplies with outside of the model

HEADS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4, "targets": ["lm_head"]},
    "extraction": {"kind": "freeze", "trainable": ["lm_head.*"]},
}
AT_TWO = [("dp_shard", "sharded"), ("dp_shard", "replicated"), ("tp", "sharded"), ("pp", "sharded")]


def head_config(name: str, base: str = "sharded", **sections: dict[str, Any]) -> Config:
    data = {"micro_batch_size": 3}
    return layout_config(3, model={"num_layers": 2}, adapter=HEADS[name] | {"base": base}, data=data, **sections)


@functools.cache
def head_runs(n: int) -> dict[str, Trained]:
    places = AT_TWO if n == 2 else [("dp_shard", "sharded")]
    return train_each(
        n,
        {
            f"{name} {axis} {base}": head_config(name, base=base, parallel={axis: n})
            for name in HEADS
            for axis, base in places
        },
    )


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(("axis", "base"), AT_TWO)
def test_a_head_alone_is_trained(name: str, axis: str, base: str) -> None:
    """FSDP2 waits for a gradient of the model's outputs, and there is none."""
    truth = head_runs(1)[f"{name} dp_shard sharded"]
    first = starting_weights(resolve(head_config(name), 1))
    for key in truth.grads:
        start = torch.empty_like(truth.weights[key])
        first(start, key, tuple(start.shape), (0,) * start.dim())
        assert not torch.equal(truth.weights[key], start), f"{key} stayed what it was"
    assert_same(head_runs(2)[f"{name} {axis} {base}"], truth, 1e-10)


@pytest.mark.parametrize("schedule", ["GPipe", "LoopedBFS"])
@pytest.mark.parametrize("base", ["sharded", "replicated"])
def test_lora_on_the_head_outlives_the_first_of_many_backward_passes(schedule: str, base: str) -> None:
    """All forward passes come first, and keep the gathered A; the first backward pass must not free it."""
    runs = head_schedules()
    assert_same(runs[f"{schedule} {base}"], head_under_many(), 1e-10)


@functools.cache
def head_schedules() -> dict[str, Trained]:
    return train_each(
        4,
        {
            f"{schedule} {base}": many(base, pp=2, dp_shard=2, schedule=schedule)
            for schedule in ("GPipe", "LoopedBFS")
            for base in ("sharded", "replicated")
        },
    )


@functools.cache
def head_under_many() -> Trained:
    return train_on(1, many("sharded"))


def many(base: str, **parallel: Any) -> Config:
    adapter = {"targets": ["q_proj", "lm_head"], "base": base}
    return a_config(adapter, model={"num_layers": 4}, data={"micro_batch_size": 1}, parallel=parallel)
