"""What an [adapter] section must satisfy: settings that have an effect under its kind, and names that the model has.

Rules as those of check.py, which calls them. A name that fits nothing is refused with the nearest that does: a
misspelled target would train less than was asked, in silence.
"""

import difflib
import os
import re
from collections.abc import Callable, Iterator, Sequence

from configs.errors import problem
from configs.fields import as_list, default_value, listed
from configs.layout import NF4_BLOCK, head_dim
from configs.load import toml_value
from configs.schema import Config
from configs.targets import (
    ALL_LINEAR,
    EMBEDDING,
    HEAD,
    adapted_modules,
    fits,
    last_parameters,
    modules_of,
    parameter_names,
    projections,
    trained_parameters,
)

_FROZEN = ("lora", "bottleneck", "prefix", "prompt")
"""Kinds that leave all projections as they are and keep what they learn apart."""

EFFECTS: dict[str, tuple[str, ...]] = {
    "targets": ("lora",),
    "rank": ("lora",),
    "alpha": ("lora",),
    "dropout": ("lora",),
    "overrides": ("lora",),
    "rslora": ("lora",),
    "dora": ("lora",),
    "lora_plus_ratio": ("lora",),
    "bias": ("lora",),
    "members": ("lora",),
    "bottleneck_dim": ("bottleneck",),
    "num_virtual_tokens": ("prefix", "prompt"),
    "last_layers": ("freeze",),
    "trainable": ("freeze",),
    "init_from": ("lora", "prefix", "prompt"),
    "quantization": _FROZEN,
    "base": (*_FROZEN, "bitfit", "freeze"),
}
"""Field -> the kinds under which it means something."""

_MOST_LAYERS = 10_000  # names are not listed for a number that can't be meant


def adapter_problems(config: Config) -> Iterator[str]:
    """Say what is wrong with the [adapter] section of a config whose numbers are in their ranges."""
    kind = config.adapter.kind
    yield from _effects(config)
    yield from _virtual_tokens(config)
    yield from _nf4(config)
    if not 1 <= config.model.num_layers <= _MOST_LAYERS:
        return
    if kind == "lora":
        wrong = [text for rule in (_targets, _overrides) for text in rule(config)]
        yield from wrong or _lora_biases(config)
        yield from _members(config)
    elif kind == "bitfit":
        yield from _bitfit(config)
    elif kind == "freeze":
        yield from _freeze(config)


def _effects(config: Config) -> Iterator[str]:
    adapter, kind = config.adapter, config.adapter.kind
    for name, kinds in EFFECTS.items():
        value, key = getattr(adapter, name), f"adapter.{name}"
        if kind in kinds or value == default_value(adapter, name):
            continue
        do = f"Use adapter.kind = {listed([repr(one) for one in kinds], 'or')}, or remove it."
        if name == "quantization":
            why = (
                "all weights are trained" if kind == "none" else "its result is a whole model, not a part beside a base"
            )
            yield problem(key, value, f"is not for adapter.kind = {kind!r}", why, do)
            continue
        why = "PEFT has no format for it" if name == "init_from" else ""
        shown = f" = {toml_value(value)}" if isinstance(value, bool) or name in ("targets", "trainable") else ""
        got = "" if shown or as_list(value) is not None else value
        yield problem(key + shown, got, f"has no effect under adapter.kind = {kind!r}", why, do)


def _virtual_tokens(config: Config) -> Iterator[str]:
    kind, count, seq_len = config.adapter.kind, config.adapter.num_virtual_tokens, config.data.seq_len
    if kind not in EFFECTS["num_virtual_tokens"]:
        return
    if config.data.packing == "concat" and config.data.document_mask:
        expected = f"is not for adapter.kind = {kind!r} with data.document_mask = true"
        why = "virtual tokens stand before each document, and the rest of one that is cut would have none"
        yield problem("data.packing", "concat", expected, why, "Use data.packing = 'best_fit' or 'none'.")
    if count >= seq_len >= 1:
        why = "they stand before the text of a sequence and are counted in it"
        do = f"Use 1 to {seq_len - 1}." if seq_len > 1 else "Raise data.seq_len."
        yield problem("adapter.num_virtual_tokens", count, f"must be less than data.seq_len = {seq_len}", why, do)


