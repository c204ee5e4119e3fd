"""Presets against the published configs of the models that they are named after.

The literals are those of each model's config.json on the Hugging Face hub and the parameter count that its model card's
safetensors index gives; the count is computed by transformers, on the meta device, from the published config.
"""

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from configs.check import check, resolve
from configs.fields import default_of, walk
from configs.load import config_from_dict, config_to_dict, load_config, preset_names, to_toml
from configs.schema import Config, ModelConfig
from models.flops import num_params

CONFIGS = Path(__file__).parents[2] / "configs"
LLAMA_3 = {"vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 131072}
PUBLISHED = {
    "llama-2-7b": {  # meta-llama/Llama-2-7b-hf
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 32000,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "num_params": 6_738_415_616,
    },
    "llama-3.1-8b": {  # meta-llama/Llama-3.1-8B
        **LLAMA_3,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "rope_factor": 8.0,
        "num_params": 8_030_261_248,
    },
    "llama-3.1-70b": {  # meta-llama/Llama-3.1-70B
        **LLAMA_3,
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
        "rope_factor": 8.0,
        "num_params": 70_553_706_496,
    },
    "llama-3.1-405b": {  # meta-llama/Llama-3.1-405B
        **LLAMA_3,
        "hidden_size": 16384,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "intermediate_size": 53248,
        "rope_factor": 8.0,
        "num_params": 405_853_388_800,
    },
    "llama-3.2-1b": {  # meta-llama/Llama-3.2-1B
        **LLAMA_3,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "rope_factor": 32.0,
        "tie_word_embeddings": True,
        "num_params": 1_235_814_400,
    },
    "llama-3.2-3b": {  # meta-llama/Llama-3.2-3B
        **LLAMA_3,
        "hidden_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "rope_factor": 32.0,
        "tie_word_embeddings": True,
        "num_params": 3_212_749_824,
    },
    "tinyllama-1.1b": {  # TinyLlama/TinyLlama_v1.1
        "hidden_size": 2048,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "intermediate_size": 5632,
        "vocab_size": 32000,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "num_params": 1_100_048_384,
    },
    "smollm2-135m": {  # HuggingFaceTB/SmolLM2-135M
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "rope_theta": 100000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "initializer_range": 0.041666666666666664,
        "num_params": 134_515_008,
    },
}


def preset(name: str) -> Config:
    return load_config(CONFIGS / f"{name}.toml", [])


def num_gpus(name: str) -> int:
    """Read the number of ranks from the command in a preset's first line."""
    command = (CONFIGS / f"{name}.toml").read_text().splitlines()[0]
    numbers = [int(found) for found in re.findall(r"--(?:nodes|gpus-per-node|nproc-per-node) (\d+)", command)]
    assert numbers, f"{name}.toml: its first line names no number of ranks: {command}"
    return numbers[0] * (numbers[1] if len(numbers) > 1 else 1)


def published_shape(model: ModelConfig) -> dict[str, object]:
    """Write a model section in the words of a published config.json, resolved."""
    shape: dict[str, object] = {
        "hidden_size": model.dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "intermediate_size": model.ffn_dim,
        "vocab_size": model.vocab_size,
        "rope_theta": model.rope_theta,
        "max_position_embeddings": model.max_seq_len,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "rope_factor": None,
    }
    if model.rope_scaling is not None:
        shape["rope_factor"] = model.rope_scaling.factor
    return shape


@pytest.mark.parametrize("name", PUBLISHED)
def test_shape_is_the_published_one(name: str) -> None:
    published = {"tie_word_embeddings": False, "initializer_range": 0.02, "rope_factor": None, **PUBLISHED[name]}
    model = resolve(preset(name), num_gpus(name)).model
    assert published_shape(model) == {key: value for key, value in published.items() if key != "num_params"}
    assert model.norm_eps == 1e-5
    assert not model.attention_bias
    assert not model.mlp_bias
    assert model.head_dim * model.num_heads == model.dim


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("llama-3")])
def test_rope_scaling_is_the_published_one(name: str) -> None:
    scaling = preset(name).model.rope_scaling
    assert scaling is not None
    assert scaling.low_freq_factor == 1.0
    assert scaling.high_freq_factor == 4.0
    assert scaling.original_max_seq_len == 8192


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_number_of_parameters(name: str) -> None:
    published = dict(PUBLISHED[name])
    count = published.pop("num_params")
    published.pop("rope_factor", None)  # scales frequencies, which are no parameters
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**published))
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert num_params(resolve(preset(name), num_gpus(name)).model) == count


@pytest.mark.parametrize("name", preset_names())
class TestEveryPreset:
    def test_resolves_on_the_ranks_of_its_command(self, name: str) -> None:
        config = preset(name)
        assert check(config) == []
        resolved = resolve(config, num_gpus(name))
        assert resolve(resolved, num_gpus(name)) == resolved
        assert resolved.parallel.dp_replicate * resolved.parallel.dp_shard == num_gpus(name)

    def test_round_trips(self, name: str, tmp_path: Path) -> None:
        config = preset(name)
        copy = tmp_path / "copy.toml"
        copy.write_text(to_toml(config))
        assert load_config(copy, []) == config
        assert config_from_dict(config_to_dict(config), "here") == config

    def test_is_short_and_begins_with_its_command(self, name: str) -> None:
        lines = (CONFIGS / f"{name}.toml").read_text().splitlines()
        assert len(lines) <= 40
        assert re.match(r"# (torchrun|python) .*launchers/\w+\.py", lines[0])
        assert f"configs/{name}.toml" in lines[0]

    def test_is_named_after_its_file(self, name: str) -> None:
        assert preset(name).run.name == name

    def test_holds_deviations_only(self, name: str) -> None:
        tree = tomllib.loads((CONFIGS / f"{name}.toml").read_text())
        defaults = {leaf.key: default_of(leaf.field) for leaf in walk(Config)}
        given = {f"{section}.{key}": value for section, table in tree.items() for key, value in table.items()}
        assert [key for key, value in given.items() if value == defaults[key]] == []


@pytest.mark.parametrize("name", ["llama-3.1-8b-lora", "llama-3.1-8b-qlora"])
def test_adapters_of_a_published_model_have_its_shape(name: str) -> None:
    ours = preset(name).model
    assert replace(ours, init_from="") == preset("llama-3.1-8b").model
    assert ours.init_from


def test_the_lora_quickstart_has_the_quickstarts_shape() -> None:
    assert replace(preset("lora-quickstart").model, init_from="") == preset("quickstart").model


def test_debug_is_under_a_million_parameters() -> None:
    assert num_params(resolve(preset("debug"), 1).model) < 1_000_000


def test_quickstart_is_about_ten_million_parameters() -> None:
    assert 8_000_000 < num_params(resolve(preset("quickstart"), 2).model) < 12_000_000


@pytest.mark.parametrize("name", ["debug", "quickstart"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_small_presets_run_on_a_few_processes(name: str, ranks: int) -> None:
    assert resolve(preset(name), ranks).parallel.dp_shard == ranks
