"""LoRA's arithmetic against the formula written out with whole matrices, in fp64; and the masks of its dropout."""

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.adapters import AdapterConfig, MemberConfig, OverrideConfig
from configs.schema import ModelConfig
from models.adapters import attach
from models.adapters.lora import SITE, Lora, kept, site_numbers
from models.linear import Embedding, Linear, Marks
from models.llama import Llama

MODEL = ModelConfig(
    vocab_size=19, dim=12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=6, ffn_dim=10, max_seq_len=16,
    attention_bias=True,
)  # fmt: skip


def adapted(**fields: Any) -> Llama:
    """A small model with an adapter, all of it random."""
    torch.manual_seed(0)
    model = Llama(MODEL).double()
    attach(model, AdapterConfig(**({"kind": "lora", "rank": 3, "alpha": 5.0} | fields)))
    model.double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def projection(model: Llama, name: str = "q_proj") -> Linear:
    part = model.get_submodule(f"layers.1.self_attn.{name}")
    assert isinstance(part, Linear)
    return part


def factors(linear: Linear, member: str = "") -> tuple[Tensor, Tensor]:
    below = f".{member}" if member else ""
    a, b = (linear.get_parameter(f"lora_{which}{below}.weight") for which in "AB")
    return a, b


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def gradients(out: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return torch.autograd.grad((out * weights).sum(), inputs)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 5 / 3), (True, 5 / 3**0.5)])
def test_the_product_joins_the_projections(rslora: bool, scale: float) -> None:
    linear = projection(adapted(rslora=rslora))
    x = torch.randn(2, 4, 12, dtype=torch.float64, requires_grad=True)
    a, b = factors(linear)
    assert (a.shape, b.shape) == ((3, 12), (12, 3))
    expected = F.linear(x, linear.weight + scale * b @ a, linear.bias)
    same(linear(x), expected)
    for mine, theirs in zip(gradients(linear(x), [x, a, b]), gradients(expected, [x, a, b]), strict=True):
        same(mine, theirs)


def test_a_rank_and_a_scale_of_its_own() -> None:
    model = adapted(overrides=(OverrideConfig(targets=("k_proj",), rank=2, alpha=7.0),))
    linear = projection(model, "k_proj")
    x = torch.randn(1, 3, 12, dtype=torch.float64)
    a, b = factors(linear)
    assert a.shape == (2, 12)
    same(linear(x), F.linear(x, linear.weight + 7 / 2 * b @ a, linear.bias))


def test_dora_scales_each_output_and_takes_no_gradient_of_the_norm() -> None:
    linear = projection(adapted(dora=True))
    x = torch.randn(2, 4, 12, dtype=torch.float64, requires_grad=True)
    a, b = factors(linear)
    magnitude = linear.get_parameter("lora_magnitude_vector")
    whole = linear.weight + 5 / 3 * b @ a
    expected = F.linear(x, (magnitude / whole.detach().norm(dim=1))[:, None] * whole, linear.bias)
    same(linear(x), expected)
    inputs = [x, a, b, magnitude]
    for mine, theirs in zip(gradients(linear(x), inputs), gradients(expected, inputs), strict=True):
        same(mine, theirs)


def test_rows_of_an_embedding_are_looked_up_beside_it() -> None:
    embedding = adapted(targets=("embed_tokens",)).embed_tokens
    assert isinstance(embedding, Embedding)
    a, b = (embedding.get_parameter(f"lora_embedding_{which}") for which in "AB")
    tokens = torch.randint(19, (2, 5))
    expected = F.embedding(tokens, embedding.weight + 5 / 3 * (b @ a).T)
    same(embedding(tokens), expected)
    for mine, theirs in zip(gradients(embedding(tokens), [a, b]), gradients(expected, [a, b]), strict=True):
        same(mine, theirs)


MEMBERS = (MemberConfig(name="one"), MemberConfig(name="two", rank=1, alpha=2.0), MemberConfig(name="three", rank=4))


def test_each_members_rows_are_what_it_would_compute_alone() -> None:
    linear = projection(adapted(members=MEMBERS))
    x = torch.randn(6, 4, 12, dtype=torch.float64, requires_grad=True)
    scales = {"one": 5 / 3, "two": 2 / 1, "three": 5 / 4}
    parts = []
    for rows, (name, scale) in zip(x.chunk(3), scales.items(), strict=True):
        a, b = factors(linear, name)
        parts.append(F.linear(rows, linear.weight + scale * b @ a, linear.bias))
    expected = torch.cat(parts)
    same(linear(x), expected)
    inputs = [x, *(factor for name in scales for factor in factors(linear, name))]
    for mine, theirs in zip(gradients(linear(x), inputs), gradients(expected, inputs), strict=True):
        same(mine, theirs)


