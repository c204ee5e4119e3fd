"""Configs with any values: they survive TOML, dicts and JSON, and checking never fails in another way than it may."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.adapters import AdapterConfig
from configs.check import check, resolve
from configs.errors import ConfigError
from configs.fields import has_none, section_of
from configs.load import config_from_dict, config_hash, config_to_dict, load_config, to_toml
from configs.schema import Config
from configs.targets import adapted_modules, trained_parameters

TEXT = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=12)
SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers(-2, 70) | st.integers(-(2**63) + 1, 2**63 - 1),
    float: st.floats(-1, 40) | st.floats(-1e299, 1e299),
    str: TEXT,
}


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Draw a value of an annotation of the schema."""
    table, is_list = section_of(kind)
    if table is not None:
        one = sections(table)
        if is_list:
            return st.lists(one, max_size=3).map(tuple)
        return st.none() | one if has_none(kind) else one
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if get_origin(kind) is tuple:
        return st.lists(SCALARS[get_args(kind)[0]], max_size=3).map(tuple)
    return SCALARS[kind]


def sections(cls: type) -> st.SearchStrategy[Any]:
    """Draw a section of the schema with every field set."""
    hints = get_type_hints(cls)
    return st.builds(cls, **{part.name: values(hints[part.name]) for part in dataclasses.fields(cls)})


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs") / "any.toml"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(config=sections(Config))
def test_any_config_survives_toml_and_json(file: Path, config: Config) -> None:
    file.write_text(to_toml(config), encoding="utf-8")
    read = load_config(file, [])
    assert read == config
    assert to_toml(read) == to_toml(config)
    again = config_from_dict(json.loads(json.dumps(config_to_dict(config))), "json")
    assert again == config
    assert config_hash(again) == config_hash(config)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(config=sections(Config), world_size=st.integers(1, 1000))
def test_any_config_is_resolved_or_refused_with_problems(config: Config, world_size: int) -> None:
    try:
        resolved = resolve(config, world_size)
    except ConfigError as error:
        assert error.problems
        assert all(text.endswith((".", "?")) for text in error.problems)
        assert set(check(config)) <= set(error.problems)
    else:
        assert resolve(resolved, world_size) == resolved


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    adapter=sections(AdapterConfig),
    kind=st.sampled_from(["lora", "lora", "freeze"]),
    words=st.lists(st.sampled_from(["all-linear", "q_proj", "*.mlp.*", "lm_head", "embed_tokens", "layers.1.*", "["])),
)
def test_any_adapter_of_a_sound_run_is_taken_or_refused(adapter: AdapterConfig, kind: Any, words: list[str]) -> None:
    debug = load_config(Path("debug"), [])
    name = {"lora": "targets", "freeze": "trainable"}[kind]
    sparse = replace(AdapterConfig(kind=kind), **{name: tuple(words)})
    for one in (adapter, replace(adapter, kind=kind), sparse):
        try:
            resolved = resolve(replace(debug, adapter=one), 2)
        except ConfigError as error:
            assert error.problems
        else:
            trained = trained_parameters(resolved.model, one)
            assert adapted_modules(resolved.model, one) or trained or one.kind in ("bottleneck", "prefix", "prompt")


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 64),
    micro=st.integers(0, 16),
    replicate=st.integers(1, 8),
    world_size=st.integers(1, 16),
)
def test_a_resolved_layout_shares_the_batch_exactly(batch: int, micro: int, replicate: int, world_size: int) -> None:
    words = f"--data.global_batch_size {batch} --data.micro_batch_size {micro} --parallel.dp_replicate {replicate}"
    config = load_config(Path("debug"), words.split())
    share, rest = divmod(batch, world_size)
    fits = not rest and not world_size % replicate and not (micro and share % micro)
    try:
        resolved = resolve(config, world_size)
    except ConfigError:
        assert not fits
    else:
        assert fits
        assert resolved.parallel.dp_replicate * resolved.parallel.dp_shard == world_size
        assert share % resolved.data.micro_batch_size == 0