def _nf4(config: Config) -> Iterator[str]:
    model = config.model
    if config.adapter.kind not in _FROZEN or config.adapter.quantization != "nf4":
        return
    inputs = {"dim": model.dim, "num_heads * head_dim": model.num_heads * head_dim(model), "ffn_dim": model.ffn_dim}
    if all(count % NF4_BLOCK for count in inputs.values()):
        where = f"of {listed([f'model.{name} = {count}' for name, count in inputs.items()], 'and')} none"
        expected = f"has no effect: {where} is a multiple of {NF4_BLOCK}"
        why = f"{NF4_BLOCK} inputs share a scale, and other projections stay in 16 bits"
        yield problem("adapter.quantization", "nf4", expected, why, "Use 'int8' or 'none'.")


# ---- LoRA


def _targets(config: Config) -> Iterator[str]:
    if not config.adapter.targets:
        yield problem("adapter.targets", "", "must name at least one module", do=f'Use ["{ALL_LINEAR}"].')
    for index, target in enumerate(config.adapter.targets):
        where = f"adapter.targets.{index}"
        if config.model.tie_embeddings and target in (EMBEDDING, HEAD):
            expected = "can't have LoRA under model.tie_embeddings = true"
            why = "embedding and head share one weight, and merging an adapter of one would change the other"
            yield problem(where, target, expected, why, "Leave it out.")
        elif config.adapter.dora and target == EMBEDDING:
            yield problem(where, target, "can't have DoRA", "a look-up has no outputs to scale", "Leave it out.")
        elif config.adapter.dora and target == HEAD:
            why = "the loss multiplies with the head in chunks, and would need its rows' lengths in each"
            yield problem(where, target, "can't have DoRA", why, "Leave it out.")
        else:
            yield from _unknown_module(config, where, target)


def _overrides(config: Config) -> Iterator[str]:
    model, adapter = config.model, config.adapter
    adapted = set(adapted_modules(model, adapter))
    meant = [{name for target in one.targets for name in modules_of(target, model)} for one in adapter.overrides]
    for index, override in enumerate(adapter.overrides):
        where = f"adapter.overrides.{index}.targets"
        if not override.targets:
            yield problem(where, "", "must name at least one module", do="Name some, or remove the override.")
        unknown = [
            text
            for place, target in enumerate(override.targets)
            for text in _unknown_module(config, f"{where}.{place}", target)
        ]
        yield from unknown
        if unknown or not override.targets:
            continue
        if not meant[index] & adapted:
            do = "Name them there too, or remove the override."
            yield problem(where, "", "has no effect: none of its modules is among adapter.targets", do=do)
        elif not meant[index] & adapted - set().union(*meant[index + 1 :]):
            do = "Put the more particular override last, or remove this one."
            yield problem(where, "", "has no effect: later overrides hold for all of its modules", do=do)


def _unknown_module(config: Config, where: str, target: str) -> Iterator[str]:
    model = config.model
    if not modules_of(target, model):
        names = projections(model)
        known = [ALL_LINEAR, EMBEDDING, HEAD, *names]
        near = _nearest(target, known, lambda one: bool(modules_of(one, model)))
        do = f"Did you mean {near!r}?" if near else f"Names go from {names[0]} to {names[-1]}."
        yield problem(where, target, "fits no module", do=do)


def _lora_biases(config: Config) -> Iterator[str]:
    adapter = config.adapter
    if adapter.bias == "lora_only" and not trained_parameters(config.model, adapter):
        expected = "has no effect: no module with LoRA has a bias"
        yield problem("adapter.bias", "lora_only", expected, do="Remove it.")


# ---- several adapters at once


def _members(config: Config) -> Iterator[str]:
    adapter = config.adapter
    if not adapter.members:
        return
    if len(adapter.members) == 1:
        do = "Remove it, and set adapter.rank and optim.lr instead."
        yield problem("adapter.members", "", "must be at least two, or none", do=do)
    if adapter.dora:
        why = "DoRA divides by the norm of base and adapter together, which is another for each member"
        yield problem("adapter.members", "", "exclude adapter.dora = true", why, "Set adapter.dora = false.")
    if adapter.init_from:
        why = "it is one adapter, and each member starts from its own seed"
        yield problem("adapter.members", "", "exclude adapter.init_from", why, "Remove one of the two.")
    if adapter.bias != "none":
        why = "a bias is the base's own, which all members share"
        do = "Set adapter.bias = 'none'."
        yield problem("adapter.members", "", f"exclude adapter.bias = {adapter.bias!r}", why, do)
    if EMBEDDING in adapter.targets:
        why = "a look-up has no rows of its own for each member"
        yield problem("adapter.members", "", f"exclude {EMBEDDING!r} among adapter.targets", why, "Leave it out.")
    yield from _member_names(config)
    yield from _member_stores(config)


