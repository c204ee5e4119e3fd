"""tools/quickstart.py, with fewer steps: it prints what it promises, and reuses what is there."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def quickstart(tmp_path: Path) -> str:
    overrides = ["--run.dir", str(tmp_path), "--data.stores.0.path", str(tmp_path / "store"), "--run.steps", "3",
                 "--data.stores.0.max_bytes", "1_500_000", "--lr.warmup_steps", "1", "--eval.max_sequences", "4",
                 "--data.global_batch_size", "2", "--model.num_layers", "1", "--model.dim", "48"]  # fmt: skip
    command = [sys.executable, "tools/quickstart.py", *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout


def test_it_prints_what_it_promises_and_reuses_what_is_there(tmp_path: Path) -> None:
    first = quickstart(tmp_path)
    for what in (
        r"before training\s+\d+\.\d{4}\s+\d+\.\d{4}",
        r"after training\s+\d+\.\d{4}\s+\d+\.\d{4}",
        r"[\d,]+ tokens/s on 2 ranks, MFU [\d.]+% \([\d.]+% with causal attention\), [\d.]+% of the measured GEMM rate",
        r"store\s+token store and tokenizer",
        r"sample: python tools/generate.py \S+ --prompt 'def '",
        r"step\s+3/3\s+loss",
    ):
        assert re.search(what, first), what
    again = quickstart(tmp_path)
    assert "is trained already; reusing it" in again
    assert "step 1/3" not in again
    assert re.findall(r"after training.*", again) == re.findall(r"after training.*", first)
