"""torchrun starts the ranks again when one has died: they go on by themselves, and a loop that leads nowhere ends."""

import subprocess
import sys
from pathlib import Path

import pytest

from engine.fault.record import read_lines
from tests.fault.test_run_kill import assert_same_end
from tests.runs import SCRIPT, run_to_end

SYNC = ("--checkpoint.asynchronous", "false")
"""Else a rank may be gone before the save of some steps ago is sealed."""


def torchrun(workplace: Path, n: int, restarts: int, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--monitor-interval", "0.1"]
    command += ["--nproc-per-node", str(n), "--max-restarts", str(restarts), str(SCRIPT), "tiny.toml", *argv]
    return subprocess.run(command, cwd=workplace, capture_output=True, text=True, timeout=240)


def strikes(kind: str, rank: int, step: int, *more: str) -> tuple[str, ...]:
    inject = {"kind": kind, "rank": str(rank), "step": str(step)}
    return tuple(word for name, value in inject.items() for word in (f"--fault.inject.{name}", value)) + more


def test_torchrun_goes_on_by_itself(workplace: Path) -> None:
    """One rank is killed in a save, and both are started again. torch 2.13 alone can't: its agent keeps one store,
    where the new ranks find the addresses of the dead ones.
    """
    assert run_to_end(workplace, 2, "--run.name", "whole")[0] == 0
    done = torchrun(workplace, 2, 1, "--run.name", "again", *strikes("kill_in_save", 1, 15), *SYNC)
    assert done.returncode == 0, done.stderr
    run = workplace / "runs" / "again"
    assert "continuing from runs/again/checkpoints/step-00000010\nstart 2 of this run, " in done.stdout
    history = read_lines(run / "attempts.jsonl")
    starts = [(line["from_step"], line["restart_count"]) for line in history if line["event"] == "start"]
    assert starts == [(0, 0), (10, 1)]
    assert_same_end(run, workplace / "runs" / "whole")


@pytest.mark.long
def test_a_crash_loop_ends(workplace: Path) -> None:
    """A fault of the program comes again at the same step, before anything newer is saved."""
    loop = ("--run.name", "loop", *strikes("exception", 0, 7, "--fault.inject.repeat", "true"), *SYNC)
    done = torchrun(workplace, 1, 3, *loop, "--fault.max_fruitless_starts", "2")
    assert done.returncode == 1
    run = workplace / "runs" / "loop"
    starts = [line["from_step"] for line in read_lines(run / "attempts.jsonl") if line["event"] == "start"]
    assert starts == [0, 5, 5]
    refusal = (
        "error: runs/loop: no progress since step 5, not started again (the last 2 starts all began there and saved"
    )
    assert refusal in done.stderr
