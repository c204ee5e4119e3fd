"""Ranks that fall silent or are gone, and a launcher that is: found by the process beside them, which nobody told.

Each fault is real: a stopped process, a thread that sleeps for ever, SIGKILL, a file that shrinks under its mapping.
"""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from configs.faults import FaultConfig
from engine.fault.record import read_lines
from engine.fault.watch import WatchedHeart, watched
from tests.ranks import RanksFailed, run_ranks
from tests.runs import SCRIPT, Processes, assert_same_end, last_step, run_to_end, until

HANG = ("--fault.hang_min_s", "4")
CONSTANT = ("--lr.schedule", "constant")


def inject(kind: str, **given: object) -> tuple[str, ...]:
    return tuple(
        word for name, value in {"kind": kind, **given}.items() for word in (f"--fault.inject.{name}", str(value))
    )


def faults_of(run: Path, kind: str) -> list[dict[str, Any]]:
    return [fault for fault in read_lines(run / "faults.jsonl") if fault["kind"] == kind]


def assert_ended_by_watchdog(processes: Processes, run: Path) -> dict[str, Any]:
    """Wait for the end; return the only hang there is on record, said word for word, with the stacks of all ranks."""
    assert processes.join(end_all=False) == [-signal.SIGKILL] * len(processes.ranks), processes.output()
    (fault,) = faults_of(run, "hang")
    (said,) = re.findall(r"^hang: (.*)$", processes.output(), re.M)
    assert said.startswith(fault["what"])
    assert faults_of(run, "rank_lost") == []
    folder = run.parents[1] / fault["more"]["folder"]
    for rank in range(len(processes.ranks)):
        stacks = (folder / f"rank-{rank:05d}.txt").read_text()
        assert "launchers/train.py" in stacks.split("most recent call first")[-1], "the main thread comes last"
    assert "Traceback" not in processes.output()
    return fault


def test_a_stopped_process_is_named_and_the_job_ends_and_goes_on(workplace: Path, whole: Path) -> None:
    """One of two: where all ranks of a node are stopped, somebody has suspended them."""
    run, command = workplace / "runs" / "stopped", ("--run.name", "stopped", *HANG, *inject("freeze", rank=1, step=12))
    with Processes(workplace, 2, *command) as processes:
        fault = assert_ended_by_watchdog(processes, run)
    assert (fault["rank"], fault["more"]["ranks"], fault["attempt"], fault["step"]) == (1, [1], 1, 12)
    assert re.match(r"no step for \d+ s, \d+ s are allowed: rank 1 is behind, its process is stopped", fault["what"])
    code, output = run_to_end(workplace, 2, *command)
    assert code == 0, output
    assert_same_end(run, whole)


def test_a_rank_that_hangs_outside_of_collectives_is_named_with_its_last_operation(workplace: Path) -> None:
    run = workplace / "runs" / "hung"
    with Processes(workplace, 2, "--run.name", "hung", *HANG, *inject("hang", rank=1, step=7)) as processes:
        fault = assert_ended_by_watchdog(processes, run)
    assert (fault["rank"], fault["step"]) == (1, 7)
    assert re.search(
        r"getting the data of step 7 at engine/fault/inject\.py:\d+ in _hang \(threading\.py:", fault["what"]
    ), fault["what"]
    assert re.search(r"its last collective: gloo:\w+ number \d+ \(done\)", fault["what"]), fault["what"]
    folder = workplace / fault["more"]["folder"]
    (node,) = folder.glob("node-*.json")
    first, second = json.loads(node.read_text())
    assert (first["waits"], second["waits"]) == (True, False)
    for rank in range(2):
        recorded = json.loads((folder / f"rank-{rank:05d}.json").read_text())["gloo"]["entries"]
        assert {"collective_seq_id", "profiling_name", "state"} <= set(recorded[-1])


@pytest.mark.long
def test_a_long_first_step_is_allowed(workplace: Path) -> None:
    """Longer than any later step may take."""
    slow = inject("straggle", rank=0, step=1, seconds=6)
    code, output = run_to_end(workplace, 2, "--run.name", "slow", *HANG, *slow)
    assert code == 0, output
    assert not (workplace / "runs" / "slow" / "stacks").exists()
    assert faults_of(workplace / "runs" / "slow", "hang") == []


