"""PEFT's adapter_config.json and our [adapter] section, both ways.

Kinds that PEFT has too: lora, prompt (PROMPT_TUNING) and prefix (PREFIX_TUNING). Only the fields that a reader needs
are written, since older versions refuse fields that they don't know. Read, every field that would change the
mathematics without our computing it is refused by name; so is a field that nobody here knows, unless it is empty.
Source: peft 0.21.2, tuners/lora/config.py, tuners/lora/model.py (how patterns meet names), peft_model.py.
"""

import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.adapters import AdapterConfig, MemberConfig, OverrideConfig
from configs.errors import CheckpointError, problem
from configs.schema import ModelConfig
from configs.targets import ALL_LINEAR, EMBEDDING, HEAD, adapted_modules, projections
from models.hf_weights import hf_name
from models.module_patterns import compile_patterns

CONFIG = "adapter_config.json"
PROMPT = "embed_tokens.prompt_embeddings"
MAX_CONFIG_BYTES = 1 << 20

_TYPES = {"LORA": "lora", "PROMPT_TUNING": "prompt", "PREFIX_TUNING": "prefix"}
_READ = {
    "LORA": {"r", "target_modules", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora", "rank_pattern"}
    | {"alpha_pattern", "init_lora_weights"},
    "PROMPT_TUNING": {"num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads"},
    # What a projection computes is stored, not the projection.
    "PREFIX_TUNING": {"num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "prefix_projection"},
}
# Of how an adapter was made or named; what was made of it is in the tensors.
_WITHOUT_EFFECT = {"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version"}
_WITHOUT_EFFECT |= {"auto_mapping", "runtime_config", "megatron_core", "qalora_group_size", "encoder_hidden_size"}
_WITHOUT_EFFECT |= {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}
_WITHOUT_EFFECT |= {"init_weights", "eva_config"}
# Of PEFT 0.21.2; what a field that is in none of these lists does, nobody here knows.
_NOT_COMPUTED = {"modules_to_save", "layers_to_transform", "layers_pattern", "exclude_modules", "fan_in_fan_out"}
_NOT_COMPUTED |= {"lora_bias", "trainable_token_indices", "target_parameters", "layer_replication", "use_qalora"}
_NOT_COMPUTED |= {"alora_invocation_tokens", "ensure_weight_tying", "megatron_config", "use_bdlora", "arrow_config"}
_NOT_COMPUTED |= {"loftq_config", "corda_config", "lora_ga_config", "kasa_config", "monteclora_config", "velora_config"}
_EMPTY: tuple[Any, ...] = (None, False, {}, [])
# Drawn without touching the base's weights, as others (pissa, olora, corda, loftq) do.
_INITS = (None, True, False, "gaussian", "orthogonal", "eva")


def adapter_of(adapter: AdapterConfig, member: MemberConfig) -> AdapterConfig:
    """Give the adapter that a member of several would be alone."""
    overrides = tuple(
        replace(override, rank=member.rank or override.rank, alpha=member.alpha or override.alpha)
        for override in adapter.overrides
    )
    rank, alpha = member.rank or adapter.rank, member.alpha or adapter.alpha
    return replace(adapter, rank=rank, alpha=alpha, overrides=overrides, members=())


def prefix_names(layer: int) -> tuple[str, str]:
    """Name the learned keys and values of a layer, in the order in which PEFT lays them side by side."""
    return f"layers.{layer}.self_attn.k_proj.prefix_tokens", f"layers.{layer}.self_attn.v_proj.prefix_tokens"


# -------------------- writing


def peft_config(model: ModelConfig, adapter: AdapterConfig, base_name: str | None) -> dict[str, Any]:
    """Give the adapter_config.json of an adapter that is alone."""
    kind = {ours: theirs for theirs, ours in _TYPES.items()}[adapter.kind]
    fields: dict[str, Any] = {"peft_type": kind, "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name}
    if adapter.kind != "lora":
        fields |= {
            "num_virtual_tokens": adapter.num_virtual_tokens,
            "num_layers": model.num_layers,
            "num_transformer_submodules": 1,
        }
        if adapter.kind == "prompt":
            return fields | {"token_dim": model.dim, "num_attention_heads": model.num_heads}
        return fields | {
            "token_dim": model.num_kv_heads * model.head_dim,
            "num_attention_heads": model.num_kv_heads,
            "prefix_projection": False,
        }
    modules = adapted_modules(model, adapter)
    rank, alpha = adapter.rank, adapter.alpha
    fields |= {
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": adapter.dropout,
        "target_modules": sorted(_their_targets(modules, model)),
        "bias": adapter.bias,
    }
    optional: dict[str, Any] = {
        "use_rslora": adapter.rslora,
        "use_dora": adapter.dora,
        "rank_pattern": _pattern({name: r for name, (r, _) in modules.items()}, rank, model),
        "alpha_pattern": _pattern({name: _number(a) for name, (_, a) in modules.items()}, _number(alpha), model),
    }
    return fields | {name: value for name, value in optional.items() if value}


def _number(value: float) -> int | float:
    """PEFT's alpha is a whole number wherever it can be."""
    return int(value) if value == int(value) else value


def _pattern(values: Mapping[str, int | float], usual: int | float, model: ModelConfig) -> dict[str, int | float]:
    """The modules that have another value than the usual one, by the names that PEFT matches."""
    found: dict[str, int | float] = {}
    for value in sorted(set(values.values()) - {usual}):
        found |= dict.fromkeys(_their_targets([name for name in values if values[name] == value], model), value)
    return dict(sorted(found.items()))


def _their_targets(modules: Iterable[str], model: ModelConfig) -> list[str]:
    """Name a set of modules: `q_proj` where every layer has it, whole names for the rest."""
    return [hf_name(name) if "." in name else name for name in _compact(set(modules), model)]


def _compact(modules: set[str], model: ModelConfig) -> list[str]:
    named = [name for name in (EMBEDDING, HEAD) if name in modules]
    of_part: dict[str, list[str]] = {}
    for name in projections(model):
        of_part.setdefault(name.rpartition(".")[2], []).append(name)
    for part, names in of_part.items():
        inside = [name for name in names if name in modules]
        named += [part] if len(inside) == len(names) else inside
    return named


# -------------------- reading


def read_peft_config(folder: Path, model: ModelConfig) -> AdapterConfig:
    """Read `folder`/adapter_config.json as an adapter of `model`; CheckpointError with every reason why it can't be."""
    raw = read_raw(folder)
    where = str(folder / CONFIG)
    kind = raw.get("peft_type")
    if not isinstance(kind, str) or kind not in _TYPES:
        expected = f"must be one of {', '.join(_TYPES)}"
        raise CheckpointError(problem(f"{where}: peft_type", kind, expected, "no other is computed here"))
    problems = _unsupported(raw, where, kind)
    adapter = _read_lora(raw, where, model, problems) if kind == "LORA" else _read_virtual(raw, where, model, problems)
    if problems or adapter is None:
        raise CheckpointError("\n".join(problems))
    return adapter


def read_raw(folder: Path) -> dict[str, Any]:
    """Read `folder`/adapter_config.json as it is; CheckpointError where it is no JSON object."""
    path = folder / CONFIG
    if not path.is_file():
        expected, why = "no such file", "an adapter of PEFT's is a folder with an adapter_config.json in it"
        raise CheckpointError(problem(str(path), "", expected, why, "Give that folder."))
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(problem(str(path), "", f"not readable as JSON: {error}", do="Fetch it again.")) from None
    if not isinstance(raw, dict):
        raise CheckpointError(problem(str(path), "", f"must be a JSON object, not a {type(raw).__name__}"))
    return raw


def _unsupported(raw: Mapping[str, Any], where: str, kind: str) -> list[str]:
    """Whatever would make it another adapter than the one that we compute."""
    problems = []
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        problems.append(problem(f"{where}: task_type", raw["task_type"], "must be 'CAUSAL_LM'"))
    if raw.get("num_transformer_submodules") not in (None, 1):
        problems.append(problem(f"{where}: num_transformer_submodules", raw["num_transformer_submodules"], "must be 1"))
    init = raw.get("init_lora_weights")
    if init not in _INITS:
        why = "others change the base's weights, which the adapter then belongs to"
        do = "Save it with path_initial_model_for_weight_conversion."
        problems.append(problem(f"{where}: init_lora_weights", init, "must be true, false, gaussian, orthogonal or eva",
                                why, do))  # fmt: skip
    known = _READ[kind] | _WITHOUT_EFFECT | {"num_transformer_submodules"}
    for name, value in raw.items():
        if name in known or any(value is empty or value == empty for empty in _EMPTY):
            continue
        if name in _NOT_COMPUTED:
            problems.append(problem(f"{where}: {name}", value, "is not supported", "it changes what is computed",
                                    "Train the adapter without it."))  # fmt: skip
        else:
            why = "so it might change what is computed"
            do = "Remove it if it does not, or train the adapter without it."
            problems.append(problem(f"{where}: {name}", value, "is not known here", why, do))
    return problems


def _read_virtual(raw: Mapping[str, Any], where: str, model: ModelConfig, problems: list[str]) -> AdapterConfig | None:
    """Learned positions: prompt or prefix."""
    prompt = raw["peft_type"] == "PROMPT_TUNING"
    count = _whole(raw, "num_virtual_tokens", where, problems)
    heads = model.num_heads if prompt else model.num_kv_heads
    width = model.dim if prompt else model.num_kv_heads * model.head_dim
    for name, ours in (("token_dim", width), ("num_layers", model.num_layers), ("num_attention_heads", heads)):
        if raw.get(name) not in (None, ours):
            problems.append(problem(f"{where}: {name}", raw[name], f"the model has {ours}"))
    return AdapterConfig(kind="prompt" if prompt else "prefix", num_virtual_tokens=count) if count else None


def _read_lora(raw: Mapping[str, Any], where: str, model: ModelConfig, problems: list[str]) -> AdapterConfig | None:
    rank, alpha = _whole(raw, "r", where, problems), _positive(raw, "lora_alpha", where, problems)
    dropout = raw.get("lora_dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        problems.append(problem(f"{where}: lora_dropout", dropout, "must be a number from 0 to below 1"))
    bias = raw.get("bias", "none")
    if bias not in ("none", "lora_only"):
        problems.append(problem(f"{where}: bias", bias, "must be 'none' or 'lora_only'"))
    modules = _targeted(raw.get("target_modules"), where, model, problems)
    ranks = _values(raw, "rank_pattern", rank, where, modules, problems)
    alphas = _values(raw, "alpha_pattern", alpha, where, modules, problems)
    problems += [
        problem(f"{where}: {name}", raw[name], "must be true or false")
        for name in ("use_rslora", "use_dora")
        if not isinstance(raw.get(name, False), bool)
    ]
    if raw.get("use_dora") is True and EMBEDDING in modules:
        problems.append(problem(f"{where}: use_dora", True, f"is not supported on {EMBEDDING}"))
    if problems:
        return None
    found = {name: (int(ranks[name]), float(alphas[name])) for name in modules}
    targets = _compact(set(modules), model)
    if set(modules) >= set(projections(model)):
        targets = [name for name in (EMBEDDING, HEAD) if name in modules] + [ALL_LINEAR]
    return AdapterConfig(
        kind="lora",
        targets=tuple(targets),
        rank=rank,
        alpha=float(alpha),
        dropout=float(dropout),
        overrides=_overrides(found, rank, float(alpha), model),
        rslora=raw.get("use_rslora", False),
        dora=raw.get("use_dora", False),
        bias=bias,
    )


def _overrides(
    found: Mapping[str, tuple[int, float]], rank: int, alpha: float, model: ModelConfig
) -> tuple[OverrideConfig, ...]:
    """The modules of another rank or alpha, together where they have the same."""
    others = sorted(set(found.values()) - {(rank, alpha)})
    return tuple(
        OverrideConfig(
            targets=tuple(_compact({name for name in found if found[name] == other}, model)),
            rank=other[0],
            alpha=other[1] if other[1] != alpha else 0.0,
        )
        for other in others
    )


def _targeted(value: Any, where: str, model: ModelConfig, problems: list[str]) -> list[str]:
    """The modules that target_modules means: names and ends of names in a list, else one pattern for whole names."""
    names = [EMBEDDING, *projections(model), HEAD]
    if value == ALL_LINEAR:
        return projections(model)
    found: list[str] = []
    if isinstance(value, str):
        patterns = compile_patterns([value], f"{where}: target_modules", problems)
        found = [name for name in names if _first_fit(patterns, name) is not None]
    elif isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        ends = tuple(f".{entry}" for entry in value)
        found = [name for name in names if f".{_their_module(name)}".endswith(ends)]
    if not found and not problems:
        do = "Is it an adapter of another model?"
        problems.append(problem(f"{where}: target_modules", value, "matches no module of the model", do=do))
    return found


def _values(
    raw: Mapping[str, Any], field: str, usual: int | float, where: str, modules: list[str], problems: list[str]
) -> dict[str, int | float]:
    """Each module's value in rank_pattern or alpha_pattern: the first that fits its name counts, else the usual."""
    pattern = {} if raw.get(field) is None else raw[field]
    if not isinstance(pattern, dict):
        problems.append(problem(f"{where}: {field}", pattern, "must be an object"))
        return {}
    read = _whole if field == "rank_pattern" else _positive
    # As PEFT does: the whole name, or its end after a dot.
    patterns = compile_patterns(pattern, f"{where}: {field}", problems, r"(.*\.)?({})")
    values = {key: read(pattern, key, f"{where}: {field}", problems) for key in pattern}
    found: dict[str, int | float] = {}
    for name in modules:
        key = _first_fit(patterns, name)
        found[name] = usual if key is None else values[key]
    return found


def _first_fit(patterns: Mapping[str, re.Pattern[str]], name: str) -> str | None:
    theirs = _their_module(name)
    return next((key for key, pattern in patterns.items() if pattern.fullmatch(theirs)), None)


def _their_module(name: str) -> str:
    return hf_name(f"{name}.")[:-1]


def _whole(raw: Mapping[str, Any], name: str, where: str, problems: list[str]) -> int:
    """One value that must be a whole number above 0; a problem is noted and 0 returned where it is not."""
    value = raw.get(name)
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31:
        return value
    problems.append(problem(f"{where}: {name}", value, "must be a positive whole number"))
    return 0


def _positive(raw: Mapping[str, Any], name: str, where: str, problems: list[str]) -> float:
    """One value that must be a number above 0; a problem is noted and 0 returned where it is not."""
    value = raw.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max:
        return float(value)
    problems.append(problem(f"{where}: {name}", value, "must be a positive number"))
    return 0.0
