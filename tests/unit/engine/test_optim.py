"""Groups, order and arithmetic of each kind of optimizer, what a skipped step leaves alone, and what is refused."""

import importlib.util
import math
from typing import Any

import pytest
import torch
from torch import nn

from configs.check import check
from configs.errors import ConfigError
from configs.load import config_from_dict
from configs.schema import OptimConfig
from engine.optim import STATE_TENSORS, build_optimizer, set_lr
from engine.optim.apex import find_kernel
from engine.optim.muon import orthogonalize


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


# -------------------- the other kinds

KINDS = ["adamw", "muon", "lion"]


class Deep(nn.Module):
    """Embedding, a tall, a wide and a square matrix, biases, a norm and an untied head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed_tokens = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 10), nn.Linear(10, 6), nn.Linear(6, 6)])
        self.norm = nn.RMSNorm(6)
        self.lm_head = nn.Linear(6, 11, bias=False)


def give_gradients(model: nn.Module, step: int, filler: float | None = None) -> None:
    """The same gradients for every copy of a model."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.grad = drawn if filler is None else torch.full_like(drawn, filler)


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Weights and state by name, copied."""
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        found |= {f"{name}.{key}": value.clone() for key, value in optimizer.state[parameter].items()}
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("filler", [math.nan, math.inf])
def test_a_skipped_step_changes_neither_weights_nor_state(kind: str, filler: float) -> None:
    model, twin = Deep(), Deep()
    optimizers = [build_optimizer(one, OptimConfig(kind=kind, lr=1e-2)) for one in (model, twin)]  # type: ignore[arg-type]
    for step in range(3):
        for one, optimizer in zip((model, twin), optimizers, strict=True):
            give_gradients(one, step)
            optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
            optimizer.step()
        before = snapshot(model, optimizers[0])
        give_gradients(model, step, filler)
        optimizers[0].found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
        optimizers[0].step()
        after, expected = snapshot(model, optimizers[0]), snapshot(twin, optimizers[1])
        assert before.keys() == after.keys() == expected.keys()
        for name, value in before.items():
            assert torch.equal(after[name], value), name
            assert torch.equal(expected[name], value), name
            assert value.isfinite().all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_first_step_that_is_skipped_leaves_zero_state(kind: str) -> None:
    model = Deep()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, OptimConfig(kind=kind))  # type: ignore[arg-type]
    give_gradients(model, 0, math.nan)
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert all(torch.equal(value, torch.zeros_like(value)) for value in optimizer.state[parameter].values()), name


def test_muon_takes_the_layers_matrices_and_adamw_the_rest() -> None:
    model = Deep()
    hidden, decayed, undecayed = build_optimizer(model, OptimConfig(kind="muon")).param_groups
    assert names_of(model, hidden) == ["layers.0.weight", "layers.1.weight", "layers.2.weight"]
    assert names_of(model, decayed) == ["embed_tokens.weight", "lm_head.weight"]
    assert names_of(model, undecayed) == ["layers.0.bias", "layers.1.bias", "layers.2.bias", "norm.weight"]
    assert [group["weight_decay"] for group in (hidden, decayed, undecayed)] == [0.1, 0.1, 0.0]


def test_muon_equals_torchs_bit_for_bit() -> None:
    model, twin = Deep(), Deep()
    config = OptimConfig(kind="muon", lr=1e-2, weight_decay=0.3, momentum=0.9)
    optimizer = build_optimizer(model, config)
    names = dict(twin.named_parameters())
    matrices = [names[f"layers.{layer}.weight"] for layer in range(3)]
    others = [parameter for parameter in names.values() if all(parameter is not one for one in matrices)]
    groups = [
        {"params": [p for p in others if p.ndim == 2], "weight_decay": 0.3},
        {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0},
    ]
    truth = [
        torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.3, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=1e-2, betas=(config.beta1, config.beta2), eps=config.eps, fused=True),
    ]
    for step, rate in enumerate([1e-2, 7e-3, 2e-3]):
        give_gradients(model, step)
        give_gradients(twin, step)
        set_lr(optimizer, rate)
        optimizer.step()
        for other in truth:
            set_lr(other, rate)
            other.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, names[name]), name


def test_muon_stays_in_fp64_and_makes_singular_values_near_one() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(40, 16, dtype=torch.float64)
    low, high = orthogonalize(matrix.bfloat16()), orthogonalize(matrix)
    assert (low.dtype, high.dtype) == (torch.bfloat16, torch.float64)
    values = torch.linalg.svdvals(high)
    assert values.min() > 0.6
    assert values.max() < 1.25
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    turned = left.T @ high @ right.T  # diagonal where the singular vectors are kept
    assert (turned - turned.diagonal().diag()).abs().max() < 1e-12
    assert 0 < (low.double() - high).norm() / high.norm() < 5e-2  # bf16 has three digits, and five steps blur the third


def test_muon_needs_a_hidden_matrix() -> None:
    model = Deep()
    model.layers.requires_grad_(False)
    with pytest.raises(ConfigError) as caught:
        build_optimizer(model, OptimConfig(kind="muon"))
    text = "optim.kind = 'muon': needs a trainable matrix besides embedding and head. Use 'adamw'."
    assert str(caught.value) == text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lion_equals_its_paper(dtype: torch.dtype) -> None:
    model = Deep().to(dtype)
    config = OptimConfig(kind="lion", weight_decay=0.5, beta1=0.9, beta2=0.99)
    optimizer = build_optimizer(model, config)
    expected = {name: parameter.detach().double().clone() for name, parameter in model.named_parameters()}
    momentum = {name: torch.zeros_like(value) for name, value in expected.items()}
    for step, rate in enumerate([1e-2, 7e-3, 2e-3]):
        give_gradients(model, step)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            gradient = parameter.grad.double()
            # arXiv:2302.06675 algorithm 2
            update = (config.beta1 * momentum[name] + (1 - config.beta1) * gradient).sign()
            decay = config.weight_decay if parameter.ndim >= 2 else 0.0
            expected[name] -= rate * (update + decay * expected[name])
            momentum[name] = config.beta2 * momentum[name] + (1 - config.beta2) * gradient
        set_lr(optimizer, rate)
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert optimizer.state[parameter]["exp_avg"].dtype == dtype
        error = (parameter.double() - expected[name]).norm() / expected[name].norm()
        assert error < (1e-6 if dtype == torch.float32 else 1e-14), name


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_as_large_as_the_table_says(kind: str) -> None:
    model = Deep()
    optimizer = build_optimizer(model, OptimConfig(kind=kind))  # type: ignore[arg-type]
    give_gradients(model, 0)
    optimizer.step()
    hidden, others = STATE_TENSORS[kind]
    for name, parameter in model.named_parameters():
        shaped = [value for value in optimizer.state[parameter].values() if value.shape == parameter.shape]
        assert len(shaped) == (hidden if name.startswith("layers") and parameter.ndim == 2 else others), name
        assert all(isinstance(value, torch.Tensor) for value in optimizer.state[parameter].values())


def test_apex_is_refused_without_a_gpu() -> None:
    with pytest.raises(ConfigError) as caught:
        build_optimizer(Deep(), OptimConfig(kind="apex"))
    assert str(caught.value) == "optim.kind = 'apex': needs CUDA devices, not cpu. Use 'adamw'."


@pytest.mark.skipif(importlib.util.find_spec("amp_C") is not None, reason="NVIDIA's apex is installed")
def test_apex_is_refused_where_it_is_not_installed() -> None:
    with pytest.raises(ConfigError) as caught:
        find_kernel(torch.device("cuda"))
    assert str(caught.value) == (
        "optim.kind = 'apex': NVIDIA's apex is not installed. Build NVIDIA's: git clone "
        "https://github.com/NVIDIA/apex && cd apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v "
        "--no-build-isolation . (PyPI's apex is another project), or use 'adamw'."
    )


def apex_kernel(
    skip: torch.Tensor, lists: list[list[torch.Tensor]], lr: torch.Tensor, beta1: float, beta2: float, eps: float,
    step: torch.Tensor, decoupled: int, corrected: int, decay: float, inv_scale: torch.Tensor,
) -> None:  # fmt: skip
    """What amp_C.multi_tensor_adam_capturable is read to do; the real one runs on CUDA only."""
    assert (decoupled, corrected, inv_scale.item(), step.dtype, skip.dtype) == (1, 1, 1.0, torch.int32, torch.int32)
    if skip.item():
        return
    for grad, weight, first, second in zip(*lists, strict=True):
        first.lerp_(grad, 1 - beta1)
        second.lerp_(grad.square(), 1 - beta2)
        root = (second / (1 - beta2 ** step.item())).sqrt() + eps
        weight.sub_(lr * (first / (1 - beta1 ** step.item()) / root + decay * weight))


def test_apex_is_called_with_local_parts_and_keeps_torchs_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.optim.apex.find_kernel", lambda device: apex_kernel)
    model, twin = Deep(), Deep()
    optimizer, truth = build_optimizer(model, OptimConfig(kind="apex")), build_optimizer(twin, OptimConfig())
    for step, skipped in enumerate([0.0, 1.0, 0.0]):
        for one, each in ((model, optimizer), (twin, truth)):
            give_gradients(one, step, math.nan if skipped else None)
            each.found_inf = torch.tensor(skipped)  # type: ignore[attr-defined]
            each.step()
    found, expected = snapshot(model, optimizer), snapshot(twin, truth)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-7), name


def test_apex_is_refused_where_its_kernel_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> None:
        apex_kernel(torch.zeros(1, dtype=torch.int32), *arguments[1:])  # doesn't see the flag

    def older(skip: torch.Tensor, lists: Any, lr: torch.Tensor) -> None:
        """Take other arguments."""

    for kernel, why in ((wrong, "its update differs from AdamW's by nan"), (older, "its kernel fails: ")):
        monkeypatch.setattr("engine.optim.apex.find_kernel", lambda device, kernel=kernel: kernel)
        with pytest.raises(ConfigError) as caught:
            build_optimizer(Deep(), OptimConfig(kind="apex"))
        text = str(caught.value)
        assert text.startswith(f"optim.kind = 'apex': this build of apex can't be used ({why}"), text
        assert text.endswith("). Use 'adamw'.")


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        ({"momentum": 0.9}, ["optim.momentum = 0.9: has no effect under optim.kind = 'adamw'. Remove it."]),
        (
            {"kind": "lion", "eps": 1e-6, "momentum": 0.5},
            [
                "optim.momentum = 0.5: has no effect under optim.kind = 'lion'. Remove it.",
                "optim.eps = 1e-06: has no effect under optim.kind = 'lion'. Remove it.",
            ],
        ),
        ({"kind": "muon", "momentum": 1.0}, ["optim.momentum = 1.0: must be at least 0 and less than 1."]),
        ({"kind": "muon", "momentum": 0.9, "eps": 1e-6}, []),
        ({"kind": "apex", "eps": 1e-6}, []),
    ],
)
def test_the_check_of_a_config(optim: dict[str, Any], expected: list[str]) -> None:
    model = {"vocab_size": 64, "dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 32}
    data = {"seq_len": 8, "global_batch_size": 2, "stores": [{"path": "unused"}]}
    tree = {"run": {"steps": 2}, "model": model, "data": data, "optim": optim}
    assert check(config_from_dict(tree, "test")) == expected


def test_apex_refuses_fp64_masters() -> None:
    model = {"vocab_size": 64, "dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 32}
    data = {"seq_len": 8, "global_batch_size": 2, "stores": [{"path": "unused"}]}
    tree = {"run": {"steps": 2}, "model": model, "data": data, "optim": {"kind": "apex"}}
    tree["precision"] = {"compute": "fp64", "master": "fp64"}
    expected = "optim.kind = 'apex': excludes precision.master = 'fp64' (its moments and its arithmetic are fp32)."
    assert check(config_from_dict(tree, "test")) == [f"{expected} Use 'adamw'."]
