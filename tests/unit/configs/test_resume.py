"""What a resumed run may change: every field that the schema marks fixed is compared, and no other."""

from pathlib import Path
from typing import Any

import pytest

from configs.check import curve_notice, resolve, resume_differences
from configs.fields import walk
from configs.load import config_to_dict, load_config
from configs.schema import Config


def saved(file: Path, *words: str) -> dict[str, Any]:
    return config_to_dict(resolve(load_config(file, list(words)), 2))


def now(file: Path, *words: str, world_size: int = 2) -> Config:
    return resolve(load_config(file, list(words)), world_size)


def test_a_resumed_run_may_change_what_does_not_make_the_run(file: Path) -> None:
    words = """--run.steps 40 --run.name b --run.device cpu --model.num_kv_heads 4 --data.stores.0.path y
        --data.micro_batch_size 1 --checkpoint.every_steps 5 --metrics.every_steps 3 --eval.every_steps 0"""
    assert resume_differences(saved(file), now(file, *words.split(), world_size=4)) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--optim.lr 1e-3", ["optim.lr: the checkpoint has 0.0003, the config 0.001"]),
        ("--run.seed 1 --lr.schedule linear", [
            "run.seed: the checkpoint has 0, the config 1",
            'lr.schedule: the checkpoint has "cosine", the config "linear"',
        ]),
        ("--data.document_mask true", ["data.document_mask: the checkpoint has false, the config true"]),
        ("--data.stores.1.path b", ["data.stores: the checkpoint has 1 of them, the config 2 of them"]),
        ("--data.stores.0.weight 2", ["data.stores.0.weight: the checkpoint has 1.0, the config 2.0"]),
        ("--adapter.kind lora --adapter.targets [\"q_proj\"]", [
            'adapter.kind: the checkpoint has "none", the config "lora"',
            'adapter.targets: the checkpoint has ["all-linear"], the config ["q_proj"]',
        ]),
        ("--adapter.kind lora --adapter.members [{name=\"a\"},{name=\"b\"}]", [
            'adapter.kind: the checkpoint has "none", the config "lora"',
            "adapter.members: the checkpoint has [], the config 2 of them",
        ]),
        ("--model.rope_scaling {factor=4}", [
            "model.rope_scaling: the checkpoint has none, the config {factor = 4.0, low_freq_factor = 1.0, "
            "high_freq_factor = 4.0, original_max_seq_len = 8192}",
        ]),
    ],
)  # fmt: skip
def test_a_fixed_field_that_differs_is_named(file: Path, words: str, expected: list[str]) -> None:
    assert resume_differences(saved(file), now(file, *words.split())) == expected


def test_rope_scaling_is_compared_field_by_field(file: Path) -> None:
    before, after = saved(file, "--model.rope_scaling", "{}"), now(file, "--model.rope_scaling.factor", "32")
    assert resume_differences(before, after) == ["model.rope_scaling.factor: the checkpoint has 8.0, the config 32.0"]


def test_lists_of_tables_are_compared_field_by_field(file: Path) -> None:
    words = """--adapter.kind lora --adapter.overrides [{targets=["q_proj"],rank=4}]
        --adapter.members [{name="a",rank=4},{name="b",stores=["data/x"]}]"""
    before = saved(file, *words.split())
    other = words.replace("rank=4}]", "rank=8}]").replace('"b",stores=["data/x"]', '"c"')
    free = "--adapter.base sharded --data.micro_batch_size 1"
    assert resume_differences(before, now(file, *words.split(), *free.split())) == []
    assert resume_differences(before, now(file, *other.split())) == [
        "adapter.overrides.0.rank: the checkpoint has 4, the config 8",
        'adapter.members.1.name: the checkpoint has "b", the config "c"',
        'adapter.members.1.stores: the checkpoint has ["data/x"], the config []',
    ]


def test_a_field_that_the_checkpoint_does_not_know_had_its_default(file: Path) -> None:
    old = saved(file)
    del old["optim"]["beta1"], old["precision"]
    old["optim"]["gone"] = 3
    assert resume_differences(old, now(file)) == []
    assert resume_differences(old, now(file, "--optim.beta1", "0.8", "--precision.compute", "fp32")) == [
        "optim.beta1: the checkpoint has 0.9, the config 0.8",
        'precision.compute: the checkpoint has "bf16", the config "fp32"',
    ]


def test_every_field_marked_fixed_is_compared(file: Path) -> None:
    """Change each fixed value in the saved dict alone: the difference must be found, and none for a free field."""
    words = """--model.rope_scaling {} --adapter.kind lora --adapter.overrides [{targets=["q_proj"],rank=4}]
        --adapter.members [{name="a"},{name="b"}]"""
    config = now(file, *words.split())
    for leaf in walk(Config):
        tree = config_to_dict(config)
        *path, last = leaf.key.replace(".N.", ".0.").split(".")
        node: Any = tree
        for name in path:
            node = node[int(name)] if isinstance(node, list) else node[name]
        node[last] = None
        assert bool(resume_differences(tree, config)) == leaf.fixed, leaf.key


def test_another_number_of_steps_is_another_curve(file: Path) -> None:
    assert curve_notice(saved(file), now(file)) is None
    assert curve_notice(saved(file), now(file, "--run.steps", "40")) == (
        "run.steps: the checkpoint has 20, the config 40; under lr.schedule = 'cosine' the learning rate follows "
        "another curve from here on"
    )
    wsd = ("--lr.schedule", "wsd", "--lr.decay_steps", "5")
    assert curve_notice(saved(file, *wsd), now(file, *wsd, "--run.steps", "40")) == (
        "run.steps: the checkpoint has 20, the config 40; the last 5 steps, in which the learning rate falls, move "
        "with it"
    )
    constant = ("--lr.schedule", "constant")
    assert curve_notice(saved(file, *constant), now(file, *constant, "--run.steps", "40")) is None
