"""The other kinds: what each trains, what it computes at its places, and that it starts as the base."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.adapters import AdapterConfig
from configs.schema import ModelConfig
from models.adapters import attach
from models.init import fill_local
from models.linear import Linear, Marks
from models.llama import Llama

MODEL = ModelConfig(
    vocab_size=19, dim=12, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, ffn_dim=10, max_seq_len=16,
    attention_bias=True,
)  # fmt: skip
TOKENS = torch.arange(20).view(2, 10) * 7 % 19


def drawn(**fields: Any) -> Llama:
    """A model as a run starts it."""
    model = Llama(MODEL)
    attach(model, AdapterConfig(**fields))
    model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            fill_local(parameter, MODEL, 1, name, shape, (0,) * len(shape))
    return model


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def marks(count: int, starts: tuple[int, ...] = (0,)) -> Marks:
    """Virtual tokens at `count` positions from each of the starts on."""
    virtual = torch.full_like(TOKENS, -1)
    for start in starts:
        virtual[:, start : start + count] = torch.arange(count)
    return Marks(virtual=virtual)


def test_without_a_kind_everything_is_trained() -> None:
    model = drawn(kind="none")
    assert trained(model) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("kind", ["bottleneck", "lora"])
def test_an_adapter_starts_as_the_base(kind: str) -> None:
    base, model = drawn(kind="none"), drawn(kind=kind)
    torch.testing.assert_close(model(TOKENS), base(TOKENS), rtol=0, atol=0)


def test_a_bottleneck_stands_behind_both_halves_of_each_layer() -> None:
    model = drawn(kind="bottleneck", bottleneck_dim=3)
    places = [f"layers.{layer}.{name}" for layer in range(3) for name in ("self_attn.o_proj", "mlp.down_proj")]
    parts = [f"bottleneck_{part}.{kind}" for part in ("down", "up") for kind in ("weight", "bias")]
    assert trained(model) == {f"{place}.{part}" for place in places for part in parts}
    linear = model.get_submodule("layers.0.self_attn.o_proj")
    assert isinstance(linear, Linear)
    down, up = linear.get_submodule("bottleneck_down"), linear.get_submodule("bottleneck_up")
    for parameter in [*down.parameters(), *up.parameters()]:
        nn.init.normal_(parameter)
    x = torch.randn(1, 4, 24, dtype=torch.float64)
    plain = F.linear(x, linear.weight, linear.bias)
    torch.testing.assert_close(linear(x), plain + up(F.gelu(down(plain))))


def test_a_prompt_is_the_embedding_of_its_positions() -> None:
    model = drawn(kind="prompt", num_virtual_tokens=3)
    assert trained(model) == {"embed_tokens.prompt_embeddings"}
    learned = model.embed_tokens.get_parameter("prompt_embeddings")
    found = model.embed_tokens(TOKENS, marks(3, (0, 6)))
    expected = F.embedding(TOKENS, model.embed_tokens.weight).clone()
    expected[:, 0:3] = learned
    expected[:, 6:9] = learned
    assert torch.equal(found, expected)
    assert torch.equal(model.embed_tokens(TOKENS), F.embedding(TOKENS, model.embed_tokens.weight))
    # Each vector has the gradients of all its places.
    (grad,) = torch.autograd.grad(found.sum(), [learned])
    assert torch.equal(grad, torch.full_like(learned, 4.0))


def seen_keys(model: Llama, layer: str, given: Marks | None) -> tuple[Tensor, Tensor]:
    """Keys and values that a layer's attention reads."""
    attention: Any = model.layers[layer].self_attn
    attend, seen = attention.attend, []

    def note(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
        seen.extend([k, v])
        return attend(q, k, v, documents)

    attention.attend = note
    model(TOKENS, marks=given)
    return seen[0], seen[1]


def test_a_prefix_takes_the_place_of_keys_after_rotation_and_of_values() -> None:
    model = drawn(kind="prefix", num_virtual_tokens=3)
    assert len(trained(model)) == 2 * 3
    with_them, without = seen_keys(model, "2", marks(3, (4,))), seen_keys(model, "2", None)
    for name, found, bare in zip(("k_proj", "v_proj"), with_them, without, strict=True):
        learned = model.get_parameter(f"layers.2.self_attn.{name}.prefix_tokens")
        expected = learned.view(3, 2, 6).transpose(0, 1).expand(2, 2, 3, 6)
        assert torch.equal(found[:, :, 4:7], expected), "the same wherever they stand"
        assert torch.equal(found[:, :, :4], bare[:, :, :4])


def test_what_stands_at_virtual_positions_is_read_by_nobody() -> None:
    """The tokens there are placeholders: others change nothing behind them."""
    for kind in ("prefix", "prompt"):
        model = drawn(kind=kind, num_virtual_tokens=3)
        other = TOKENS.clone()
        other[:, :3] = 5
        one, two = (model(tokens, marks=marks(3))[:, 3:] for tokens in (TOKENS, other))
        assert torch.equal(one, two), kind
        assert not torch.equal(one, model(other)[:, 3:]), kind


def test_bitfit_trains_biases_and_freeze_what_is_named() -> None:
    assert trained(drawn(kind="bitfit")) == {
        f"layers.{layer}.self_attn.{name}_proj.bias" for layer in range(3) for name in "qkvo"
    }
    last = {name for name, _ in drawn(kind="none").named_parameters() if name.startswith(("layers.2.", "norm."))}
    assert trained(drawn(kind="freeze", last_layers=1)) == last
    assert trained(drawn(kind="freeze", trainable=("lm_head.*", "layers.0.*norm.weight"))) == {
        "lm_head.weight",
        "layers.0.input_layernorm.weight",
        "layers.0.post_attention_layernorm.weight",
    }


def test_a_stage_gets_what_sits_on_its_own_modules() -> None:
    for kind in ("lora", "bottleneck", "prefix", "prompt"):
        model = Llama(MODEL)
        del model.layers["0"], model.layers["1"]
        model.embed_tokens = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
        attach(model, AdapterConfig(kind=kind))  # pyright: ignore[reportArgumentType]
        names = trained(model)
        assert all(name.startswith("layers.2.") for name in names)
        assert bool(names) == (kind != "prompt")
