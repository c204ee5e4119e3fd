"""What the types can't say: fields that must agree, settings without effect, the layout, and what a resumed run keeps.

One small function a rule, each yielding its problems; a rule that can't be judged because a value is out of range keeps
silent, since that value is already reported (ranges.py). `check` needs no machine, `resolve` needs the number of ranks,
and only `missing_files` looks at the disk: a run can be planned where its data is not. Only `resolve` fills values in.
"""

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.check_adapter import adapter_problems
from configs.check_inject import inject_place, inject_problems
from configs.errors import ConfigError, problem
from configs.fields import as_list, as_table, choices, default_of, default_value, divisors, listed, plain
from configs.layout import head_dim, layout_problems
from configs.load import toml_value
from configs.ranges import out_of_range
from configs.refusals import refused
from configs.schema import Config

BUILT_IN_SOURCES = ("python-stdlib", "python-stdlib-docs")
SMALL = ("lora", "bottleneck", "prefix", "prompt", "bitfit")
"""Kinds of adapter.kind that train little."""


def check(config: Config) -> list[str]:
    """List everything that is wrong with a config on any number of ranks."""
    return [text for rule in _RULES for text in rule(config)]


def resolve(config: Config, world_size: int) -> Config:
    """Fill in what is derived for `world_size` ranks: num_kv_heads, head_dim, dp_shard, micro_batch_size, accumulate.

    Resolving again changes nothing. Raises ConfigError with every problem of the config and of its layout.
    """
    assert world_size >= 1, f"world_size = {world_size}: a run has at least one rank"
    problems = check(config)
    problems += layout_problems(config, world_size) + inject_place(config, world_size)
    problems += refused(config) if not problems else []
    if problems:
        raise ConfigError(problems)
    model, parallel, data = config.model, config.parallel, config.data
    dp_size = world_size // (parallel.cp * parallel.tp * parallel.pp)
    # A pipeline wants many microbatches to keep its stages busy.
    share = data.global_batch_size // dp_size
    micro = data.micro_batch_size or (1 if parallel.pp > 1 else share)
    # What such a run trains is small: its gradients are kept whole and reduced once a step.
    once = config.adapter.kind in SMALL and micro < share
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model, num_kv_heads=model.num_kv_heads or model.num_heads, head_dim=head_dim(model)),
        parallel=dataclasses.replace(
            parallel,
            dp_shard=dp_size // parallel.dp_replicate,
            accumulate="unsharded" if once else parallel.accumulate,
        ),
        data=dataclasses.replace(data, micro_batch_size=micro),
    )


def missing_files(config: Config) -> list[str]:
    """List the files and folders that the config names and the disk lacks."""
    problems: list[str] = []
    start, adapter = config.model.init_from, config.adapter.init_from
    if start and not (Path(start) / "config.json").is_file():
        do = "Give a folder with config.json and *.safetensors."
        problems.append(problem("model.init_from", start, "no Hugging Face model there", do=do))
    if adapter and not (Path(adapter) / "adapter_config.json").is_file():
        do = "Give a folder with adapter_config.json and adapter_model.safetensors."
        problems.append(problem("adapter.init_from", adapter, "no PEFT adapter there", do=do))
    schedule = config.parallel.schedule_csv
    if schedule and not Path(schedule).is_file():
        problems.append(problem("parallel.schedule_csv", schedule, "no such file", do="Give a CSV file, or none."))
    for index, store in enumerate(config.data.stores):
        key = f"data.stores.{index}"
        if (Path(store.path) / "manifest.json").exists():
            continue
        if Path(store.path).exists():
            do = "Give a folder that tools/prepare.py made, or a path where nothing is yet."
            problems.append(problem(f"{key}.path", store.path, "is not a token store", "no manifest.json there", do))
            continue
        if not store.sources:
            do = f"Make it with tools/prepare.py, or set {key}.sources and a tokenizer."
            problems.append(problem(f"{key}.path", store.path, "no such token store", do=do))
        problems += [
            problem(f"{key}.sources", source, "no such file or folder", do="Give what is there to be read.")
            for source in store.sources
            if source not in BUILT_IN_SOURCES and not Path(source).exists()
        ]
        if store.tokenizer and not Path(store.tokenizer).is_file():
            problems.append(
                problem(f"{key}.tokenizer", store.tokenizer, "no such file", do="Give a .model or tokenizer.json.")
            )
    return problems


