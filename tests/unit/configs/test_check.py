"""Ranges, fields that must agree and the layout: every refusal by its exact text."""

import dataclasses
import re
from pathlib import Path

import pytest

from configs.check import check, missing_files, resolve
from configs.errors import ConfigError
from configs.fields import choices, divisors, walk
from configs.load import config_to_dict, load_config
from configs.ranges import RANGES, numbers
from configs.schema import Config


def problems(file: Path, words: str, world_size: int) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(load_config(file, words.split()), world_size)
    assert caught.value.exit_code == 2
    return caught.value.problems


def test_a_sound_config_has_no_problems(file: Path) -> None:
    assert check(load_config(file, [])) == []


def refusals() -> list[tuple[int, str, str]]:
    """Read the refusals beside this file: ranks, overrides, problem."""
    files = sorted(Path(__file__).parent.glob("refusals*.txt"))
    lines = [line for file in files for line in file.read_text().splitlines()]
    cases = [line for line in lines if line and not line.startswith("#")]
    firsts = [line.partition(" ") for line in cases[::2]]
    return [(int(n), words, text.strip()) for (n, _, words), text in zip(firsts, cases[1::2], strict=True)]


@pytest.mark.parametrize(("world_size", "words", "expected"), refusals())
def test_what_can_not_be_is_refused(file: Path, world_size: int, words: str, expected: str) -> None:
    assert problems(file, words, world_size) == [expected]


def test_everything_is_reported_at_once(file: Path) -> None:
    words = "--run.steps 0 --data.seq_len 5000 --lr.decay_steps 4 --parallel.dp_replicate 2"
    assert [text.split(":")[0] for text in problems(file, words, 3)] == [
        "run.steps = 0",
        "data.seq_len = 5000",
        "lr.decay_steps = 4",
        "parallel.dp_replicate = 2",
        "data.global_batch_size = 8",
    ]


def test_resolve_fills_what_is_derived_and_nothing_else(file: Path) -> None:
    config = load_config(file, ["--parallel.dp_replicate", "2"])
    resolved = resolve(config, 4)
    assert resolved.model.num_kv_heads == 4
    assert resolved.model.head_dim == 16
    assert resolved.parallel.dp_shard == 2
    assert resolved.data.micro_batch_size == 2
    assert resolve(resolved, 4) == resolved
    before, after = config_to_dict(config), config_to_dict(resolved)
    changed = [(name, key) for name, table in before.items() for key in table if table[key] != after[name][key]]
    assert changed == [
        ("model", "num_kv_heads"),
        ("model", "head_dim"),
        ("data", "micro_batch_size"),
        ("parallel", "dp_shard"),
    ]


@pytest.mark.parametrize("kind", ["lora", "bottleneck", "prefix", "prompt", "bitfit"])
def test_what_trains_little_reduces_its_gradients_once_a_step(file: Path, kind: str) -> None:
    words = f"--adapter.kind {kind} --model.attention_bias true --data.micro_batch_size 2".split()
    resolved = resolve(load_config(file, words), 2)
    assert resolved.parallel.accumulate == "unsharded"
    assert resolve(resolved, 2) == resolved
    # Where a rank computes its share at once there is nothing to accumulate.
    assert resolve(load_config(file, words), 4).parallel.accumulate == "sharded"
    whole = [*words, "--adapter.kind=freeze", "--adapter.last_layers", "1"]
    del whole[:2]
    assert resolve(load_config(file, whole), 2).parallel.accumulate == "sharded"


def test_values_given_are_kept_by_resolve(file: Path) -> None:
    words = "--model.num_kv_heads 2 --model.head_dim 32 --parallel.dp_shard 2 --data.micro_batch_size 1"
    resolved = resolve(load_config(file, words.split()), 2)
    assert (resolved.model.num_kv_heads, resolved.model.head_dim) == (2, 32)
    assert (resolved.parallel.dp_shard, resolved.data.micro_batch_size) == (2, 1)


def test_evaluation_turned_off_leaves_the_rest_valid(file: Path) -> None:
    resolved = resolve(load_config(file, ["--eval.every_steps", "0", "--eval.max_sequences", "8"]), 1)
    assert (resolved.eval.every_steps, resolved.eval.max_sequences) == (0, 8)


def test_every_number_has_a_range_and_every_range_a_number() -> None:
    fields = [leaf.key for leaf in walk(Config) if leaf.kind in (int, float)]
    assert sorted(RANGES) == sorted(fields)


def test_numbers_reach_into_tables_and_lists(file: Path) -> None:
    words = ["--model.rope_scaling", "{}", "--adapter.members.0.name", "a"]
    words += ["--adapter.overrides.0.targets", "[]", "--adapter.overrides.0.rank", "1"]
    keys = [key for key, _ in numbers(load_config(file, words))]
    assert "data.stores.0.weight" in keys
    assert {re.sub(r"\.0\.", ".N.", key) for key in keys} == set(RANGES)


def test_missing_files_are_named_with_what_to_do(file: Path) -> None:
    words = ["--data.stores.1.path", "b", "--data.stores.1.tokenizer", "t.model", "--model.init_from", "hf"]
    words += ["--data.stores.1.sources", '["python-stdlib", "texts"]', "--adapter.init_from", "peft"]
    assert missing_files(load_config(file, words)) == [
        "model.init_from = 'hf': no Hugging Face model there. Give a folder with config.json and *.safetensors.",
        "adapter.init_from = 'peft': no PEFT adapter there. Give a folder with adapter_config.json and "
        "adapter_model.safetensors.",
        "data.stores.0.path = 'data/x': no such token store. Make it with tools/prepare.py, or set "
        "data.stores.0.sources and a tokenizer.",
        "data.stores.1.sources = 'texts': no such file or folder. Give what is there to be read.",
        "data.stores.1.tokenizer = 't.model': no such file. Give a .model or tokenizer.json.",
    ]
    for store in ("data/x", "b"):
        Path(store).mkdir(parents=True)
        Path(store, "manifest.json").touch()
    Path("hf").mkdir()
    Path("hf/config.json").touch()
    Path("peft").mkdir()
    Path("peft/adapter_config.json").touch()
    assert missing_files(load_config(file, words)) == []


# ---- arithmetic of the remedies


@pytest.mark.parametrize("number", [1, 2, 7, 12, 36, 97, 1024])
def test_divisors_are_those_found_by_trying(number: int) -> None:
    assert divisors(number) == [one for one in range(1, number + 1) if number % one == 0]


def test_a_number_of_any_size_is_answered_at_once(file: Path) -> None:
    number = 2**62 + 2
    words = f"--data.global_batch_size {number} --run.steps {number} --model.num_heads {number}"
    assert len(problems(file, words, 4)) == 2


def test_choices_names_the_nearest_six() -> None:
    assert choices([1, 2, 4, 8], 3) == "1, 2, 4 or 8"
    assert choices([7], 3) == "7"
    assert choices(divisors(1024), 1000) == "32, 64, 128, 256, 512 or 1024"


def test_a_config_is_never_changed_by_checking(file: Path) -> None:
    config = load_config(file, [])
    copy = dataclasses.replace(config)
    check(config)
    resolve(config, 2)
    assert config == copy
