"""Several adapters in one run of the real command: their records, files and exports are those of their single runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from configs.check import resolve
from configs.load import load_config
from engine.checkpoint.checkpointer import open_checkpoint
from engine.data.prepare import PrepareOptions, prepare
from engine.metrics_log import read_metrics
from models.hf_write import write_hf
from models.llama import Llama
from tests.runs import make_texts, make_workplace, run_to_end
from tools import convert

HALF, ALL = 3, 6
COMMON = (
    "--model.init_from", "hf", "--adapter.kind", "lora", "--adapter.targets", '["q_proj","down_proj","lm_head"]',
    "--adapter.dropout", "0.1", "--precision.compute", "fp64", "--precision.master", "fp64",
    "--lr.schedule", "constant", "--checkpoint.every_steps", str(HALF), "--eval.every_steps", str(ALL),
)  # fmt: skip
BOTH = ("--data.stores.1.path", "other", "--data.stores.1.weight", "0.5")
TOGETHER = (
    *BOTH, "--adapter.members",
    '[{name="a",rank=2,lr=1e-2,stores=["store"]},{name="b",rank=3,alpha=5.0,seed=7}]',
)  # fmt: skip
ALONE = {
    "a": ("--adapter.rank", "2", "--optim.lr", "1e-2"),
    "b": (*BOTH, "--adapter.rank", "3", "--adapter.alpha", "5.0", "--run.seed", "7"),
}


def train(workplace: Path, n: int, name: str, *argv: str, steps: int = ALL) -> str:
    code, output = run_to_end(workplace, n, *COMMON, *argv, "--run.name", name, "--run.steps", str(steps))
    assert code == 0, output
    return output


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_workplace(tmp_path_factory.mktemp("workplace"))
    make_texts(folder / "more", "flax")
    tokenizer = folder / "store" / "tokenizer"
    prepare(PrepareOptions(sources=(str(folder / "more"),), out=folder / "other", tokenizer=tokenizer, workers=1))
    config = resolve(load_config(folder / "tiny.toml", []), 1).model
    torch.manual_seed(3)
    write_hf(folder / "hf", config, Llama(config).named_parameters(), dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def together(workplace: Path) -> str:
    return train(workplace, 2, "together", *TOGETHER)


def entries(workplace: Path, name: str) -> list[dict[str, Any]]:
    return read_metrics(workplace / "runs" / name / "metrics.jsonl")


def test_each_member_has_the_records_and_the_export_of_its_single_run(workplace: Path, together: str) -> None:
    assert convert.main(["export", str(workplace / "runs" / "together"), str(workplace / "exported")]) == 0
    for name, settings in ALONE.items():
        train(workplace, 1, name, *settings)
        records = zip(entries(workplace, "together"), entries(workplace, name), strict=True)
        for mine, single in records:
            member = mine["members"][name]
            for key in {"eval": ("heldout_loss", "bits_per_byte", "heldout_tokens"),
                        "step": ("loss", "grad_norm", "lr", "num_tokens")}[mine["kind"]]:  # fmt: skip
                assert member[key] == pytest.approx(single[key], rel=1e-9), (key, mine["step"])
        assert convert.main(["export", str(workplace / "runs" / name), str(workplace / f"alone-{name}")]) == 0
        ours, truth = (load_file(workplace / folder / "adapter_model.safetensors")
                       for folder in (f"exported/{name}", f"alone-{name}"))  # fmt: skip
        assert ours.keys() == truth.keys() and ours
        for key, tensor in truth.items():
            assert torch.allclose(ours[key], tensor, rtol=0, atol=1e-9 * tensor.abs().max().item()), key
            assert tensor.abs().max() > 0, f"{key} was not trained"
        assert (workplace / "exported" / name / "adapter_config.json").read_text() == (
            workplace / f"alone-{name}" / "adapter_config.json"
        ).read_text()


def test_the_records_say_means_and_sums_over_the_members(workplace: Path, together: str) -> None:
    steps = [entry for entry in entries(workplace, "together") if entry["kind"] == "step"]
    for entry in steps:
        a, b = entry["members"]["a"], entry["members"]["b"]
        for key in ("loss", "grad_norm", "lr"):
            assert entry[key] == pytest.approx((a[key] + b[key]) / 2, rel=1e-12)
        assert entry["num_tokens"] == a["num_tokens"] + b["num_tokens"]
    assert [entry["members"]["a"]["lr"] for entry in steps[:2]] == [5e-3, 1e-2], "the warmup is that of optim.lr"
    heldout = [entry for entry in entries(workplace, "together") if entry["kind"] == "eval"][-1]
    a, b = heldout["members"]["a"], heldout["members"]["b"]
    assert heldout["heldout_loss"] == pytest.approx((a["heldout_loss"] + b["heldout_loss"]) / 2, rel=1e-12)
    assert heldout["heldout_tokens"] == a["heldout_tokens"] + b["heldout_tokens"]
    last = steps[-1]["members"]
    assert f"a {last['a']['loss']:.4f}  b {last['b']['loss']:.4f}" in together


def test_a_run_of_members_resumes_to_the_same_bits(workplace: Path, together: str) -> None:
    train(workplace, 2, "parts", *TOGETHER, steps=HALF)
    assert "continuing from" in train(workplace, 2, "parts", *TOGETHER)
    whole, parts = (steps_only(entries(workplace, name)) for name in ("together", "parts"))
    assert parts == whole
    saved = [
        open_checkpoint(workplace / "runs" / name / "checkpoints" / f"step-{ALL:08d}") for name in ("together", "parts")
    ]
    assert saved[0].manifest.files == saved[1].manifest.files, "weights and moments, by their hashes"


def steps_only(records: Sequence[dict[str, Any]]) -> list[Any]:
    names = ("step", "loss", "grad_norm", "num_tokens", "members")
    return [[entry[name] for name in names] for entry in records if entry["kind"] == "step"]


def test_a_member_that_diverges_ends_the_run_by_name(workplace: Path) -> None:
    members = TOGETHER[-1].replace("seed=7", "seed=7,lr=1e150")
    argv = (*COMMON, *TOGETHER[:-1], members, "--run.name", "sick", "--run.steps", str(ALL))
    code, output = run_to_end(workplace, 1, *argv)
    assert code == 1, output
    assert ": member 'b': loss " in output and "member 'a'" not in output
    assert "must be finite (no update of theirs was applied; a run of several members doesn't go back, for " in output
