"""The optimizers of several members as one: what the train step and checkpoints see of them."""

import pytest
import torch
from torch import nn

from configs.adapters import AdapterConfig, MemberConfig
from configs.check import resolve
from configs.errors import ConfigError
from configs.schema import OptimConfig
from engine.optim import build_optimizer, set_lr
from engine.optim.members import MemberOptimizer
from models.adapters import attach
from models.llama import Llama
from tests.training import layout_config

MEMBERS = (MemberConfig(name="a", lr=2e-3), MemberConfig(name="q_proj", rank=2))


def adapted(members: tuple[MemberConfig, ...]) -> Llama:
    config = resolve(layout_config(2, model={"num_layers": 1}), 1)
    model = Llama(config.model)
    attach(model, AdapterConfig(kind="lora", targets=("q_proj",), members=members))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("kind", ["adamw", "muon", "lion"])
def test_a_skipped_member_stays_as_it_is_and_the_others_go_on(kind: str) -> None:
    """A member may be called like a module."""
    model = adapted(MEMBERS)
    optimizer = build_optimizer(model, OptimConfig(kind=kind, lr=1e-3), members=MEMBERS)  # pyright: ignore
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    second = {name for name in named if name.endswith(("lora_A.q_proj.weight", "lora_B.q_proj.weight"))}
    assert isinstance(optimizer, MemberOptimizer) and len(second) == 2
    assert {id(p) for p in optimizer.parameters[1]} == {id(named[name]) for name in second}
    assert len(optimizer.state) == 0 and optimizer.state.get(named[min(second)]) is None
    for skipped in ([0.0, 0.0], [0.0, 1.0]):
        weights = {name: p.detach().clone() for name, p in named.items()}
        kept = {name: {k: v.clone() for k, v in optimizer.state.get(p, {}).items()} for name, p in named.items()}
        for name, parameter in named.items():
            parameter.grad = torch.full_like(parameter, torch.nan if skipped[1] and name in second else 0.5)
        optimizer.found_inf = torch.tensor(skipped)  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
        for name, parameter in named.items():
            still = bool(skipped[1]) and name in second
            assert torch.equal(parameter, weights[name]) == still, name
            for key, value in optimizer.state[parameter].items():
                assert not still or torch.equal(value, kept[name][key]), f"{name}.{key}"
    assert set(optimizer.state) == set(named.values()) and len(optimizer.state) == 4
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in named.values())


def test_each_member_has_its_own_learning_rate_and_lora_plus_on_top() -> None:
    model = adapted(MEMBERS)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3), 4.0, MEMBERS)
    set_lr(optimizer, 5e-4)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(p)].split("q_proj.", 1)[1]: group["lr"] for group in optimizer.param_groups for p in group["params"]
    }
    assert found == pytest.approx(
        {"lora_A.a.weight": 1e-3, "lora_B.a.weight": 4e-3, "lora_A.q_proj.weight": 5e-4, "lora_B.q_proj.weight": 2e-3}
    )


def test_state_goes_in_by_parameter_and_not_by_a_state_dict() -> None:
    model = adapted(MEMBERS)
    optimizer = build_optimizer(model, OptimConfig(), members=MEMBERS)
    parameter = model.get_parameter("layers.0.self_attn.q_proj.lora_B.a.weight")
    optimizer.state[parameter] = {"step": torch.tensor(3.0)}
    assert list(optimizer.state) == [parameter] and optimizer.state[parameter]["step"] == 3
    del optimizer.state[parameter]
    assert len(optimizer.state) == 0
    with pytest.raises(NotImplementedError, match=r"the members' state is loaded by engine/checkpoint/state\.py"):
        optimizer.load_state_dict({})


@pytest.mark.parametrize("name", ["train", "half", "training"])
def test_a_name_that_torch_has_itself_is_refused(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        adapted((MEMBERS[0], MemberConfig(name=name)))
    why = "torch's modules have an attribute of that name"
    assert str(caught.value) == (
        f"adapter.members.1.name = {name!r}: can't be a member's name ({why}). Choose another."
    )
