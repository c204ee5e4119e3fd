"""The watchdog beside real processes that are no ranks of torch: nodes that judge together, and how processes ended.

The processes beat as a rank does and then stand still.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from engine.fault import watchdog as module
from engine.fault.ending import Ending, how_it_ended, oom_kills
from engine.fault.heartbeat import Beat, Phase, Pulse
from engine.fault.record import read_lines
from engine.fault.watchdog import Watchdog, Watched, all_written
from tests.runs import until

RANK = """
import faulthandler, json, os, signal, sys
from configs.faults import FaultConfig
from engine.fault.heartbeat import SIZE, Heart
from engine.fault.watchdog import DUMP_SIGNAL
rank, step, timeout_s, node = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
files = {name: os.memfd_create(name) for name in ("beats", "stacks", "collectives")}
os.ftruncate(files["beats"], SIZE)
heart = Heart(FaultConfig(first_step_timeout_s=timeout_s), files["beats"])
faulthandler.register(DUMP_SIGNAL, files["stacks"])
heart.beat(step, "step")
print(json.dumps({"rank": rank, "pid": os.getpid(), "parent": 0, "host": node, "files": files}), flush=True)
for line in sys.stdin:
    heart.beat(step, "step")
    if line == "leave\\n":
        heart.leave()
    print("done", flush=True)
