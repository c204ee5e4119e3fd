"""Hugging Face's config.json and our ModelConfig, both ways.

Only LlamaForCausalLM is read, and whatever would change the mathematics without our computing it (another activation,
another kind of rotary scaling, quantised weights) is refused by name: a wrong model that runs is worse than none.
Transformers 4 says `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`; both are read and both written.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.errors import CheckpointError, problem
from configs.schema import ModelConfig, RopeScalingConfig

ARCHITECTURE = "LlamaForCausalLM"

# ours -> theirs, for the fields that are the same number under another name
_RENAMED = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "init_std": "initializer_range",
}
# More than any model has: a number from a file decides how much is built, before the weights are looked at.
_MOST, _MOST_LAYERS, _MOST_NUMBER = 1 << 24, 1 << 12, 1e30
_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_seq_len": "original_max_position_embeddings",
}
# What transformers' LlamaConfig assumes where config.json is silent; None means it must be given.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": None,
    "hidden_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "intermediate_size": None,
    "num_key_value_heads": 0,
    "head_dim": 0,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "rope_theta": 10000.0,
}


def read_hf_config(folder: Path) -> ModelConfig:
    """Read `folder`/config.json; raise CheckpointError with every reason why it can't be used."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(problem(str(folder), "", "no such folder", do="Give the folder that holds config.json."))
    if not path.is_file():
        raise CheckpointError(
            problem(str(path), "", "no such file", "a Hugging Face model is a folder with a config.json in it")
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(problem(str(path), "", f"not readable as JSON: {error}", do="Fetch it again.")) from None
    if not isinstance(raw, dict):
        raise CheckpointError(problem(str(path), "", f"must be a JSON object, not a {type(raw).__name__}"))
    return model_config_from_hf(raw, str(path))


def model_config_from_hf(raw: Mapping[str, Any], where: str) -> ModelConfig:
    """Translate a parsed config.json; `where` names it in the CheckpointError that lists all problems."""
    problems = _unsupported(raw, where)
    if problems:  # of another architecture the other fields need not make sense
        raise CheckpointError("\n".join(problems))
    fields: dict[str, Any] = {}
    for ours, theirs in _RENAMED.items():
        fields[ours] = _field(raw, theirs, where, problems)
    rope = _rope_fields(raw)
    fields["rope_theta"] = float(_field(rope, "rope_theta", where, problems) or 0)
    fields["rope_scaling"] = _read_scaling(rope, where, problems)
    if problems:
        raise CheckpointError("\n".join(problems))
    fields["num_kv_heads"] = fields["num_kv_heads"] or fields["num_heads"]
    fields["head_dim"] = fields["head_dim"] or fields["dim"] // fields["num_heads"]
    if fields["num_heads"] % fields["num_kv_heads"]:
        heads = f"must divide num_attention_heads = {fields['num_heads']}"
        raise CheckpointError(problem(f"{where}: num_key_value_heads", fields["num_kv_heads"], heads))
    if fields["head_dim"] % 2:
        raise CheckpointError(
            problem(f"{where}: head_dim", fields["head_dim"], "must be even", "rotary positions turn pairs")
        )
    return ModelConfig(**fields)


def hf_config(config: ModelConfig, dtype: str, bos_id: int | None, eos_id: int | None) -> dict[str, Any]:
    """Give the config.json of a resolved config; `dtype` is torch's name of the stored format, such as `bfloat16`."""
    scaling = None
    if config.rope_scaling is not None:
        scaling = {"rope_type": "llama3"} | {k: getattr(config.rope_scaling, ours) for ours, k in _SCALING.items()}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        **{theirs: getattr(config, ours) for ours, theirs in _RENAMED.items()},
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pretraining_tp": 1,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": config.rope_theta} | (scaling or {"rope_type": "default"}),
        "torch_dtype": dtype,
        "use_cache": True,
    }


def _unsupported(raw: Mapping[str, Any], where: str) -> list[str]:
    """Whatever would make it another model than the one that we compute."""
    problems = []
    architectures = raw.get("architectures") or [ARCHITECTURE]
    if architectures != [ARCHITECTURE]:
        expected = f"must be ['{ARCHITECTURE}']"
        problems.append(problem(f"{where}: architectures", architectures, expected, "no other is computed here"))
    if raw.get("model_type", "llama") != "llama":
        problems.append(problem(f"{where}: model_type", raw["model_type"], "must be 'llama'"))
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        problems.append(
            problem(f"{where}: hidden_act", raw["hidden_act"], "must be 'silu'", "the feed-forward part is SwiGLU")
        )
    if raw.get("quantization_config"):
        problems.append(
            problem(
                f"{where}: quantization_config",
                "",
                "quantised weights can't be read",
                do="Use the folder with the original weights in bf16, fp16 or fp32.",
            )
        )
    rope = _rope_fields(raw)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        problems.append(
            problem(f"{where}: rope_type", kind, "must be 'default' or 'llama3'", "no other scaling is computed here")
        )
    rotated = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if rotated not in (None, 1.0):
        problems.append(
            problem(f"{where}: partial_rotary_factor", rotated, "must be 1.0", "whole heads are rotated here")
        )
    return problems


def _rope_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Both layouts as one flat table; transformers 5's wins where a file holds both."""
    fields = {}
    if raw.get("rope_theta") is not None:
        fields["rope_theta"] = raw["rope_theta"]
    for layout in ("rope_scaling", "rope_parameters"):
        if isinstance(raw.get(layout), Mapping):
            fields |= raw[layout]
    return fields


def _read_scaling(rope: Mapping[str, Any], where: str, problems: list[str]) -> RopeScalingConfig | None:
    if rope.get("rope_type", rope.get("type", "default")) == "default":
        return None
    values = {ours: _field(rope, theirs, f"{where}: rope", problems) for ours, theirs in _SCALING.items()}
    return RopeScalingConfig(**values) if None not in values.values() else None


def _field(raw: Mapping[str, Any], name: str, where: str, problems: list[str]) -> Any:
    """One value, of the type and sign that it must have; a problem is noted and None returned where it has not."""
    value = raw.get(name)
    if value is None:
        value = _DEFAULTS.get(name)
        if value is None:
            problems.append(problem(f"{where}: {name}", "", "missing", do="Fetch it again."))
        return value
    if name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        expected, good = "true or false", isinstance(value, bool)
    elif name in ("rms_norm_eps", "initializer_range", "rope_theta", "factor", "low_freq_factor", "high_freq_factor"):
        expected = "a positive number"
        good = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _MOST_NUMBER
    else:
        most = _MOST_LAYERS if name == "num_hidden_layers" else _MOST
        expected = f"a whole number from 1 to {most}"
        good = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most
    if good:
        return value
    problems.append(problem(f"{where}: {name}", value, f"must be {expected}"))
    return None