def _member_names(config: Config) -> Iterator[str]:
    seen: dict[str, int] = {}
    for index, member in enumerate(config.adapter.members):
        where = f"adapter.members.{index}.name"
        if not re.fullmatch(r"[A-Za-z0-9_-]+", member.name):
            why = "a folder and parameters bear it"
            yield problem(f"{where} = {member.name!r}", "", "must be letters, digits, '_' and '-'", why)
        first = seen.setdefault(member.name, index)
        if first != index:
            yield problem(where, member.name, f"must differ from adapter.members.{first}.name")


def _member_stores(config: Config) -> Iterator[str]:
    stores = {os.path.normpath(store.path): index for index, store in enumerate(config.data.stores)}
    read: set[str] = set()
    for index, member in enumerate(config.adapter.members):
        paths = [os.path.normpath(path) for path in member.stores]
        for place, path in enumerate(paths):
            where = f"adapter.members.{index}.stores.{place} = {member.stores[place]!r}"
            if path not in stores:
                known = listed([repr(store.path) for store in config.data.stores] or ["[[data.stores]]"], "or")
                yield problem(where, "", "must be the path of one of data.stores", do=f"Use {known}.")
            elif path in paths[:place]:
                yield problem(where, "", "is listed twice", do="Keep one.")
        read.update(paths or stores)
    if read <= stores.keys():  # else one was misspelled, perhaps this
        for path in stores.keys() - read:
            where, store = f"data.stores.{stores[path]}.path", config.data.stores[stores[path]]
            yield problem(where, store.path, "has no effect: no member of adapter.members reads it", do="Remove it.")


# ---- parts of the model itself


def _bitfit(config: Config) -> Iterator[str]:
    if not trained_parameters(config.model, config.adapter):
        why = "it trains nothing else, and model.attention_bias and model.mlp_bias are false"
        do = "Set one of them, which makes it another architecture, or use adapter.kind = 'lora'."
        yield problem("adapter.kind", "bitfit", "needs a model with biases", why, do)


def _freeze(config: Config) -> Iterator[str]:
    model, adapter = config.model, config.adapter
    if not adapter.last_layers and not adapter.trainable:
        do = f"Use adapter.last_layers 1, or adapter.trainable '[\"{HEAD}.*\"]'."
        expected = "needs adapter.last_layers or adapter.trainable"
        yield problem("adapter.kind", "freeze", expected, "all parameters would be frozen", do)
    elif adapter.last_layers > model.num_layers:
        do = f"Use 1 to {model.num_layers}."
        expected = f"must be at most model.num_layers = {model.num_layers}"
        yield problem("adapter.last_layers", adapter.last_layers, expected, do=do)
    elif trained_parameters(model, adapter) == parameter_names(model):
        yield problem("adapter.kind", "freeze", "has no effect: all parameters are trained", do="Use 'none'.")
    else:
        yield from _trainable(config)


def _trainable(config: Config) -> Iterator[str]:
    model, adapter = config.model, config.adapter
    last, names = set(last_parameters(model, adapter.last_layers)), parameter_names(model)
    for index, pattern in enumerate(adapter.trainable):
        where, found = f"adapter.trainable.{index}", [name for name in names if fits(name, [pattern])]
        if model.tie_embeddings and not found and fits(f"{HEAD}.weight", [pattern]):
            expected = "is the embedding's weight under model.tie_embeddings = true"
            why = "who trains the head trains the embedding"
            yield problem(where, pattern, expected, why, f"Write '{EMBEDDING}.*' if that is meant.")
        elif not found:
            near = _nearest(pattern, names, lambda one: any(fits(name, [one]) for name in names))
            do = f"Did you mean {near!r}?" if near else f"Names go from {names[0]} to {names[-1]}."
            yield problem(where, pattern, "fits no parameter", do=do)
        elif set(found) <= last:
            expected = f"has no effect: adapter.last_layers = {adapter.last_layers} trains these already"
            yield problem(where, pattern, expected, do="Remove it.")


def _nearest(given: str, names: Sequence[str], finds: Callable[[str], bool]) -> str:
    """Find what fits something and is near: as a part of whole names, each word put right; empty if nothing is."""
    words = sorted({part for name in names for part in name.split(".")})
    bare = given.removeprefix("base_model.model.").removeprefix("model.")
    right = ".".join(_word(part, words) for part in bare.split("."))
    forms = [form.format(one) for one in (bare, right) if one for form in ("{}", "{}.*", "*.{}", "*.{}.*")]
    return next((form for form in forms if finds(form)), "")


def _word(part: str, words: Sequence[str]) -> str:
    if part.isdecimal() or set(part) & set("*?[]"):
        return part
    return (difflib.get_close_matches(part, words, n=1) or [part])[0]
