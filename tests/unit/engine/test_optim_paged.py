"""bitsandbytes' 8-bit AdamW behind our contract: its bits, skipped steps, state that checkpoints hold, a refusal."""

import math
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from configs.errors import ConfigError
from configs.schema import CheckpointConfig, OptimConfig
from engine.checkpoint.checkpointer import Checkpointer
from engine.optim import STATE_TENSORS, build_optimizer, set_lr
from tests.ranks import run_ranks

CONFIG = OptimConfig(kind="paged_adamw_8bit", lr=1e-2, weight_decay=0.2)
RATES = [1e-2, 7e-3, 5e-3, 3e-3]


class Small(nn.Module):
    """A matrix whose moments take 8 bits, its last block a part of one, and a bias whose moments don't."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.proj = nn.Linear(70, 63)


def give_gradients(model: nn.Module, step: int, filler: float | None = None) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        grad = torch.randn(parameter.shape, generator=generator)
        grad = grad if filler is None else torch.full_like(grad, filler)
        if isinstance(parameter, DTensor):
            grad = DTensor.from_local(grad, parameter.device_mesh, parameter.placements, run_check=False)
        parameter.grad = grad


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        give_gradients(model, step)
        set_lr(optimizer, RATES[step])
        optimizer.step()
        optimizer.zero_grad()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        state: dict[str, Any] = {"weight": parameter.detach(), **optimizer.state.get(parameter, {})}
        for key, value in state.items():
            found[f"{name} {key}"] = (value.to_local() if isinstance(value, DTensor) else value).clone()
    return found


def assert_equal(found: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        assert torch.equal(found[name], value), name


def test_updates_are_bitsandbytes_own() -> None:
    from bitsandbytes.optim import PagedAdamW8bit

    model, twin = Small(), Small()
    take_steps(model, build_optimizer(model, CONFIG), 0, 4)
    groups = [{"params": [twin.proj.weight], "weight_decay": 0.2}, {"params": [twin.proj.bias], "weight_decay": 0.0}]
    theirs = PagedAdamW8bit(groups, lr=CONFIG.lr, betas=(CONFIG.beta1, CONFIG.beta2), eps=CONFIG.eps)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")
        take_steps(twin, theirs, 0, 4)
    assert_equal(dict(model.named_parameters()), dict(twin.named_parameters()))


def test_updates_are_adamws_within_8_bits() -> None:
    start, model, twin = Small(), Small(), Small()
    take_steps(model, build_optimizer(model, CONFIG), 0, 4)
    take_steps(twin, build_optimizer(twin, OptimConfig(lr=1e-2, weight_decay=0.2)), 0, 4)
    for name, exact in (("weight", 0.05), ("bias", 1e-5)):
        first, found, truth = (getattr(one.proj, name) for one in (start, model, twin))
        assert (found - truth).norm() < exact * (truth - first).norm(), name


@pytest.mark.parametrize("filler", [math.nan, math.inf])
def test_a_skipped_step_changes_neither_weights_nor_state(filler: float) -> None:
    model, twin = Small(), Small()
    optimizer, other = build_optimizer(model, CONFIG), build_optimizer(twin, CONFIG)
    start = snapshot(model, optimizer)
    for step in range(3):
        give_gradients(model, step, filler)
        optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
        optimizer.step()
        assert_equal(snapshot(model, optimizer), snapshot(twin, other) if step else start)
        optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
        take_steps(model, optimizer, step, step + 1)
        take_steps(twin, other, step, step + 1)
        assert_equal(snapshot(model, optimizer), snapshot(twin, other))


def test_state_is_tensors_alone_and_8_bits_wide() -> None:
    model = Small()
    optimizer = build_optimizer(model, CONFIG)
    take_steps(model, optimizer, 0, 2)
    weight, bias = optimizer.state[model.proj.weight], optimizer.state[model.proj.bias]
    assert {key: (value.dtype, tuple(value.shape)) for key, value in weight.items()} == {
        "step": (torch.float32, ()),
        "state1": (torch.uint8, (63, 70)),
        "state2": (torch.uint8, (63, 70)),
        "absmax1": (torch.float32, (18,)),
        "absmax2": (torch.float32, (18,)),
    }
    assert {key: value.dtype for key, value in bias.items()} == dict.fromkeys(
        ("step", "state1", "state2"), torch.float32
    )
    assert weight["step"] == bias["step"] == 2
    assert STATE_TENSORS["paged_adamw_8bit"] == (0, 0)


def build(sharded: bool) -> tuple[Small, torch.optim.Optimizer]:
    """The model, plain or wrapped by FSDP on its one rank."""
    model = Small()
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return model, build_optimizer(model, CONFIG)


def save_and_resume(folder: Path, saved: bool, resumed: bool) -> dict[str, Tensor]:
    model, optimizer = build(saved)
    take_steps(model, optimizer, 0, 2)
    config = CheckpointConfig(keep_last=10, keep_best=False)
    with Checkpointer(folder, config) as checkpointer:
        checkpointer.save(2, model, optimizer, {"step": 2, "num_tokens": 1}, None)
        checkpointer.wait()
    model, optimizer = build(resumed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with Checkpointer(folder, config) as checkpointer:
        found = checkpointer.find_latest()
        assert found is not None
        checkpointer.load(found, model, optimizer)
    take_steps(model, optimizer, 2, 4)
    return snapshot(model, optimizer)


def resume_all(folder: Path) -> list[dict[str, Tensor]]:
    wrapped = [(False, False), (False, True), (True, False), (True, True)]
    return [save_and_resume(folder / f"{saved} {resumed}", saved, resumed) for saved, resumed in wrapped]


def test_a_run_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    model, optimizer = build(sharded=False)
    take_steps(model, optimizer, 0, 4)
    (resumed,) = run_ranks(1, resume_all, tmp_path)
    for found in resumed:
        assert_equal(found, snapshot(model, optimizer))


def test_refused_where_bitsandbytes_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError) as caught:
        build_optimizer(Small(), CONFIG)
    assert str(caught.value) == (
        "optim.kind = 'paged_adamw_8bit': bitsandbytes is not installed. Install it with pip install -e '.[qlora]', or "
        "use 'adamw'."
    )