signal.pause()
"""


class Rank:
    """A process that beats."""

    def __init__(self, rank: int, step: int, timeout_s: int, node: str = "n1") -> None:
        command = [sys.executable, "-c", RANK, str(rank), str(step), str(timeout_s), node]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.entry = json.loads(self.process.stdout.readline())

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"


@contextmanager
def started(*ranks: Rank) -> Iterator[None]:
    with ExitStack() as stack:
        for rank in ranks:
            stack.enter_context(rank.process)
            stack.callback(rank.process.kill)
        yield


def job_of(run: Path, nodes: list[int], *ranks: Rank) -> dict[str, Any]:
    """Return what a watchdog is told at its start."""
    return {"run": str(run), "shown": "runs/x", "began": "now", "nodes": nodes, "ranks": [rank.entry for rank in ranks]}


@contextmanager
def watchdog(run: Path, nodes: list[int], *ranks: Rank) -> Iterator["subprocess.Popen[str]"]:
    job = job_of(run, nodes, *ranks)
    command = [sys.executable, "-P", "-m", "engine.fault.watchdog", str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps(job))
        process.stdin.close()
        # It takes hold of a rank's process first and of its memory last.
        until(lambda: pids_in(process) >= {rank.process.pid for rank in ranks} and memories_of(process) >= len(ranks))
        try:
            yield process
        finally:
            process.kill()


def memories_of(process: "subprocess.Popen[str]") -> int:
    """Count the ranks whose memory a watchdog has, by the file that it opens last."""
    found = set()
    for path in Path(f"/proc/{process.pid}/fd").glob("*"):
        with suppress(OSError):
            if "memfd:collectives" in os.readlink(path):
                found.add(path.stat().st_ino)
    return len(found)


def pids_in(process: "subprocess.Popen[str]") -> set[int]:
    """Return the processes that a watchdog has got hold of."""
    found: set[int] = set()
    for path in Path(f"/proc/{process.pid}/fdinfo").glob("*"):
        try:
            words = path.read_text().split()
        except OSError:
            continue
        if "Pid:" in words:
            found.add(int(words[words.index("Pid:") + 1]))
    return found


def said(process: "subprocess.Popen[str]") -> str:
    assert process.stderr is not None
    return process.stderr.read()


def test_the_nodes_judge_together(tmp_path: Path) -> None:
    """The rank that is behind is on the node whose own watchdog would have waited for half an hour."""
    first, second = Rank(0, 5, 1, "n1"), Rank(1, 4, 1800, "n2")
    with started(first, second), watchdog(tmp_path, [0, 1], first) as one, watchdog(tmp_path, [0, 1], second) as other:
        assert (first.process.wait(30), second.process.wait(30)) == (-signal.SIGKILL, -signal.SIGKILL)
        assert (one.wait(30), other.wait(30)) == (0, 0)
        lines, others_lines = said(one).splitlines(), said(other)
    (fault,) = read_lines(tmp_path / "faults.jsonl")
    assert (fault["kind"], fault["rank"], fault["host"], fault["step"]) == ("hang", 1, "n2", 4)
    assert len(lines) == 1 and lines[0].startswith("hang: no step for ") and others_lines == ""
    found = {path.name for path in (tmp_path / "stacks" / "now").iterdir()}
    assert found == {"node-00000.json", "node-00001.json", "rank-00000.txt", "rank-00001.txt", "verdict.json"}


@pytest.mark.parametrize("with_watchdog", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_job_that_was_suspended_is_no_silent_one(tmp_path: Path, with_watchdog: bool) -> None:
    """All ranks stood still for longer than any may be silent, and the watchdog with them or not."""
    ranks = [Rank(0, 5, 3), Rank(1, 5, 3)]
    with started(*ranks), watchdog(tmp_path, [0], *ranks) as process:
        pids = [*(rank.process.pid for rank in ranks), *([process.pid] if with_watchdog else [])]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(4)  # what is tested is that time passes
        for pid in reversed(pids):
            os.kill(pid, signal.SIGCONT)
        for word in ("beat", "leave"):
            for rank in ranks:
                rank.tell(word)
        assert process.wait(30) == 0
        assert (said(process), [rank.process.poll() for rank in ranks]) == ("", [None, None])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "other",
    [
        {"phase": "checkpoint", "allowed_s": 1800.0},  # the end of a long save falls between two looks
        {"phase": "data", "allowed_s": 0.1},  # the rank was late, and comes on before the second look
    ],
)
def test_a_rank_that_comes_on_while_it_is_looked_at_is_not_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]
) -> None:
    class Coming(Pulse):
        """Every second look finds an old beat, every other one a new beat that allows little."""

        looks = 0

        def read(self) -> Beat:
            self.looks += 1
            gone = self.looks >= 20
            if self.looks % 2:
                return Beat(step=6, phase="data", at=time.monotonic(), allowed_s=0.1, gone=gone)
            return Beat(step=5, at=0.0, gone=gone, **other)

    monkeypatch.setattr(module, "Pulse", Coming)
    told: list[str] = []
    rank = Rank(0, 5, 1800)
    with started(rank):
        Watchdog(job_of(tmp_path, [0], rank), told.append).run()
        assert (told, rank.process.poll()) == ([], None)


@pytest.mark.parametrize(("phase", "kinds"), [("end", []), ("checkpoint", ["hang"])])
def test_who_waits_for_a_rank_that_is_telling_of_an_error_is_not_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: Phase, kinds: list[str]
) -> None:
    """As while an out-of-memory rank writes its snapshot; a rank in a checkpoint is no such reason."""
    pulses: list[Pulse] = []

    class Fixed(Pulse):
        """The first rank is silent for longer than it may be; the other one has just come to its phase."""

        looks = 0

        def read(self) -> Beat:
            if self not in pulses:
                pulses.append(self)
            self.looks += 1
            gone = self.looks >= 20
            if self is pulses[0]:
                return Beat(step=5, phase="step", at=0.0, allowed_s=0.0, gone=gone)
            return Beat(step=5, phase=phase, at=time.monotonic(), allowed_s=1800.0, gone=gone)

    monkeypatch.setattr(module, "Pulse", Fixed)
    monkeypatch.setattr(module, "ANSWERS_S", 0.1)
    told: list[str] = []
    ranks = [Rank(0, 5, 1800), Rank(1, 5, 1800)]
    with started(*ranks):
        Watchdog(job_of(tmp_path, [0], *ranks), told.append).run()
    assert [text.partition(":")[0] for text in told] == kinds


def test_a_torchrun_that_went_before_the_watchdog_came_is_missed_too(tmp_path: Path) -> None:
    """As when both are killed together, and a rank starts the watchdog again: another process may have its number."""
    rank, told = Rank(0, 5, 1800), list[str]()
    rank.entry["parent"] = 1
    with started(rank):
        Watchdog(job_of(tmp_path, [0], rank), told.append).run()
        assert rank.process.wait(30) == -signal.SIGTERM
    (said,) = [text for text in told if text.startswith("launcher_lost: ")]
    assert said.startswith("launcher_lost: torchrun (process 1) is gone, and its ranks were left alone (")
    assert read_lines(tmp_path / "faults.jsonl")[0]["kind"] == "launcher_lost"


def test_ranks_that_end_while_their_torchrun_is_missed_are_no_orphans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ending(Watched):
        """Is still there when it is looked at, and gone right after it."""

        def has_ended(self) -> bool:
            ended = super().has_ended()
            self.send(signal.SIGKILL)
            select.select([self.process], [], [], 30)
            return ended

    monkeypatch.setattr(module, "Watched", Ending)
    monkeypatch.setattr(module, "TOGETHER_S", 0.0)
    told: list[str] = []
    rank = Rank(0, 5, 1800)
    with subprocess.Popen(["sleep", "1000"]) as torchrun, started(rank):
        rank.entry["parent"] = torchrun.pid
        dog = Watchdog(job_of(tmp_path, [0], rank), told.append)
        torchrun.kill()
        dog.run()
    assert [line.partition(":")[0] for line in told] == ["rank_lost"]


def test_a_watchdog_that_can_watch_nobody_says_so(tmp_path: Path) -> None:
    """As in a container that lets no process look at another one's files; who is gone is no reason for a word."""
    ranks = [Rank(number, 5, 1800) for number in range(2)]
    told: list[str] = []
    with started(*ranks):
        for rank in ranks:
            rank.entry["files"]["stacks"] = "../fd"  # is there, and can't be opened
        Watchdog(job_of(tmp_path, [0], *ranks), told.append).run()
        for rank in ranks:
            rank.process.kill()
            os.waitid(os.P_PID, rank.process.pid, os.WEXITED | os.WNOWAIT)
        Watchdog(job_of(tmp_path, [0], *ranks), told.append).run()
    (line,) = told
    assert line.startswith("watchdog: can't watch ranks 0 and 1: ") and f"/proc/{ranks[0].process.pid}/fd/../fd" in line
    assert line.endswith("; a hung run is ended by its collectives' time-outs alone")


