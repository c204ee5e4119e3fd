"""tools/quickstart.py, with fewer steps: it prints what it promises, reuses what is there, and ends with its ranks."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT, processes_naming


def command(tmp_path: Path, steps: int) -> list[str]:
    overrides = ["--run.dir", str(tmp_path), "--data.stores.0.path", str(tmp_path / "store"), "--run.steps", str(steps),
                 "--data.stores.0.max_bytes", "1_500_000", "--lr.warmup_steps", "1", "--eval.max_sequences", "4",
                 "--data.global_batch_size", "2", "--model.num_layers", "1", "--model.dim", "48",
                 "--metrics.gemm_seconds", "0.05"]  # fmt: skip
    return [sys.executable, "tools/quickstart.py", *overrides]


def quickstart(tmp_path: Path) -> str:
    done = subprocess.run(command(tmp_path, 3), cwd=ROOT, capture_output=True, text=True, timeout=180)
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
        r"sample: \S+python\S* tools/generate.py \S+ --prompt 'def '",
        r"step\s+3/3\s+loss",
    ):
        assert re.search(what, first), what
    again = quickstart(tmp_path)
    assert "is trained already; reusing it" in again
    assert "step 1/3" not in again
    assert re.findall(r"after training.*", again) == re.findall(r"after training.*", first)


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize(("signum", "again"), [(signal.SIGINT, False), (signal.SIGHUP, True)])
def test_interrupted_it_saves_and_leaves_no_rank_behind(signum: int, again: bool, tmp_path: Path) -> None:
    """Again, and it doesn't wait for that. torchrun gives each rank a session, which no signal to its group reaches."""
    process = subprocess.Popen(
        command(tmp_path, 100_000), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if re.match(r"step\s+1/", line):
            break
    ranks = [pid for pid, line in processes_naming(tmp_path).items() if " -u launchers/train.py" in line]
    if again:  # so that the ranks can't be done before the second signal
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
    process.send_signal(signum)
    if again:
        for line in process.stdout:
            lines.append(line)
            if "interrupted: " in line:
                break
        process.send_signal(signum)
    rest = process.communicate(timeout=60)[0]  # ends only when nobody holds the pipe any more
    output = "".join(lines) + rest
    assert len(ranks) == 2, output
    assert process.returncode == 130
    assert "interrupted: the ranks save and leave; again ends them at once, unsaved\n" in output
    if again:
        assert "ended; the same command continues from the last checkpoint, if there was one\n" in rest
    else:
        assert re.search(
            r"stopped by SIGTERM after step (\d+) of 100000: saved step \1; the same command goes on", rest
        )
    assert "Traceback" not in output and "ChildFailedError" not in output
    assert processes_naming(tmp_path) == {}