# ---- fields that must agree


def _run_folder(config: Config) -> Iterator[str]:
    name = config.run.name
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        expected = "must be letters, digits, '.', '_' and '-', and not begin with '.' or '-'"
        yield problem(f"run.name = {name!r}", "", expected, "it names one folder below run.dir")
    if not config.run.dir:
        yield problem("run.dir = ''", "", "must name a folder", do="Use runs, or '.' for this folder.")


_PAIRS = "rotary positions turn pairs of numbers"


def _heads(config: Config) -> Iterator[str]:
    model = config.model
    if min(model.dim, model.num_heads) < 1 or min(model.head_dim, model.num_kv_heads) < 0:
        return
    if not model.head_dim and model.dim % model.num_heads:
        do = f"Use {choices(divisors(model.dim), model.num_heads)} heads, or set model.head_dim."
        yield problem("model.num_heads", model.num_heads, f"must divide model.dim = {model.dim}", do=do)
    elif model.head_dim % 2:
        do = f"Use {model.head_dim - 1} or {model.head_dim + 1}." if model.head_dim > 1 else "Use 2."
        yield problem("model.head_dim", model.head_dim, "must be even", _PAIRS, do)
    elif head_dim(model) % 2:
        even = [heads for heads in divisors(model.dim) if model.dim // heads % 2 == 0]
        do = f"Use {choices(even, model.num_heads)} heads, or set model.head_dim." if even else "Set model.head_dim."
        yield problem(f"model.head_dim = {model.dim} / {model.num_heads}", "", "must be even", _PAIRS, do)
    if model.num_kv_heads and model.num_heads % model.num_kv_heads:
        do = f"Use {choices(divisors(model.num_heads), model.num_kv_heads)}."
        why = "each key-value head serves as many query heads"
        expected = f"must divide model.num_heads = {model.num_heads}"
        yield problem("model.num_kv_heads", model.num_kv_heads, expected, why, do)


def _rope_scaling(config: Config) -> Iterator[str]:
    scaling = config.model.rope_scaling
    if scaling is not None and 0 < scaling.high_freq_factor <= scaling.low_freq_factor:
        expected = f"must be more than low_freq_factor = {scaling.low_freq_factor}"
        why = "frequencies between the two are blended"
        yield problem("model.rope_scaling.high_freq_factor", scaling.high_freq_factor, expected, why)


def _sequence(config: Config) -> Iterator[str]:
    seq_len, longest = config.data.seq_len, config.model.max_seq_len
    if seq_len > longest >= 1:
        do = f"Use data.seq_len {longest} or less, or raise model.max_seq_len."
        yield problem("data.seq_len", seq_len, f"must be at most model.max_seq_len = {longest}", do=do)


def _stores(config: Config) -> Iterator[str]:
    stores = config.data.stores
    if not stores:
        do = """Write [[data.stores]] with a path, or --data.stores '[{path = "data/mine"}]'."""
        yield problem("data.stores", "", "must list at least one token store", do=do)
    seen: dict[str, int] = {}
    for index, store in enumerate(stores):
        key = f"data.stores.{index}.path"
        if not store.path:
            yield problem(f"{key} = ''", "", "must name a folder")
            continue
        first = seen.setdefault(os.path.normpath(store.path), index)
        if first != index:
            do = "Give one of them, with the sum of the weights."
            yield problem(key, store.path, f"must differ from data.stores.{first}.path", do=do)


def _store_sources(config: Config) -> Iterator[str]:
    for index, store in enumerate(config.data.stores):
        key = f"data.stores.{index}"
        if store.tokenizer and store.train_tokenizer > 0:
            yield problem(
                f"{key}.train_tokenizer", store.train_tokenizer, "excludes tokenizer", do="Keep one of the two."
            )
        if store.sources and not store.tokenizer and store.train_tokenizer == 0:
            do = f"Set {key}.tokenizer, or {key}.train_tokenizer = {config.model.vocab_size}."
            yield problem(f"{key}.sources", "", "need a tokenizer to be prepared with", do=do)
        if "" in store.sources:
            yield problem(f"{key}.sources", "", "must not hold an empty name")
        for name in ("tokenizer", "train_tokenizer", "max_bytes"):
            if getattr(store, name) and not store.sources:
                do = f"Set {key}.sources, or remove it."
                yield problem(f"{key}.{name}", getattr(store, name), "has no effect without sources", do=do)
        if store.train_tokenizer > config.model.vocab_size >= 2:
            expected = f"must be at most model.vocab_size = {config.model.vocab_size}"
            why = "every token needs a row of the embedding"
            yield problem(f"{key}.train_tokenizer", store.train_tokenizer, expected, why)


def _one_tokenizer(config: Config) -> Iterator[str]:
    trained = [index for index, store in enumerate(config.data.stores) if store.train_tokenizer > 0]
    for index in trained[1:]:
        key = f"data.stores.{index}.train_tokenizer"
        do = f"Prepare data.stores.{trained[0]} first and give its tokenizer to the others."
        got = config.data.stores[index].train_tokenizer
        yield problem(key, got, "must be set for one store only", "all stores of a mix share one tokenizer", do)


def _documents(config: Config) -> Iterator[str]:
    if config.data.document_positions and not config.data.document_mask:
        why = "without it attention crosses documents, and keys of an earlier one would stand at later positions"
        yield problem("data.document_positions = true", "", "needs data.document_mask = true", why)


def _objective(config: Config) -> Iterator[str]:
    data = config.data
    if config.objective.kind != "sft":
        return
    if data.packing == "concat":
        why = "it cuts examples every data.seq_len tokens, and an answer without its question teaches to guess"
        do = "Use data.packing = 'best_fit' with data.document_mask = true, or data.packing = 'none'."
        yield problem("data.packing", "concat", "is not for objective.kind = 'sft'", why, do)
    elif data.packing == "best_fit" and not data.document_mask:
        why = "else an answer is learned in the light of the examples before it"
        expected = "needs data.document_mask = true under objective.kind = 'sft'"
        yield problem("data.packing", data.packing, expected, why, "Set it, or use data.packing = 'none'.")


def _optimizer(config: Config) -> Iterator[str]:
    optim = config.optim
    effects = {"momentum": ("muon",), "eps": ("adamw", "muon", "apex", "adamw_8bit", "paged_adamw_8bit")}
    for name, kinds in effects.items():
        value = getattr(optim, name)
        if optim.kind not in kinds and value != default_value(optim, name):
            yield problem(f"optim.{name}", value, f"has no effect under optim.kind = {optim.kind!r}", do="Remove it.")
    if optim.kind in ("apex", "paged_adamw_8bit") and config.precision.master == "fp64":
        why = "its moments and its arithmetic are fp32" if optim.kind == "apex" else "its arithmetic is fp32"
        yield problem("optim.kind", optim.kind, "excludes precision.master = 'fp64'", why, "Use 'adamw'.")


def _lr_schedule(config: Config) -> Iterator[str]:
    lr, steps = config.lr, config.run.steps
    if steps >= 1 and lr.warmup_steps >= steps:
        why = "the learning rate would never reach optim.lr"
        do = f"Use 0 to {steps - 1}." if steps > 1 else "Use 0."
        yield problem("lr.warmup_steps", lr.warmup_steps, f"must be less than run.steps = {steps}", why, do)
    elif lr.schedule == "wsd" and steps >= 1 and lr.warmup_steps + lr.decay_steps > steps:
        most = steps - lr.warmup_steps
        expected = f"must be at most {most}: run.steps = {steps} less lr.warmup_steps = {lr.warmup_steps}"
        yield problem("lr.decay_steps", lr.decay_steps, expected)
    if lr.schedule == "wsd" and lr.decay_steps == 0:
        do = f"Use about a tenth of run.steps = {steps}, or lr.schedule = 'constant'."
        yield problem("lr.decay_steps", lr.decay_steps, "must be at least 1 under lr.schedule = 'wsd'", do=do)
    if lr.schedule != "wsd" and lr.decay_steps > 0:
        expected = f"has no effect under lr.schedule = {lr.schedule!r}"
        yield problem("lr.decay_steps", lr.decay_steps, expected, do="Use lr.schedule = 'wsd', or remove it.")
    if lr.schedule == "constant" and lr.min_ratio != default_value(lr, "min_ratio"):
        do = "Choose another schedule, or remove it."
        yield problem("lr.min_ratio", lr.min_ratio, "has no effect under lr.schedule = 'constant'", do=do)


def _precision(config: Config) -> Iterator[str]:
    if config.precision.compute == "fp64" and config.precision.master != "fp64":
        why = "the weights would lose in the optimizer what the passes computed"
        expected = "needs precision.master = 'fp64'"
        yield problem("precision.compute", "fp64", expected, why)


def _keeping(config: Config) -> Iterator[str]:
    every, keep = config.checkpoint.every_steps, config.checkpoint.keep_every
    if every == 0 and keep > 0:
        expected = "has no effect while checkpoint.every_steps = 0"
        yield problem("checkpoint.keep_every", keep, expected, do="Set checkpoint.every_steps, or remove it.")
    elif every > 0 and keep > 0 and keep % every:
        below = keep - keep % every
        do = f"Use {listed([one for one in (below, below + every) if one], 'or')}."
        why = "no checkpoint is made at the steps between"
        expected = f"must be a multiple of checkpoint.every_steps = {every}"
        yield problem("checkpoint.keep_every", keep, expected, why, do)


def _bad_steps(config: Config) -> Iterator[str]:
    fault = config.fault
    if not fault.spike_threshold and fault.spike_window != default_value(fault, "spike_window"):
        expected = "has no effect while fault.spike_threshold = 0"
        yield problem("fault.spike_window", fault.spike_window, expected, do="Set fault.spike_threshold, or remove it.")
    if config.adapter.members and fault.rollback_limit not in (0, default_value(fault, "rollback_limit")):
        why = "its other members would lose steps for the one"
        expected = "has no effect on a run of several members"
        yield problem("fault.rollback_limit", fault.rollback_limit, expected, why, "Remove it.")


_RULES = (
    out_of_range,
    _run_folder,
    _heads,
    _rope_scaling,
    _sequence,
    _stores,
    _store_sources,
    _one_tokenizer,
    _documents,
    _objective,
    _optimizer,
    _lr_schedule,
    _precision,
    _keeping,
    _bad_steps,
    adapter_problems,
    inject_problems,
)


# ---- resuming


def resume_differences(saved: dict[str, Any], now: Config) -> list[str]:
    """List the fixed fields whose value in the checkpoint's resolved config is another than in `now`.

    A field that the checkpoint doesn't know had its default then; one that no longer exists is ignored.
    """
    return list(_differences(saved, now, ""))


def curve_notice(saved: dict[str, Any], now: Config) -> str | None:
    """Say what another number of steps does to the learning rate from here on; None if it changes nothing."""
    before = (as_table(saved.get("run")) or {}).get("steps")
    if before in (None, now.run.steps) or now.lr.schedule == "constant":
        return None
    change = f"run.steps: the checkpoint has {before}, the config {now.run.steps}"
    if now.lr.schedule == "wsd":
        return f"{change}; the last {now.lr.decay_steps} steps, in which the learning rate falls, move with it"
    return f"{change}; under lr.schedule = {now.lr.schedule!r} the learning rate follows another curve from here on"


def _differences(saved: dict[str, Any], now: Any, prefix: str) -> Iterator[str]:
    for part in dataclasses.fields(now):
        key, value = prefix + part.name, getattr(now, part.name)
        was = saved.get(part.name, plain(default_of(part)))
        tables, saved_tables = as_list(value) or [], as_list(was) or []
        if dataclasses.is_dataclass(value) and as_table(was) is not None:
            yield from _differences(was, value, f"{key}.")
        elif tables and dataclasses.is_dataclass(tables[0]) and len(tables) == len(saved_tables):
            for index, (old, new) in enumerate(zip(saved_tables, tables, strict=True)):
                yield from _differences(old, new, f"{key}.{index}.")
        elif part.metadata.get("resume") == "fixed" and plain(value) != was:
            yield f"{key}: the checkpoint has {_shown(was)}, the config {_shown(plain(value))}"


def _shown(value: Any) -> str:
    items = as_list(value)
    if value is None or value is dataclasses.MISSING:
        return "none"
    return f"{len(items)} of them" if items and as_table(items[0]) is not None else toml_value(value)