def test_a_rank_that_has_closed_its_files_is_leaving_which_is_no_reason_for_a_word(tmp_path: Path) -> None:
    rank, told = Rank(0, 5, 1800), list[str]()
    rank.entry["files"]["stacks"] = 999
    with started(rank):
        Watchdog(job_of(tmp_path, [0], rank), told.append).run()
        assert rank.process.poll() is None
    assert told == []


def test_stacks_are_whole_when_they_grow_no_more(tmp_path: Path) -> None:
    """They come thread by thread, and that of the main thread last."""
    rank = Rank(0, 5, 1800)
    with started(rank):
        watched = Watched(rank.entry)
        before = {0: len(watched.stacks())}
        sizes = dict(before)
        assert not all_written([watched], before, sizes), "nothing yet"
        stacks = Path(f"/proc/{rank.process.pid}/fd/{rank.entry['files']['stacks']}")
        for part in ("Thread 1\n", "Thread 2\n", "Current thread\n", '  File "train.py", line 9 in main\n'):
            with stacks.open("a") as file:
                file.write(part)
            for _ in range(2):
                assert not all_written([watched], before, sizes), part
        with stacks.open("a") as file:
            file.write('  File "train.py", line 9 in <module>\n')
        assert not all_written([watched], before, sizes), "there may be more"
        assert all_written([watched], before, sizes)


