"""Which modules and parameters of a model an [adapter] section means: names, as pure functions of the config.

The check of a config, the model's adapters and the files that hold them all ask here, so that a pattern means one thing
everywhere. Names are Hugging Face's without `model.`: `layers.0.self_attn.q_proj`, `embed_tokens`, `lm_head`. It knows
no tensors.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from configs.adapters import AdapterConfig, MemberConfig
from configs.schema import ModelConfig

ALL_LINEAR = "all-linear"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
EMBEDDING, HEAD = "embed_tokens", "lm_head"
NORM = "norm"  # after the last layer


def projections(model: ModelConfig) -> list[str]:
    """List the linear modules of all layers, in the model's order."""
    parts = [*(f"self_attn.{name}" for name in ATTENTION), *(f"mlp.{name}" for name in FEED_FORWARD)]
    return [f"layers.{layer}.{part}" for layer in range(model.num_layers) for part in parts]


def parameter_names(model: ModelConfig) -> list[str]:
    """List the base's parameters, in the model's order; a tied head is the embedding's weight."""
    attention = ["weight", "bias"] if model.attention_bias else ["weight"]
    feed_forward = ["weight", "bias"] if model.mlp_bias else ["weight"]
    inside = [
        "input_layernorm.weight",
        *(f"self_attn.{name}.{kind}" for name in ATTENTION for kind in attention),
        "post_attention_layernorm.weight",
        *(f"mlp.{name}.{kind}" for name in FEED_FORWARD for kind in feed_forward),
    ]
    layers = [f"layers.{layer}.{name}" for layer in range(model.num_layers) for name in inside]
    head = [] if model.tie_embeddings else [f"{HEAD}.weight"]
    return [f"{EMBEDDING}.weight", *layers, f"{NORM}.weight", *head]


def modules_of(target: str, model: ModelConfig) -> list[str]:
    """List the modules that one target means; none where it fits nothing.

    "all-linear" is every projection of every layer; a word is the last part of a name; anything with `.`, `*`, `?` or
    `[` is a pattern over the whole names of projections. `embed_tokens` and `lm_head` are meant by their names only.
    """
    if target in (EMBEDDING, HEAD):
        return [target]
    names = projections(model)
    if target == ALL_LINEAR:
        return names
    if set(target) & set(".*?["):
        return [name for name in names if fnmatchcase(name, target)]
    return [name for name in names if name.rpartition(".")[2] == target]


def adapted_modules(
    model: ModelConfig, adapter: AdapterConfig, member: MemberConfig | None = None
) -> dict[str, tuple[int, float]]:
    """Map each module that gets LoRA to its (rank, alpha), in the model's order; empty under other kinds.

    Of the overrides that fit a module the last one counts; a `member` of several may have a rank and an alpha of its
    own. All members have the same modules.
    """
    if adapter.kind != "lora":
        return {}
    found = dict.fromkeys(_meant(adapter.targets, model), (adapter.rank, adapter.alpha))
    for override in adapter.overrides:
        for name in found.keys() & _meant(override.targets, model):
            found[name] = (override.rank, override.alpha or adapter.alpha)
    if member is not None:
        found = {name: (member.rank or rank, member.alpha or alpha) for name, (rank, alpha) in found.items()}
    order = [EMBEDDING, *projections(model), HEAD]
    return {name: found[name] for name in order if name in found}


def trained_parameters(model: ModelConfig, adapter: AdapterConfig) -> list[str]:
    """List the base's own parameters that are trained, in the model's order; what an adapter adds is not among them."""
    names = parameter_names(model)
    if adapter.kind == "none":
        return names
    if adapter.kind == "bitfit":
        return [name for name in names if name.endswith(".bias")]
    if adapter.kind == "lora" and adapter.bias == "lora_only":
        biases = {f"{name}.bias" for name in adapted_modules(model, adapter)}
        return [name for name in names if name in biases]
    if adapter.kind == "freeze":
        last = set(last_parameters(model, adapter.last_layers))
        return [name for name in names if name in last or fits(name, adapter.trainable)]
    return []


def last_parameters(model: ModelConfig, layers: int) -> list[str]:
    """List the parameters of the last layers and of the final norm; none for no layers."""
    first = model.num_layers - layers
    prefixes = tuple(f"layers.{layer}." for layer in range(first, model.num_layers))
    return [name for name in parameter_names(model) if name.startswith((*prefixes, f"{NORM}."))] if prefixes else []


def fits(name: str, patterns: Sequence[str]) -> bool:
    """Say whether a name fits one of some patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _meant(targets: Sequence[str], model: ModelConfig) -> set[str]:
    return {name for target in targets for name in modules_of(target, model)}
