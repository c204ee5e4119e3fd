"""tools/lora_quickstart.py on a tiny base: its figures are the run's own, it reuses what is there, refuses what is stale."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine.metrics_log import read_metrics

ROOT = Path(__file__).resolve().parents[3]
TINY = ["--model.num_layers", "1", "--model.dim", "48", "--data.global_batch_size", "2", "--lr.warmup_steps", "1"]


def lora_quickstart(folder: Path) -> subprocess.CompletedProcess[str]:
    exported = folder / "exported" / "quickstart"
    command = [sys.executable, "tools/lora_quickstart.py", *TINY, "--run.dir", str(folder), "--run.steps", "3",
               "--data.stores.0.path", str(folder / "docs"), "--data.stores.0.max_bytes", "200_000",
               "--data.stores.0.tokenizer", str(exported / "tokenizer.model"), "--model.init_from", str(exported),
               "--optim.lr", "3e-2"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, trained for three steps by the quickstart."""
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "tools/quickstart.py", *TINY, "--run.dir", str(folder), "--run.steps", "3",
               "--data.stores.0.path", str(folder / "store"), "--data.stores.0.max_bytes", "1_500_000",
               "--eval.max_sequences", "4"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_it_shows_what_the_run_measured_and_reuses_what_is_there(folder: Path) -> None:
    done = lora_quickstart(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    table = dict(re.findall(r"^  (answers|Python sources), .*?((?: +\d+\.\d{4}){2})$", done.stdout, re.M))
    base, adapted = (float(number) for number in table["answers"].split())
    measured = [line["heldout_loss"] for line in read_metrics(folder / "lora-quickstart" / "metrics.jsonl")
                if line["kind"] == "eval"]  # fmt: skip
    # The base of the run is the model that was exported, and the saved adapter the one that was trained.
    assert base == pytest.approx(measured[0], abs=2e-3)
    assert adapted == pytest.approx(measured[-1], abs=2e-3)
    assert adapted < base
    assert "Python sources" in table
    for command in (
        r"tools/convert.py export \S+/quickstart \S+/exported/quickstart",
        r"torchrun --nproc-per-node 2 launchers/train.py configs/lora-quickstart.toml",
        r"tools/evaluate.py \S+/lora-quickstart --store \S+/docs --store \S+/store .*--no-adapter",
        r"tools/convert.py export \S+/lora-quickstart \S+/exported/lora-quickstart",
        r"tools/convert.py merge \S+/lora-quickstart \S+/exported/lora-quickstart-merged",
    ):
        assert re.search(command, done.stdout), command
    assert done.stdout.count("tools/generate.py") == 2
    assert (folder / "exported" / "lora-quickstart" / "adapter_model.safetensors").is_file()
    assert (folder / "exported" / "lora-quickstart-merged" / "model.safetensors").is_file()

    again = lora_quickstart(folder)
    assert again.returncode == 0, again.stderr
    assert "lora-quickstart is trained already; reusing it" in again.stdout
    assert again.stdout.count("is there already; reusing it") == 3
    assert "tools/convert.py" not in again.stdout
    assert re.findall(r"^  answers.*", again.stdout, re.M) == re.findall(r"^  answers.*", done.stdout, re.M)


def test_an_export_of_another_run_is_refused(folder: Path) -> None:
    exported = folder / "exported" / "quickstart"
    exported.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "quickstart" / "checkpoints" / "step-00000003"
    before = exported.stat()
    os.utime(exported, (0, 0))
    try:
        done = lora_quickstart(folder)
    finally:
        os.utime(exported, (before.st_atime, before.st_mtime))
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {exported}: is older than {checkpoint} (it was made from another run). "
        f"Remove {exported} and what was made from it.\n"
    )