@pytest.mark.long
def test_a_start_that_hangs_on_a_file_has_a_deadline_too(workplace: Path) -> None:
    """A pipe that nobody writes into is read as a dead network file system is: for ever."""
    run = workplace / "runs" / "stuck"
    (workplace / "silent").mkdir()
    os.mkfifo(workplace / "silent" / "manifest.json")
    command = ("--run.name", "stuck", "--data.stores.0.path", "silent", "--fault.first_step_timeout_s", "4")
    with Processes(workplace, 1, *command) as processes:
        fault = assert_ended_by_watchdog(processes, run)
    assert "rank 0 is behind, building the run at engine/data/store.py:" in fault["what"], fault["what"]


def watchdogs_of(run: Path | str) -> list[Path]:
    """Return the folders in /proc of the processes that watch a run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # gone since
            words = path.read_bytes().split(b"\0")
            if b"engine.fault.watchdog" in words and str(run).encode() in words:
                found.append(path.parent)
    return found


def ranks_held_by_watchdogs_of(run: Path | str) -> int:
    """Count the ranks whose memory the watchdogs of a run have; for a moment they have it twice."""
    memory = set()
    for process in watchdogs_of(run):
        with suppress(OSError):  # gone since
            memory |= {path.stat().st_ino for path in memory_in(process, "collectives")}  # which it opens last
    return len(memory)


def memory_in(process: Path, name: str) -> list[Path]:
    """Return the descriptors of ranks' memory of this name that a process holds."""
    found = []
    for path in (process / "fd").iterdir():
        with suppress(OSError):
            if f"memfd:{name}" in os.readlink(path):
                found.append(path)
    return found


def test_without_a_watchdog_there_is_no_process_and_no_memory_of_it(workplace: Path) -> None:
    run = workplace / "runs" / "unwatched"
    command = ("--run.name", "unwatched", "--run.steps", "2000", "--fault.watchdog", "false", "--fault.hang_min_s", "1")
    with Processes(workplace, 2, *command) as processes:
        processes.until(lambda: last_step(run) >= 3)
        assert watchdogs_of("runs/unwatched") == []
        assert memory_in(Path(f"/proc/{processes.ranks[0].pid}"), "beats") == []


def test_a_killed_rank_is_told_in_one_line(workplace: Path) -> None:
    run = workplace / "runs" / "killed"
    with Processes(workplace, 2, "--run.name", "killed", "--run.steps", "2000") as processes:
        processes.until(lambda: last_step(run) >= 6)
        processes.until(lambda: ranks_held_by_watchdogs_of("runs/killed") == 2)
        pid = processes.ranks[1].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        codes = processes.join(end_all=False)
        until(lambda: "rank_lost" in processes.output())
        (said,) = re.findall(r"^rank_lost: (.*)$", processes.output(), re.M)
        until(lambda: not watchdogs_of("runs/killed"))
    assert codes == [1, -signal.SIGKILL]
    (fault,) = faults_of(run, "rank_lost")
    where = f"rank 1 on {fault['host']}, step {fault['step']}"
    assert said == f"was killed by SIGKILL ({where}). The job ends. The same command continues from the last checkpoint"
    assert (fault["rank"], fault["more"]["ranks"], fault["more"]["signal"]) == (1, [1], "SIGKILL")
    assert fault["step"] >= 6


def test_a_killed_watchdog_is_started_again(workplace: Path) -> None:
    """And the new one knows the ranks: it tells which of them is lost."""
    run = workplace / "runs" / "revived"
    with Processes(workplace, 2, "--run.name", "revived", "--run.steps", "100000", *CONSTANT) as processes:
        processes.until(lambda: last_step(run) >= 3)
        (first,) = watchdogs_of("runs/revived")
        os.kill(int(first.name), signal.SIGKILL)
        processes.until(lambda: watchdogs_of("runs/revived") not in ([], [first]))
        processes.until(lambda: ranks_held_by_watchdogs_of("runs/revived") == 2)
        processes.ranks[1].kill()
        processes.join(end_all=False)
        until(lambda: not watchdogs_of("runs/revived"))
    kinds = [fault["kind"] for fault in read_lines(run / "faults.jsonl")]
    assert [kind for kind in kinds if kind != "straggler"] == ["watchdog_lost", "rank_lost"]
    said = "watchdog_lost: the watchdog's process is gone, and its ranks are not (rank 0 on "
    assert said in processes.output() and "It was started again\n" in processes.output()


