"""tools/lora_quickstart.py on a tiny base: its figures are the run's own; what is there is reused, or refused."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.metrics_log import read_metrics
from tools import lora_quickstart, quickstart

ROOT = Path(__file__).resolve().parents[3]
TINY = ["--model.num_layers", "1", "--model.dim", "48", "--data.global_batch_size", "2", "--lr.warmup_steps", "1"]


def run_lora(folder: Path) -> int:
    exported = folder / "exported" / "quickstart"
    return lora_quickstart.main(
        [*TINY, "--run.dir", str(folder), "--run.steps", "3", "--optim.lr", "3e-2",
         "--data.stores.0.path", str(folder / "docs"), "--data.stores.0.max_bytes", "200_000",
         "--data.stores.0.tokenizer", str(exported / "tokenizer.model"), "--model.init_from", str(exported)]
    )  # fmt: skip


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of runs with a base, trained for three steps by the quickstart."""
    monkeypatch.chdir(ROOT)
    threads = torch.get_num_threads()
    argv = [*TINY, "--run.dir", str(tmp_path), "--run.steps", "3", "--data.stores.0.path", str(tmp_path / "store"),
            "--data.stores.0.max_bytes", "1_500_000", "--eval.max_sequences", "4"]  # fmt: skip
    assert quickstart.train(quickstart.CONFIG, argv) == 0
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.mark.long
def test_it_shows_what_the_run_measured_and_reuses_what_is_there(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_lora(base) == 0
    first = capsys.readouterr().out
    table = dict(re.findall(r"^  (answers|Python sources), .*?((?: +\d+\.\d{4}){2})$", first, re.M))
    before, after = (float(number) for number in table["answers"].split())
    lines = read_metrics(base / "lora-quickstart" / "metrics.jsonl")
    measured = [line["heldout_loss"] for line in lines if line["kind"] == "eval"]
    # The base of the run is the model that was exported, and the saved adapter the one that was trained.
    assert before == pytest.approx(measured[0], abs=2e-3)
    assert after == pytest.approx(measured[-1], abs=2e-3)
    assert after < before
    assert "Python sources" in table
    for command in (
        r"tools/convert.py export \S+/quickstart \S+/exported/quickstart",
        r"torchrun --nproc-per-node 2 launchers/train.py configs/lora-quickstart.toml",
        r"tools/evaluate.py \S+/lora-quickstart --store \S+/docs --store \S+/store .*--no-adapter",
        r"tools/convert.py export \S+/lora-quickstart \S+/exported/lora-quickstart",
        r"tools/convert.py merge \S+/lora-quickstart \S+/exported/lora-quickstart-merged",
    ):
        assert re.search(command, first), command
    assert first.count("tools/generate.py") == 2
    exported, left = base / "exported" / "lora-quickstart", base / "lora-quickstart" / "adapter"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (exported / name).read_bytes() == (left / name).read_bytes(), "a run leaves what export writes"
    assert (base / "exported" / "lora-quickstart-merged" / "model.safetensors").is_file()

    assert run_lora(base) == 0
    again = capsys.readouterr().out
    assert "lora-quickstart is trained already; reusing it" in again
    assert again.count("is there already; reusing it") == 3
    assert "tools/convert.py" not in again
    assert re.findall(r"^  answers.*", again, re.M) == re.findall(r"^  answers.*", first, re.M)

    exported, checkpoint = base / "exported" / "quickstart", base / "quickstart" / "checkpoints" / "step-00000003"
    os.utime(exported, (0, 0))
    assert run_lora(base) == 1
    assert capsys.readouterr().err == (
        f"error: {exported}: is older than {checkpoint} (it was made from another run). "
        f"Remove {exported} and what was made from it.\n"
    )
