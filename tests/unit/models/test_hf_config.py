"""config.json both ways: both rope layouts, defaults, and everything that is refused by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from configs.errors import CheckpointError
from configs.schema import ModelConfig, RopeScalingConfig
from models.hf_config import hf_config, model_config_from_hf, read_hf_config

SCALING = RopeScalingConfig(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)
CONFIG = ModelConfig(
    vocab_size=100,
    dim=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=40,
    max_seq_len=512,
    rope_theta=500000.0,
    rope_scaling=SCALING,
    norm_eps=1e-6,
    tie_embeddings=True,
    attention_bias=True,
    init_std=0.01,
)
MINIMAL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def read(**changes: Any) -> ModelConfig:
    return model_config_from_hf(MINIMAL | changes, "config.json")


def refusal(**changes: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(**changes)
    return str(caught.value)


@pytest.mark.parametrize("scaling", [None, SCALING])
def test_a_config_survives_the_way_there_and_back(scaling: RopeScalingConfig | None) -> None:
    config = replace(CONFIG, rope_scaling=scaling)
    assert model_config_from_hf(json.loads(json.dumps(hf_config(config, "float32", 1, 2))), "x") == config


def test_transformers_reads_what_we_write_and_we_read_what_it_writes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_config(CONFIG, "bfloat16", 1, 2)))
    theirs = LlamaConfig.from_pretrained(tmp_path)
    assert (theirs.hidden_size, theirs.num_key_value_heads, theirs.head_dim) == (24, 2, 8)
    assert theirs.rope_parameters == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.tie_word_embeddings) == (1, 2, True)
    theirs.save_pretrained(tmp_path / "saved")
    assert read_hf_config(tmp_path / "saved") == CONFIG


def test_the_old_rope_layout_is_read() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = read(rope_theta=500000.0, rope_scaling=scaling)
    assert config.rope_theta == 500000.0
    assert config.rope_scaling == RopeScalingConfig(factor=8.0, original_max_seq_len=8192)
    assert read(rope_theta=1e4, rope_scaling=scaling | {"type": "llama3"}).rope_scaling == config.rope_scaling


def test_the_new_rope_layout_wins_over_the_old() -> None:
    config = read(rope_theta=1.0, rope_parameters={"rope_type": "default", "rope_theta": 20000.0})
    assert (config.rope_theta, config.rope_scaling) == (20000.0, None)


def test_silent_fields_mean_what_transformers_assumes() -> None:
    theirs = LlamaConfig(**{k: v for k, v in MINIMAL.items() if k != "model_type"})
    config = read(rope_scaling=None, num_key_value_heads=None, head_dim=None)
    assert config.num_kv_heads == theirs.num_key_value_heads == 4
    assert config.head_dim == theirs.head_dim == 8
    assert config.max_seq_len == theirs.max_position_embeddings
    assert config.norm_eps == theirs.rms_norm_eps
    assert config.rope_theta == (theirs.rope_parameters or {}).get("rope_theta")
    assert (config.tie_embeddings, config.attention_bias, config.mlp_bias) == (False, False, False)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"architectures": ["MistralForCausalLM"], "vocab_size": None},
            "config.json: architectures = ['MistralForCausalLM']: must be ['LlamaForCausalLM'] "
            "(no other is computed here).",
        ),
        ({"model_type": "qwen2"}, "config.json: model_type = 'qwen2': must be 'llama'."),
        (
            {"hidden_act": "gelu"},
            "config.json: hidden_act = 'gelu': must be 'silu' (the feed-forward part is SwiGLU).",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "config.json: rope_type = 'linear': must be 'default' or 'llama3' (no other scaling is computed here).",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "config.json: rope_type = 'yarn': must be 'default' or 'llama3' (no other scaling is computed here).",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}},
            "config.json: rope: high_freq_factor: missing. Fetch it again.\n"
            "config.json: rope: original_max_position_embeddings: missing. Fetch it again.",
        ),
        (
            {"quantization_config": {"bits": 4}},
            "config.json: quantization_config: quantised weights can't be read. "
            "Use the folder with the original weights in bf16, fp16 or fp32.",
        ),
        (
            {"partial_rotary_factor": 0.5},
            "config.json: partial_rotary_factor = 0.5: must be 1.0 (whole heads are rotated here).",
        ),
        (
            {"vocab_size": None, "hidden_size": "big", "num_hidden_layers": 0, "tie_word_embeddings": "no"},
            "config.json: vocab_size: missing. Fetch it again.\n"
            "config.json: hidden_size = 'big': must be a whole number from 1 to 16777216.\n"
            "config.json: num_hidden_layers = 0: must be a whole number from 1 to 4096.\n"
            "config.json: tie_word_embeddings = 'no': must be true or false.",
        ),
        ({"num_key_value_heads": 3}, "config.json: num_key_value_heads = 3: must divide num_attention_heads = 4."),
        ({"head_dim": 7}, "config.json: head_dim = 7: must be even (rotary positions turn pairs)."),
        ({"rms_norm_eps": -1}, "config.json: rms_norm_eps = -1: must be a positive number."),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(changes: dict[str, Any], text: str) -> None:
    assert refusal(**changes) == text


def test_a_missing_or_broken_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone: no such folder\. Give the folder that holds config\.json\."):
        read_hf_config(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"config\.json: no such file \(a Hugging Face model is a folder"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not readable as JSON: .*Fetch it again\."):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json: must be a JSON object, not a list\."):
        read_hf_config(tmp_path)