def revived_until_left_alone(folder: str) -> list[str]:
    """Kill the watchdog again and again."""
    done: list[str] = []
    with watched(FaultConfig(), Path(folder), under_torchrun=False) as heart:
        while not done or "left alone" not in done[-1]:
            until(lambda: watchdogs_of(folder))
            for process in watchdogs_of(folder):
                os.kill(int(process.name), signal.SIGKILL)
            until(lambda: [done.append(text) for text in [heart.revive_watchdog()] if text])
        done.append(heart.revive_watchdog())
    return done


def revived_for_nothing(folder: str, end: str) -> str:
    """Find a watchdog gone that is not wanted: it may watch nobody, as it has said, or the run is leaving."""
    heart = WatchedHeart(FaultConfig())
    by_itself = end == "by itself"
    files = {name: "../fd" if by_itself else file for name, file in heart.files.items()}
    me = {"rank": 0, "pid": os.getpid(), "parent": 0, "host": "here", "files": files}
    heart.start_watchdog({"run": folder, "shown": folder, "began": "now", "ranks": [me], "nodes": [0]})
    if not by_itself:
        heart.beat(3, "end")
        (process,) = watchdogs_of(folder)
        os.kill(int(process.name), signal.SIGKILL)
    until(lambda: not watchdogs_of(folder))
    return heart.revive_watchdog()


@pytest.mark.parametrize("end", ["by itself", "killed while the run is leaving"])
def test_a_watchdog_that_is_not_wanted_is_not_started_again(tmp_path: Path, end: str) -> None:
    assert run_ranks(1, revived_for_nothing, str(tmp_path), end) == [""]


def test_a_watchdog_that_always_dies_is_left_alone_and_that_is_said(tmp_path: Path) -> None:
    (done,) = run_ranks(1, revived_until_left_alone, str(tmp_path))
    left = "It is left alone now; a hung run is ended by its collectives' time-outs"
    assert done == ["It was started again"] * 3 + [left, ""]


def read_under_a_shrinking_file(folder: str) -> None:
    """One of two ranks reads a mapping of a file that another process has cut."""
    with watched(FaultConfig(), Path(folder), under_torchrun=False) as heart:
        heart.beat(3, "data")
        file = Path(folder, f"mapped-{dist.get_rank()}")
        file.write_bytes(b"1" * 100_000)
        mapped = np.memmap(file, mode="r")
        until(lambda: ranks_held_by_watchdogs_of(folder) == dist.get_world_size())
        dist.barrier()
        if dist.get_rank() == 1:
            os.truncate(file, 0)
            int(mapped[0])
        dist.barrier()


def test_a_file_that_shrinks_under_its_mapping_is_told_by_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match="rank 1 of 2 was killed by SIGBUS"):
        run_ranks(2, read_under_a_shrinking_file, str(tmp_path))
    until(lambda: read_lines(tmp_path / "faults.jsonl"))
    (fault,) = read_lines(tmp_path / "faults.jsonl")
    assert (fault["kind"], fault["rank"], fault["step"], fault["more"]["signal"]) == ("rank_lost", 1, 3, "SIGBUS")
    place = r"tests/fault/test_hang\.py:\d+ in read_under_a_shrinking_file \(memmap\.py:\d+ in \w+\)"
    assert re.fullmatch(
        rf"died of SIGBUS at {place}: a file that was mapped became shorter \(data store or weights\)", fault["what"]
    )
    assert "Fatal Python error: Bus error" in Path(fault["file"]).read_text()


@pytest.mark.long
def test_ranks_without_their_torchrun_save_and_leave(workplace: Path) -> None:
    run = workplace / "runs" / "orphaned"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(SCRIPT), "tiny.toml", "--run.name", "orphaned", "--run.steps", "5000"]
    with subprocess.Popen(command, cwd=workplace, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as agent:
        until(lambda: last_step(run) >= 7 or agent.poll() is not None)
        agent.kill()
        # Ends when the last of those who hold its pipe has: the ranks, and the watchdog after them.
        output = agent.communicate(timeout=120)[0].decode()
    assert re.findall(r"^launcher_lost: (.*)$", output, re.M), output
    (fault,) = faults_of(run, "launcher_lost")
    assert fault["what"] == f"torchrun (process {agent.pid}) is gone, and its ranks were left alone"
    assert re.search(r"stopped by SIGTERM after step (\d+) of 5000: saved step \1; the same command goes on", output)
    assert faults_of(run, "rank_lost") == []
    newest = max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))
    assert newest == last_step(run) >= 7
