"""A run is killed for real, at several moments, and the same command continues it: bit for bit, as if nothing had been.

Each test ends by comparing with one uninterrupted run: all that metrics.jsonl says of the steps, line by line, and
every tensor of the last checkpoint, weights and moments.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runs import SCRIPT, STEPS, Processes, assert_same_end, freeze, run_to_end, stands_still, steps_of, until


@pytest.fixture(scope="module")
def whole(workplace: Path) -> Path:
    """The folder of the run that nobody interrupted."""
    code, output = run_to_end(workplace, 2, "--run.name", "whole")
    assert code == 0, output
    run = workplace / "runs" / "whole"
    evaluated = [0, 10, 20, STEPS]
    assert [line[1] for line in steps_of(run) if line[0] == "step"] == list(range(1, STEPS + 1))
    assert [line[1] for line in steps_of(run) if line[0] == "eval"] == evaluated
    return run


SLOW = ("--fault.inject.kind", "slow_disk", "--fault.inject.step", "10", "--fault.inject.seconds", "1.5")
"""A save that is long enough to be found half written."""


def stop_while_saving(processes: Processes, checkpoints: Path, step: int) -> int:
    """Return when all ranks stand still and a checkpoint of `step` or later is half written: of which step."""
    caught: list[int] = []

    def half_written() -> list[int]:
        return [number for path in checkpoints.glob(".tmp-step-*") if (number := int(path.name[10:18])) >= step]

    def stopped_in_it() -> bool:
        if not half_written():
            return False
        processes.send(signal.SIGSTOP)
        until(lambda: all(stands_still(rank.pid) or rank.exitcode is not None for rank in processes.ranks))
        caught[:] = half_written()
        if not caught:
            processes.send(signal.SIGCONT)
        return bool(caught)

    processes.until(stopped_in_it)
    return caught[0]


def test_killed_at_any_moment_the_same_command_continues_bit_for_bit(workplace: Path, whole: Path) -> None:
    """Saves in the background; test_random_kills.py has the blocking ones too."""
    run, command = workplace / "runs" / "killed", ("--run.name", "killed")
    moments: list[tuple[tuple[str, ...], Callable[[Processes], object]]] = [
        ((), lambda start: start.until((run / ".lock").exists)),
        (freeze(1, 4), lambda start: start.until(lambda: stands_still(start.ranks[1].pid))),  # nothing is saved yet
        (freeze(1, 9), lambda start: start.until(lambda: stands_still(start.ranks[1].pid))),
        (SLOW, lambda start: stop_while_saving(start, run / "checkpoints", 10)),
    ]
    for fault, moment in moments:
        with Processes(workplace, 2, *command, *fault) as start:
            moment(start)
            start.send(signal.SIGKILL)
            assert start.join() == [-signal.SIGKILL] * 2
    assert list((run / "checkpoints").glob(".tmp-step-*"))
    code, output = run_to_end(workplace, 2, *command)
    assert code == 0, output
    assert "continuing from runs/killed/checkpoints/step-000000" in output
    assert not list((run / "checkpoints").glob(".tmp-step-*"))
    assert_same_end(run, whole)


@pytest.mark.long
def test_torchrun_and_all_its_ranks_killed(workplace: Path, whole: Path) -> None:
    """The whole process group at once, as when a node goes down; started as a user would."""
    run = workplace / "runs" / "torchrun"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(SCRIPT), "tiny.toml", "--run.name", "torchrun", *freeze(1, 8)]
    with subprocess.Popen(command, cwd=workplace, stderr=subprocess.PIPE, process_group=0) as agent:
        saved = run / "checkpoints" / "step-00000005"
        until(lambda: agent.poll() is not None or (saved.exists() and any(map(stands_still, children_of(agent.pid)))))
        assert agent.poll() is None, agent.communicate()
        # Each rank has a session of its own, so one signal to a group would not do.
        ranks = children_of(agent.pid)
        assert len(ranks) == 2
        for pid in (agent.pid, *ranks):
            os.kill(pid, signal.SIGKILL)
        agent.communicate()
    assert not (run / "checkpoints" / f"step-{STEPS:08d}").exists()
    code, output = run_to_end(workplace, 2, "--run.name", "torchrun")
    assert code == 0, output
    assert "continuing from runs/torchrun/checkpoints/step-000000" in output
    assert_same_end(run, whole)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.long
def test_ctrl_c_ends_quietly_and_the_same_command_continues(workplace: Path, whole: Path) -> None:
    """Once in a step, and once in the middle of a save, where DCP catches everything."""
    run = workplace / "runs" / "interrupted"
    command = ("--run.name", "interrupted", "--checkpoint.asynchronous", "false")
    moments: list[tuple[tuple[str, ...], Callable[[Processes], object]]] = [
        (freeze(1, 8), lambda start: start.until(lambda: stands_still(start.ranks[1].pid))),
        (SLOW, lambda start: stop_while_saving(start, run / "checkpoints", 10)),
    ]
    for fault, moment in moments:
        with Processes(workplace, 2, *command, *fault) as start:
            moment(start)
            start.send(signal.SIGINT)
            start.send(signal.SIGCONT)
            assert start.join(end_all=False) == [130, 130], start.output()
            assert not re.search("Traceback|error|Interrupt", start.output()), start.output()
    code, output = run_to_end(workplace, 2, *command)
    assert code == 0, output
    assert_same_end(run, whole)


def test_a_truncated_checkpoint_is_refused_by_name_and_the_one_before_it_used(workplace: Path, whole: Path) -> None:
    run = workplace / "runs" / "truncated"
    shutil.copytree(whole, run)
    newest = run / "checkpoints" / f"step-{STEPS:08d}"
    shard = newest / "model-rank-00001.safetensors"
    size = shard.stat().st_size
    os.truncate(shard, size - 100)
    code, output = run_to_end(workplace, 2, "--run.name", "truncated")
    assert code == 0, output
    refusal = f"refused {newest.name}: {shard.name} has {size - 100} bytes, the manifest says {size}\n"
    assert refusal + "continuing from runs/truncated/checkpoints/step-00000020\n" in output
    assert_same_end(run, whole)


def test_a_run_without_any_good_checkpoint_is_not_started_over(workplace: Path, whole: Path) -> None:
    run = workplace / "runs" / "broken"
    shutil.copytree(whole, run)
    steps = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert len(steps) >= 2
    for step in steps:
        with (run / "checkpoints" / step / "model-rank-00000.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x55")
    before = (run / "metrics.jsonl").read_bytes()
    code, output = run_to_end(workplace, 2, "--run.name", "broken")
    assert code == 1
    assert "error: runs/broken/checkpoints: no checkpoint can be loaded:\n" in output
    for step in steps:
        assert f"  {step}: model-rank-00000.safetensors has sha256 " in output
    assert "Restore one of them from a copy, or move the folder away to start the run from its beginning.\n" in output
    assert (output.count("error:"), output.count("Traceback")) == (1, 0)
    assert (run / "metrics.jsonl").read_bytes() == before
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == steps