def test_only_the_factors_ask_for_gradients() -> None:
    model = adapted(targets=("q_proj", "lm_head"), bias="lora_only")
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    inside = [f"layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    both = {f"{name}.lora_{which}.weight" for name in [*inside, "lm_head"] for which in "AB"}
    assert names == both | {f"{name}.bias" for name in inside}


# ---- dropout


def places(batch: int, seq: int, first: int = 0) -> Tensor:
    return torch.arange(first, first + batch * seq).view(batch, seq)


def test_dropped_inputs_change_the_adapters_part_alone() -> None:
    linear = projection(adapted(dropout=0.25))
    site = torch.tensor([123456789])
    getattr(linear, SITE).copy_(site)
    x = torch.randn(2, 4, 12, dtype=torch.float64)
    a, b = factors(linear)
    mask = kept(places(2, 4), site, 0, 12, 0.25)
    dropped = torch.where(mask, x / 0.75, 0)
    expected = F.linear(x, linear.weight, linear.bias) + 5 / 3 * dropped @ a.T @ b.T
    same(linear(x, Marks(places=places(2, 4))), expected)
    # Without places nothing is trained, and nothing dropped.
    same(linear(x), F.linear(x, linear.weight + 5 / 3 * b @ a, linear.bias))


def test_doras_own_part_is_dropped_and_the_base_is_not() -> None:
    """As PEFT: m (W + s B A) x' + W (x - x') + bias, where x' is what is left of x."""
    linear = projection(adapted(dropout=0.25, dora=True))
    getattr(linear, SITE).fill_(5)
    x = torch.randn(2, 4, 12, dtype=torch.float64)
    a, b = factors(linear)
    whole = linear.weight + 5 / 3 * b @ a
    ratio = linear.get_parameter("lora_magnitude_vector") / whole.norm(dim=1)
    left = torch.where(kept(places(2, 4), torch.tensor([5]), 0, 12, 0.25), x / 0.75, 0)
    expected = F.linear(left, ratio[:, None] * whole) + F.linear(x - left, linear.weight, linear.bias)
    same(linear(x, Marks(places=places(2, 4))), expected)


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_the_share_that_stays_is_what_was_asked_for(rate: float) -> None:
    mask = kept(places(8, 64), torch.tensor([-(2**62)]), 0, 256, rate)
    count = mask.numel()
    assert mask.double().mean().item() == pytest.approx(1 - rate, abs=5 * (rate * (1 - rate) / count) ** 0.5)
    for dims in ((0, 1), (2,)):  # no position and no input is favoured
        means = mask.double().mean(dim=dims)
        spread = (rate * (1 - rate) * means.numel() / count) ** 0.5
        assert means.std().item() == pytest.approx(spread, rel=0.2)


def test_neighbours_and_other_projections_have_masks_of_their_own() -> None:
    def agreement(one: Tensor, other: Tensor) -> float:
        return (one == other).double().mean().item()

    first, second = site_numbers([7], "layers.0.mlp.up_proj"), site_numbers([7], "layers.0.mlp.gate_proj")
    whole = kept(places(4, 64), first, 0, 256, 0.5)
    others = [
        kept(places(4, 64), second, 0, 256, 0.5),
        kept(places(4, 64), site_numbers([8], "layers.0.mlp.up_proj"), 0, 256, 0.5),
        kept(places(4, 64, first=256), first, 0, 256, 0.5),  # the next step
        kept(places(4, 64, first=2**32), first, 0, 256, 0.5),
        whole.roll(1, dims=1),
        whole.roll(1, dims=2),
    ]
    for other in others:
        assert agreement(whole, other) == pytest.approx(0.5, abs=0.01)


def test_a_part_of_the_positions_and_inputs_has_its_part_of_the_mask() -> None:
    """As ranks have that share sequences or matrices."""
    site = site_numbers([3], "layers.1.mlp.down_proj")
    whole = kept(places(4, 8), site, 0, 12, 0.3)
    chosen = torch.tensor([0, 1, 6, 7])
    part = kept(places(4, 8)[2:, chosen], site, 8, 4, 0.3)
    assert torch.equal(part, whole[2:, chosen, 8:])


def test_members_masks_are_those_of_their_own_seeds() -> None:
    seeds, name = [4, 9], "layers.0.self_attn.v_proj"
    both = kept(places(4, 8), site_numbers(seeds, name), 0, 12, 0.4)
    for index, seed in enumerate(seeds):
        rows = slice(2 * index, 2 * index + 2)
        assert torch.equal(both[rows], kept(places(4, 8)[rows], site_numbers([seed], name), 0, 12, 0.4))


def test_a_compiled_mask_is_the_eager_one() -> None:
    """Integer arithmetic only, so that every compiler and device agrees."""
    graph = torch.compile(inspect.unwrap(kept), backend="aot_eager", fullgraph=True)
    site = torch.tensor([-5])
    assert torch.equal(graph(places(2, 8), site, 3, 9, 0.3), kept(places(2, 8), site, 3, 9, 0.3))


def test_the_forms_are_equal_for_equal_settings() -> None:
    """Modules of one scale share what computes them, so that blocks share a graph when compiled."""
    model = adapted(targets=("all-linear",))
    kinds = {module.beside for module in model.modules() if isinstance(module, Linear) and module.beside is not None}
    assert kinds == {Lora((5 / 3,), 0.0, False)}