def test_nodes_wait_for_each_other_long_enough() -> None:
    """The last look for others' findings, two turns of questions, and the time in which the verdict must be there."""
    assert module.OTHER_NODES_S >= 5
    assert module.OTHER_NODES_S + module.LOOK_S + module.AGAIN_S + 2 * module.ANSWERS_S < module.OTHERS_S
    assert 2 * module.OTHERS_S < module.DISK_S


def test_ranks_that_are_killed_together_are_told_of_together(tmp_path: Path) -> None:
    first, second = Rank(0, 5, 1800), Rank(1, 5, 1800)
    with started(first, second), watchdog(tmp_path, [0], first, second) as process:
        process.send_signal(signal.SIGSTOP)  # it sees both deaths at one look, however far apart they are
        for rank in (first, second):
            rank.process.kill()
        process.send_signal(signal.SIGCONT)
        assert process.wait(30) == 0
        line = said(process)
    (fault,) = read_lines(tmp_path / "faults.jsonl")
    assert sorted(fault["more"]["ranks"]) == [0, 1]
    assert line.startswith("rank_lost: was killed by SIGKILL, with ranks ") and line.count("\n") == 1


def test_who_waits_for_a_lost_rank_is_ended_too(tmp_path: Path) -> None:
    """As a rank does under NCCL, which tells nobody that a peer is gone."""
    lost, waiting, leaving = Rank(0, 5, 1800), Rank(1, 5, 1800), Rank(2, 5, 1800)
    with started(lost, waiting, leaving), watchdog(tmp_path, [0], lost, waiting, leaving) as process:
        leaving.tell("leave")
        lost.process.kill()
        assert waiting.process.wait(30) == -signal.SIGKILL
        assert process.wait(30) == 0
        assert leaving.process.poll() is None
    (fault,) = read_lines(tmp_path / "faults.jsonl")
    assert (fault["kind"], fault["more"]["ranks"]) == ("rank_lost", [0])


@pytest.mark.parametrize("reaped", [True, False])
@pytest.mark.parametrize(
    ("command", "expected"), [("kill -9 $$", Ending(signal="SIGKILL")), ("exit 7", Ending(code=7))]
)
def test_how_a_process_ended_is_known_before_its_parent_waits_and_after(
    command: str, expected: Ending, reaped: bool
) -> None:
    with subprocess.Popen(["sh", "-c", f"read line; {command}"], stdin=subprocess.PIPE) as child:
        descriptor = os.pidfd_open(child.pid)
        assert child.stdin is not None
        child.stdin.close()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        if reaped:
            child.wait()
        found = how_it_ended(descriptor, child.pid, "")
        os.close(descriptor)
    # Linux before 6.15 forgets it with the parent's wait.
    assert found == expected or (reaped and found == Ending())


@pytest.mark.parametrize(
    ("ending", "out_of_memory", "what"),
    [
        (Ending(signal="SIGKILL"), False, "was killed by SIGKILL"),
        (Ending(signal="SIGKILL"), True, "was killed by SIGKILL, by the kernel's out-of-memory killer"),
        (Ending(), False, "is gone without a word, as after SIGKILL"),
        (Ending(code=3), False, "ended with exit code 3 and without a word"),
        (Ending(signal="SIGTERM"), True, "was killed by SIGTERM"),
        (Ending(signal="SIGSEGV", error="Segmentation fault", place="models/llama.py:3 in f"), True,
         "died of SIGSEGV at models/llama.py:3 in f"),
    ],
)  # fmt: skip
def test_an_ending_is_told_by_its_cause(ending: Ending, out_of_memory: bool, what: str) -> None:
    told, do = ending.told(out_of_memory)
    assert told == what
    assert "continues from the last checkpoint" in do


def test_the_kernel_counts_its_kills() -> None:
    assert oom_kills() >= 0
