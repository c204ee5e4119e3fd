"""tools/bench.py: both sides do the same work, and the last line is the ratio."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TINY = ["--model.vocab_size", "97", "--model.dim", "32", "--model.num_layers", "2", "--model.num_heads", "4",
        "--model.num_kv_heads", "2", "--model.ffn_dim", "48", "--data.seq_len", "16", "--data.global_batch_size", "4",
        "--data.micro_batch_size", "2", "--data.stores.0.train_tokenizer", "0", "--data.stores.0.sources", "[]",
        "--compile.blocks", "false", "--compile.loss", "false", "--precision.compute", "fp32",
        "--metrics.peak_tflops", "1", "--run.threads", "1", "--run.device", "cpu"]  # fmt: skip


@pytest.mark.long
def test_both_sides_train_the_same_model_and_the_last_line_is_the_ratio(tmp_path: Path) -> None:
    command = [sys.executable, "tools/bench.py", "configs/bench.toml", *TINY, "--rounds", "2", "--steps", "2"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "bench.json")], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "bench.json").read_text())
    ours, theirs = figures["sides"]["ours"], figures["sides"]["eager"]
    assert len(ours["losses"]) == 3 + 2 * 2  # the warm-up, and two turns of two steps
    for here, there in zip(ours["losses"], theirs["losses"], strict=True):
        assert abs(here - there) < 1e-5 * there
    assert done.stdout.splitlines()[-1] == f"ratio {figures['ratio']:.2f}"
    assert figures["ratio"] == ours["tokens_per_s"] / theirs["tokens_per_s"]
    assert re.search(r"memory ratio \d+\.\d\d", done.stdout)


def test_a_wrong_config_is_one_message() -> None:
    command = [sys.executable, "tools/bench.py", "configs/bench.toml", "--model.dims", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "error: --model.dims: unknown option; did you mean --model.dim?\n"


@pytest.mark.long
def test_lora_here_and_in_peft_do_the_same_work(tmp_path: Path) -> None:
    """With DoRA, which has all parts of LoRA and one more."""
    command = [sys.executable, "tools/bench.py", "lora", "configs/bench.toml", *TINY, "--rounds", "1", "--steps", "2"]
    command += ["--adapter.rank", "4", "--optim.lr", "1e-2", "--adapter.dora", "true"]
    file = tmp_path / "lora.json"
    done = subprocess.run([*command, "--json", str(file)], cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    ours, theirs = figures["sides"]["ours"], figures["sides"]["peft"]
    assert len(ours["losses"]) == 3 + 2
    for here, there in zip(ours["losses"], theirs["losses"], strict=True):
        assert abs(here - there) < 1e-5 * there
    assert done.stdout.splitlines()[-1] == f"ratio {figures['ratio']:.2f}"
    assert figures["ratio"] == ours["tokens_per_s"] / theirs["tokens_per_s"]


@pytest.mark.long
def test_what_peft_would_not_do_is_not_compared() -> None:
    command = [sys.executable, "tools/bench.py", "lora", "configs/bench.toml", *TINY]
    done = subprocess.run(
        [*command, "--adapter.dropout", "0.1", "--adapter.lora_plus_ratio", "4"], cwd=ROOT, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    for line in (
        "adapter.dropout = 0.1: is not compared (the other side would not do it). Remove it.",
        "adapter.lora_plus_ratio = 4.0: is not compared (the other side would not do it). Remove it.",
    ):
        assert line in done.stderr
    other = subprocess.run(
        [*command, "--adapter.kind", "bottleneck"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert other.stderr == "error: adapter.kind = 'bottleneck': must be lora, which is what is compared.\n"


@pytest.mark.long
def test_layouts_do_the_same_work_as_one_process(tmp_path: Path) -> None:
    command = [sys.executable, "tools/bench.py", "layouts", "configs/bench.toml", *TINY]
    command += ["--layouts", "dp_shard=2", "cp=2,schedule=1F1B,pp=1", "--rounds", "1", "--steps", "2"]
    file = tmp_path / "layouts.json"
    done = subprocess.run([*command, "--json", str(file)], cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    assert list(figures) == ["dp_shard=2", "cp=2,schedule=1F1B,pp=1"]
    first = figures["dp_shard=2"]["losses"]
    for found in figures.values():
        assert found["ranks"] == 2
        assert found["ratio"] == found["one_process_step_s"] / found["step_s"]
        assert 0 <= found["own_share"] < 1
        assert len(found["losses"]) == 2 + 2
        for mine, theirs in zip(found["losses"], first, strict=True):
            assert abs(mine - theirs) < 1e-5 * theirs
    assert len(done.stdout.splitlines()) == 1 + 2


def test_a_layout_that_does_not_fit_is_one_message() -> None:
    command = [sys.executable, "tools/bench.py", "layouts", "configs/bench.toml", *TINY, "--layouts", "tp=2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: parallel.tp = 2: must divide model.vocab_size = 97")


@pytest.mark.parametrize("what", [[], ["layouts"]], ids=["one process", "layouts"])
def test_float8_that_would_be_emulated_is_not_measured(what: list[str]) -> None:
    given = [{"fp32": "bf16", "97": "96"}.get(word, word) for word in TINY]
    layouts = ["--layouts", "dp_shard=2"] if what else []
    command = [sys.executable, "tools/bench.py", *what, "configs/bench.toml", *given, *layouts]
    command += ["--precision.float8", "tensorwise"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: precision.float8 = 'tensorwise': needs a GPU of compute capability")
