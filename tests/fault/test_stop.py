"""A run that is asked to stop saves and leaves with 0, all ranks after the same step; the same command goes on.

However it is asked: by a signal to any one rank, a file, a time limit, before its first step or in the middle of a
save. What comes of it in the end is what an undisturbed run comes to, bit for bit.
"""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from engine.checkpoint.manifest import list_steps
from engine.fault.record import read_lines
from tests.fault.test_run_kill import SLOW, children_of, stop_while_saving
from tests.runs import SCRIPT, STEPS, Processes, assert_same_end, freeze, last_step, run_to_end, stands_still, until


def send_to(start: Processes, rank: int, signum: signal.Signals) -> None:
    pid = start.ranks[rank].pid
    assert pid is not None
    with suppress(ProcessLookupError):  # ended, and reaped by the fork server
        os.kill(pid, signum)


def attempts_of(run: Path) -> list[dict[str, object]]:
    return read_lines(run / "attempts.jsonl")


def assert_saved_where_it_stopped(run: Path, output: str, asked: str) -> int:
    """All ranks left after the same step, which is the newest checkpoint; return it."""
    ended = attempts_of(run)[-1]
    step = ended["step"]
    assert isinstance(step, int)
    assert (ended["event"], ended["reason"]) == ("end", asked)
    assert list_steps(run / "checkpoints")[0] == step == last_step(run)
    assert f"stopped by {asked} after step {step} of {STEPS}: saved step {step}; the same command goes on\n" in output
    assert not list((run / "checkpoints").glob(".tmp-*"))
    return step


def test_a_signal_to_one_rank_stops_all_after_the_same_step(workplace: Path, whole: Path) -> None:
    """The other signals are injected in test_every_fault.py."""
    run = workplace / "runs" / "signal"
    with Processes(workplace, 2, "--run.name", "signal", *freeze(0, 8)) as start:
        start.until(lambda: stands_still(start.ranks[0].pid))
        for _ in range(2):  # SLURM sends SIGTERM twice
            send_to(start, 1, signal.SIGTERM)
        send_to(start, 0, signal.SIGCONT)
        assert start.join(end_all=False) == [0, 0], start.output()
        step = assert_saved_where_it_stopped(run, start.output(), "SIGTERM")
    assert 8 <= step < STEPS
    stops = [fault for fault in read_lines(run / "faults.jsonl") if fault["kind"] == "stop"]
    assert [(stop["step"], "SIGTERM" in stop["what"]) for stop in stops] == [(step, True)]
    code, output = run_to_end(workplace, 2, "--run.name", "signal")
    assert code == 0, output
    assert f"continuing from runs/signal/checkpoints/step-{step:08d}\nstart 2 of this run, 0 steps lost\n" in output
    assert_same_end(run, whole)


def test_a_stop_in_the_middle_of_a_save_waits_for_it(workplace: Path, whole: Path) -> None:
    run = workplace / "runs" / "saving"
    with Processes(workplace, 2, "--run.name", "saving", *SLOW) as start:
        caught = stop_while_saving(start, run / "checkpoints", 10)
        start.send(signal.SIGUSR2)
        start.send(signal.SIGCONT)
        assert start.join(end_all=False) == [0, 0], start.output()
        step = assert_saved_where_it_stopped(run, start.output(), "SIGUSR2")
    assert {step, caught} <= set(list_steps(run / "checkpoints"))
    assert run_to_end(workplace, 2, "--run.name", "saving")[0] == 0
    assert_same_end(run, whole)


def test_the_stop_file_stops_once(workplace: Path, whole: Path) -> None:
    run = workplace / "runs" / "file"
    command = ("--run.name", "file", "--run.steps", "2000", "--lr.schedule", "constant")
    with Processes(workplace, 2, *command) as start:
        start.until(lambda: last_step(run) >= 4)
        (run / "stop").touch()
        assert start.join(end_all=False) == [0, 0], start.output()
        assert "stopped by the stop file after step " in start.output()
    assert not (run / "stop").exists()
    with Processes(workplace, 2, *command) as start:
        stopped_at = list_steps(run / "checkpoints")[0]
        start.until(lambda: last_step(run) > stopped_at)


def test_the_time_limit_stops_too(workplace: Path) -> None:
    run = workplace / "runs" / "limit"
    command = (
        "--run.name",
        "limit",
        "--run.steps",
        "100000",
        "--checkpoint.every_steps",
        "0",
        "--eval.every_steps",
        "0",
    )
    code, output = run_to_end(workplace, 2, *command, "--fault.time_limit_s", "5")
    assert code == 0, output
    ended = attempts_of(run)[-1]
    assert ended["reason"] == "fault.time_limit_s"
    assert isinstance(ended["wall_s"], float) and ended["wall_s"] >= 5.0
    # On a very busy machine the start-up alone may take so long; then there is nothing to save.
    saved = list_steps(run / "checkpoints")
    assert saved == ([ended["step"]] if ended["step"] else [])


def test_a_signal_before_the_first_step_leaves_nothing_behind_but_the_history(workplace: Path, whole: Path) -> None:
    run = workplace / "runs" / "early"
    with Processes(workplace, 2, "--run.name", "early") as start:
        start.until((run / ".lock").exists)
        send_to(start, 0, signal.SIGTERM)
        assert start.join(end_all=False) == [0, 0], start.output()
        output = start.output()
    if "nothing to save" in output:  # else the signal came after the first step had begun
        assert list_steps(run / "checkpoints") == []
    assert run_to_end(workplace, 2, "--run.name", "early")[0] == 0
    assert_same_end(run, whole)


def test_one_process_stops_too(workplace: Path) -> None:
    run = workplace / "runs" / "alone"
    with Processes(workplace, 1, "--run.name", "alone", *freeze(0, 8)) as start:
        start.until(lambda: stands_still(start.ranks[0].pid))
        start.send(signal.SIGTERM)
        start.send(signal.SIGCONT)
        assert start.join() == [0], start.output()
        assert_saved_where_it_stopped(run, start.output(), "SIGTERM")


@pytest.mark.long
def test_torchrun_is_told_to_end(workplace: Path, whole: Path) -> None:
    """torchrun hands SIGTERM on, waits for its ranks, and fails by itself; the ranks have saved by then."""
    run = workplace / "runs" / "torchrun"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(SCRIPT), "tiny.toml", "--run.name", "torchrun", *freeze(1, 8)]
    with subprocess.Popen(command, cwd=workplace, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as agent:
        until(lambda: agent.poll() is not None or any(map(stands_still, children_of(agent.pid))))
        assert agent.poll() is None, agent.communicate()
        ranks = children_of(agent.pid)
        assert len(ranks) >= 2
        agent.send_signal(signal.SIGTERM)
        for pid in ranks:
            os.kill(pid, signal.SIGCONT)
        output, _ = agent.communicate(timeout=60)
    assert_saved_where_it_stopped(run, output, "SIGTERM")
    assert run_to_end(workplace, 2, "--run.name", "torchrun")[0] == 0
    assert_same_end(run, whole)
