"""AdamW's groups, order and arithmetic."""

import math

import pytest
import torch
from torch import nn

from configs.errors import ConfigError
from configs.schema import OptimConfig
from engine.optim import build_optimizer, set_lr


class Small(nn.Module):
    """An embedding, a biased projection, a norm and a head tied to the embedding, declared out of name order."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.norm = nn.RMSNorm(4)
        self.embed = nn.Embedding(6, 4)
        self.lm_head = nn.Linear(4, 6, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.norm(self.proj(self.embed(tokens))))


def names_of(model: nn.Module, group: dict) -> list[str]:
    """The names of a group's parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for parameter in group["params"]]


def test_matrices_and_embeddings_decay_norms_and_biases_do_not() -> None:
    model = Small()
    decayed, undecayed = build_optimizer(model, OptimConfig(weight_decay=0.1)).param_groups
    assert (names_of(model, decayed), decayed["weight_decay"]) == (["embed.weight", "proj.weight"], 0.1)
    assert (names_of(model, undecayed), undecayed["weight_decay"]) == (["norm.weight", "proj.bias"], 0.0)


def test_frozen_parameters_are_left_out() -> None:
    model = Small()
    model.embed.weight.requires_grad_(False)
    model.proj.bias.requires_grad_(False)
    model.norm.weight.requires_grad_(False)
    (group,) = build_optimizer(model, OptimConfig()).param_groups
    assert names_of(model, group) == ["proj.weight"]


def test_refuses_a_model_without_trainable_parameters() -> None:
    model = Small().requires_grad_(False)
    with pytest.raises(ConfigError) as caught:
        build_optimizer(model, OptimConfig())
    assert str(caught.value) == ("optim: no parameter of the model is trainable. Unfreeze some, or add an adapter.")


def test_config_reaches_the_optimizer() -> None:
    config = OptimConfig(lr=1e-3, beta1=0.8, beta2=0.9, eps=1e-6)
    optimizer = build_optimizer(Small(), config)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (1e-3, (0.8, 0.9), 1e-6, True)


def test_falls_back_where_torch_has_no_fused_kernel() -> None:
    optimizer = build_optimizer(Small().to("meta"), OptimConfig())
    assert not optimizer.param_groups[0]["fused"]


def test_set_lr_sets_every_group_as_a_float() -> None:
    optimizer = build_optimizer(Small(), OptimConfig(lr=1.0))
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    assert all(type(group["lr"]) is float for group in optimizer.param_groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_three_steps_equal_the_textbook_update(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Small().to(dtype)
    config = OptimConfig(lr=1e-2, weight_decay=0.1)
    optimizer = build_optimizer(model, config)
    rates = [1e-2, 7e-3, 3e-3]
    expected = {name: parameter.detach().double().clone() for name, parameter in model.named_parameters()}
    first = {name: torch.zeros_like(value) for name, value in expected.items()}
    second = {name: torch.zeros_like(value) for name, value in expected.items()}
    for step, rate in enumerate(rates, start=1):
        model(torch.tensor([0, 1, 2, 3])).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            gradient = parameter.grad.double()
            decay = config.weight_decay if parameter.ndim >= 2 else 0.0
            first[name] = config.beta1 * first[name] + (1 - config.beta1) * gradient
            second[name] = config.beta2 * second[name] + (1 - config.beta2) * gradient**2
            mean, square = first[name] / (1 - config.beta1**step), second[name] / (1 - config.beta2**step)
            # AdamW, arXiv:1711.05101 algorithm 2
            expected[name] = expected[name] * (1 - rate * decay) - rate * mean / (square.sqrt() + config.eps)
        set_lr(optimizer, rate)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        error = (parameter.double() - expected[name]).norm() / expected[name].norm()
        assert error < math.sqrt(torch.finfo(dtype).eps) * (1e-2 if dtype == torch.float32 else 1e-6), name


def test_state_has_the_parameters_dtype() -> None:
    model = Small().double()
    optimizer = build_optimizer(model, OptimConfig())
    model(torch.tensor([1])).sum().backward()
    optimizer.step()
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.float64}
