"""What an [adapter] section means: names of the built model, patterns, overrides, members, what of it is trained."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from configs.adapters import AdapterConfig, MemberConfig, OverrideConfig
from configs.schema import ModelConfig
from configs.targets import adapted_modules, modules_of, parameter_names, projections, trained_parameters
from models.llama import Llama

MODEL = ModelConfig(vocab_size=64, dim=16, num_layers=12, num_heads=2, num_kv_heads=1, head_dim=8, ffn_dim=32)
LORA = AdapterConfig(kind="lora", rank=16, alpha=32.0)
LAYER_1 = [name for name in projections(MODEL) if name.startswith("layers.1.")]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("attention_bias", [False, True])
@pytest.mark.parametrize("mlp_bias", [False, True])
def test_names_are_those_of_the_model_in_its_order(tied: bool, attention_bias: bool, mlp_bias: bool) -> None:
    model = replace(MODEL, tie_embeddings=tied, attention_bias=attention_bias, mlp_bias=mlp_bias)
    with torch.device("meta"):
        built = Llama(model)
    assert parameter_names(model) == [name for name, _ in built.named_parameters()]
    linear = [name for name, module in built.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    assert projections(model) == linear


def test_a_target_is_a_word_or_a_pattern_over_whole_names() -> None:
    assert modules_of("all-linear", MODEL) == projections(MODEL)
    assert modules_of("q_proj", MODEL) == [f"layers.{layer}.self_attn.q_proj" for layer in range(12)]
    assert modules_of("layers.1.*", MODEL) == LAYER_1
    assert {name.split(".")[1] for name in modules_of("layers.1?.mlp.*", MODEL)} == {"10", "11"}
    assert modules_of("layers.[0-2].mlp.up_proj", MODEL) == [f"layers.{layer}.mlp.up_proj" for layer in range(3)]
    assert modules_of("lm_head", MODEL) == ["lm_head"]
    assert modules_of("*", MODEL) == projections(MODEL)  # embedding and head only by name


@pytest.mark.parametrize("target", ["", "Q_PROJ", "proj", "self_attn", "layers.1", "layers.12.*", "lm_head.*", "norm"])
def test_what_fits_no_projection_means_nothing(target: str) -> None:
    assert modules_of(target, MODEL) == []


def test_only_lora_adapts_modules() -> None:
    assert adapted_modules(MODEL, LORA) == dict.fromkeys(projections(MODEL), (16, 32.0))
    assert adapted_modules(MODEL, replace(LORA, kind="bottleneck")) == {}


def test_modules_come_in_the_models_order_whatever_the_targets_say() -> None:
    adapter = replace(LORA, targets=("lm_head", "layers.1.mlp.*", "layers.1.*", "embed_tokens"))
    assert list(adapted_modules(MODEL, adapter)) == ["embed_tokens", *LAYER_1, "lm_head"]


def test_the_last_override_that_fits_counts() -> None:
    overrides = (
        OverrideConfig(targets=("layers.1.*",), rank=4, alpha=8.0),
        OverrideConfig(targets=("v_proj", "k_proj"), rank=2),
    )
    adapter = replace(LORA, targets=("q_proj", "v_proj"), overrides=overrides)
    found = adapted_modules(MODEL, adapter)
    assert found["layers.0.self_attn.q_proj"] == (16, 32.0)
    assert found["layers.1.self_attn.q_proj"] == (4, 8.0)
    assert found["layers.1.self_attn.v_proj"] == (2, 32.0)
    assert "layers.1.self_attn.k_proj" not in found


def test_a_member_may_have_a_rank_and_an_alpha_of_its_own() -> None:
    override = OverrideConfig(targets=("layers.1.*",), rank=4, alpha=8.0)
    adapter = replace(LORA, overrides=(override,))
    assert adapted_modules(MODEL, adapter, MemberConfig(name="a")) == adapted_modules(MODEL, adapter)
    found = adapted_modules(MODEL, adapter, MemberConfig(name="a", rank=3))
    assert (found["layers.0.mlp.up_proj"], found["layers.1.mlp.up_proj"]) == ((3, 32.0), (3, 8.0))
    found = adapted_modules(MODEL, adapter, MemberConfig(name="a", alpha=1.0))
    assert (found["layers.0.mlp.up_proj"], found["layers.1.mlp.up_proj"]) == ((16, 1.0), (4, 1.0))


def test_what_of_the_base_is_trained_under_each_kind() -> None:
    model = replace(MODEL, num_layers=3, attention_bias=True)

    def trained(**settings: object) -> list[str]:
        return trained_parameters(model, AdapterConfig(**settings))  # pyright: ignore[reportArgumentType]

    names = parameter_names(model)
    biases = [name for name in names if name.endswith("bias")]
    assert trained() == names
    assert trained(kind="lora") == trained(kind="prompt") == trained(kind="bottleneck") == []
    assert trained(kind="bitfit") == biases
    assert len(biases) == 12
    lora_only = trained(kind="lora", bias="lora_only", targets=("layers.2.*", "lm_head"))
    assert lora_only == [name for name in biases if name.startswith("layers.2.")]
    assert trained(kind="freeze", last_layers=1) == [n for n in names if n.startswith(("layers.2.", "norm."))]
    assert trained(kind="freeze", trainable=("lm_head.*", "layers.0.mlp.*")) == [
        "layers.0.mlp.gate_proj.weight",
        "layers.0.mlp.up_proj.weight",
        "layers.0.mlp.down_proj.weight",
        "lm_head.weight",
    ]
    assert trained(kind="freeze", last_layers=3, trainable=("embed_tokens.*", "lm_head.*")) == names
