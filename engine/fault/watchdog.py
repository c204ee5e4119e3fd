"""The process beside the ranks of a node: `python -m engine.fault.watchdog RUN`, with whom to watch on standard input.

Outside of the ranks it sees what they can't say themselves: a rank that is silent for longer than its heartbeat allows,
one that was killed, a torchrun that is gone. It writes the evidence of a hung run below stacks/ in the run's folder,
says in one line who is behind (evidence.py judges), and ends the ranks of its node, so that whoever started them sees a
failure. No torch; it ends by itself when its ranks have.
"""

import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from engine.fault.ending import how_it_ended, oom_kills
from engine.fault.evidence import Evidence, examine, hang_fault, ranks_named, read_findings, write_evidence
from engine.fault.heartbeat import Beat, Pulse
from engine.fault.record import Fault, append_fault

DUMP_SIGNAL = signal.SIGRTMIN + 7 if hasattr(signal, "SIGRTMIN") else signal.SIGUSR1
"""Has a rank write its stacks. SLURM, submitit, torchrun and NCCL use none of the real-time signals."""
IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)
LOOK_S = 0.25
AGAIN_S = 0.05
"""A rank is silent when a second look, so much later, finds it silent too."""
OTHER_NODES_S = 5.0
"""How often to look whether another node's watchdog has found the run silent."""
STOPPED_S = 2.0
"""A look that comes so late was not this process's choice: the host slept, or SLURM suspended the job."""
REPORT_S = 20.0
"""Where a rank has left, or is leaving with an error, others may wait for it: it tells that first, in its turn."""
TOGETHER_S = 0.3
"""Ranks that end within this time have one cause."""
LEAVING_S = 5.0
"""How long the other ranks have to leave by themselves when one is lost."""
ANSWERS_S = 4.0
OTHERS_S = 14.0
"""How long the first node waits for the evidence of the others, and half of how long they wait for its verdict. They
look only every OTHER_NODES_S and then ask their ranks, in two turns."""
DISK_S = 30.0
"""A disk that is silent too must not keep the job from ending."""


class Watched:
    """A rank of this node, as it is seen from outside."""

    def __init__(self, entry: dict[str, Any]) -> None:
        """Open the rank's memory and get hold of its process; ProcessLookupError when it is gone already."""
        self.rank, self.host, self.pid, self.parent = (entry[name] for name in ("rank", "host", "pid", "parent"))
        self.process = os.pidfd_open(self.pid)
        folder = f"/proc/{self.pid}/fd"
        try:
            files = {name: os.open(f"{folder}/{number}", os.O_RDWR) for name, number in entry["files"].items()}
        except OSError as error:
            if self.has_ended() or isinstance(error, FileNotFoundError):  # it is ending, and has closed its files
                raise ProcessLookupError from error
            raise
        self._stacks, self._collectives = files["stacks"], files["collectives"]
        self.pulse = Pulse(files["beats"])
        os.close(files["beats"])  # the mapping keeps one of its own

    def send(self, signum: int) -> None:
        """Send a signal to this very process, should it still be there."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.process, signum)

    def stacks(self) -> str:
        """Return all that faulthandler wrote."""
        return _read(self._stacks)

    def collectives(self) -> dict[str, Any]:
        """Return what the rank answered; nothing if it didn't."""
        text = "" if self.pulse.open_question() else _read(self._collectives)
        return json.loads(text) if text else {}

    def has_ended(self) -> bool:
        """Tell whether the process is gone, or only its parent has not noticed yet."""
        return bool(select.select([self.process], [], [], 0)[0])

    def is_stopped(self) -> bool:
        """Tell whether the process stands still by SIGSTOP or a debugger."""
        return self._stat(0) in ("T", "t")

    def parent_now(self) -> int:
        """Return the number of the process's parent; another takes it over when the parent goes."""
        return int(self._stat(1) or 0)

    def _stat(self, index: int) -> str:
        """Return a field of the system's line on the process, counted from its state; empty where it has gone."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[index]
        except OSError:
            return ""


class Watchdog:
    """Watches the ranks of one node."""

    def __init__(self, job: dict[str, Any], say: Callable[[str], None]) -> None:
        """Take hold of the ranks; `say` tells the user something."""
        self._run, self._say = Path(job["run"]), say
        self._stacks = self._run / "stacks" / job["began"]
        self._shown = f"{job['shown']}/stacks/{job['began']}"
        self._nodes, self._me = job["nodes"], job["ranks"][0]["rank"]
        self._alive: list[Watched] = []
        denied: dict[int, OSError] = {}
        for entry in job["ranks"]:
            try:
                self._alive.append(Watched(entry))
            except ProcessLookupError:
                pass  # its peers notice that it has gone
            except OSError as error:
                denied[entry["rank"]] = error
        if denied and not self._alive:
            say(f"watchdog: can't watch {ranks_named(list(denied))}: {next(iter(denied.values()))}; "
                "a hung run is ended by its collectives' time-outs alone")  # fmt: skip
        self._launchers: dict[int, int] = {}
        # A rank whose parent is another process now has none: what has that number may be anything.
        for parent in {rank.parent for rank in self._alive if rank.parent and rank.parent_now() == rank.parent}:
            with suppress(OSError):
                self._launchers[os.pidfd_open(parent)] = parent
        self._oom_kills = oom_kills()
        self._patient_from = self._looked = self._asked_others = time.monotonic()
        self._end_by, self._left_at = float("inf"), -float("inf")

    def run(self) -> None:
        """Watch until no rank is left, or none that could still go on."""
        for parent in {rank.parent for rank in self._alive if rank.parent} - set(self._launchers.values()):
            self._stop_ranks_of(parent)  # a watchdog before this one has not seen it go
        while self._alive:
            ended = self._wait(LOOK_S)
            if ended:
                self._take_out(ended)
            gone = [rank for rank in self._alive if rank.pulse.read().gone]
            if gone:
                self._left_at = time.monotonic()
                self._alive = [rank for rank in self._alive if rank not in gone]
            if time.monotonic() >= self._end_by:
                self._kill([rank for rank in self._alive if rank.pulse.read().phase != "end"])
                return
            if self._is_hung() or self._others_ask():
                self._end_hung_run()
                return

    def _wait(self, seconds: float) -> list[Watched]:
        """Wait for processes to end, for so long at most; return the ranks that did."""
        poll = select.poll()
        for descriptor in [*(rank.process for rank in self._alive), *self._launchers]:
            poll.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(1000 * seconds)}
        for descriptor in ready & set(self._launchers):
            self._stop_ranks_of(self._launchers.pop(descriptor))
        return [rank for rank in self._alive if rank.process in ready]

    def _is_hung(self) -> bool:
        """Tell whether a rank is silent for longer than it may be, at two looks."""
        if not self._finds_silent_rank():
            return False
        time.sleep(AGAIN_S)
        return self._finds_silent_rank()

    def _finds_silent_rank(self) -> bool:
        now = time.monotonic()  # before the beats are read: what comes between the two makes no rank silent
        beats = [rank.pulse.read() for rank in self._alive]
        left_at = max([self._left_at, *(beat.at for beat in beats if beat.phase == "end")])
        # Where all of a node are stopped, somebody has suspended them; where one is, the others wait for it.
        suspended = bool(self._alive) and all(rank.is_stopped() for rank in self._alive)
        if suspended or now - self._looked > STOPPED_S or now - left_at < REPORT_S:
            self._patient_from = now
        self._looked = now
        return any(self._silent_s(beat, now) > beat.allowed_s for beat in beats)

    def _silent_s(self, beat: Beat, now: float) -> float:
        return now - max(beat.at, self._patient_from)

    # ---------- ranks and launchers that are gone

    def _take_out(self, ended: list[Watched]) -> None:
        """Tell of ranks that ended without a word."""
        endings = {rank.rank: how_it_ended(rank.process, rank.pid, rank.stacks()) for rank in ended}
        deadline = time.monotonic() + TOGETHER_S
        self._alive = [rank for rank in self._alive if rank not in ended]
        while self._alive and (left := deadline - time.monotonic()) > 0:
            more = self._wait(left)
            endings |= {rank.rank: how_it_ended(rank.process, rank.pid, rank.stacks()) for rank in more}
            ended, self._alive = ended + more, [rank for rank in self._alive if rank not in more]
        lost = [rank for rank in ended if not rank.pulse.read().gone and rank.pulse.read().phase != "end"]
        if not lost:
            return
        first = lost[0]
        ending = endings[first.rank]
        also = f", with ranks {', '.join(str(rank.rank) for rank in lost[1:])}" if lost[1:] else ""
        what, do = ending.told(oom_kills() > self._oom_kills)
        file = self._keep_stacks(first) if ending.error else ""
        step = max(0, first.pulse.read().step)
        self._tell(
            Fault(kind="rank_lost", what=what + also, did="The job ends", do=do,
                  rank=first.rank, host=first.host, step=step, file=file,
                  more={"ranks": [rank.rank for rank in lost], "signal": ending.signal,
                        "phase": first.pulse.read().phase})
        )  # fmt: skip
        self._end_by = time.monotonic() + LEAVING_S

    def _stop_ranks_of(self, launcher: int) -> None:
        """Have the ranks save and leave whose torchrun is gone: nobody would ever end them."""
        ranks = [rank for rank in self._alive if rank.parent == launcher and not rank.pulse.read().gone]
        _until(lambda: all(rank.has_ended() for rank in ranks), TOGETHER_S)
        orphans = [rank for rank in ranks if not rank.has_ended()]
        if not orphans:
            return  # everything was killed at once
        for rank in orphans:
            rank.send(signal.SIGTERM)
        what = f"torchrun (process {launcher}) is gone, and its ranks were left alone"
        did = "They were asked to save and stop"
        do = "The same command continues the run."
        numbers = [rank.rank for rank in orphans]
        self._tell(Fault(kind="launcher_lost", what=what, did=did, do=do, host=orphans[0].host,
                         step=orphans[0].pulse.read().step, more={"ranks": numbers}))  # fmt: skip

    # ---------- a run that doesn't go on

    def _others_ask(self) -> bool:
        if len(self._nodes) == 1 or time.monotonic() < self._asked_others + OTHER_NODES_S:
            return False
        self._asked_others = time.monotonic()
        return bool(read_findings(self._stacks))

    def _end_hung_run(self) -> None:
        """Gather the evidence, tell who is behind, and kill the ranks of this node."""
        # Beside this thread: what hangs may be the disk.
        telling = threading.Thread(target=self._judge, args=(self._examine(),), daemon=True)
        telling.start()
        telling.join(DISK_S)
        self._kill(self._alive)

    def _examine(self) -> list[Evidence]:
        """Ask every rank of this node where it stands; who is stopped is woken for it, before its end."""
        ranks = self._alive
        beats = {rank.rank: rank.pulse.read() for rank in ranks}
        now = time.monotonic()
        silent = {number: self._silent_s(beat, now) for number, beat in beats.items()}
        stopped = [rank for rank in ranks if rank.is_stopped()]
        before = {rank.rank: len(rank.stacks()) for rank in ranks}
        for rank in ranks:
            rank.pulse.ask()
            rank.send(DUMP_SIGNAL)
        awake, sizes = [rank for rank in ranks if rank not in stopped], dict(before)
        _until(lambda: all_written(awake, before, sizes) and not any(r.pulse.open_question() for r in awake), ANSWERS_S)
        collectives = {rank.rank: rank.collectives() for rank in ranks}
        for rank in awake if stopped else ():  # the job has ended: no rank goes on with one that is woken
            rank.send(signal.SIGSTOP)
        for rank in stopped:
            rank.send(signal.SIGCONT)
        _until(lambda: all_written(stopped, before, sizes), ANSWERS_S)
        for rank in stopped:  # it must not go on before it is ended
            rank.send(signal.SIGSTOP)
        return [
            examine(
                rank.rank, rank.host, beats[rank.rank], silent[rank.rank], stopped=rank in stopped,
                stacks=rank.stacks()[before[rank.rank] :], collectives=collectives[rank.rank],
            )
            for rank in ranks
        ]  # fmt: skip

    def _judge(self, mine: Sequence[Evidence]) -> None:
        """Write this node's evidence; on the first node wait for that of the others and tell the verdict."""
        write_evidence(self._stacks, self._me, mine)
        verdict = self._stacks / "verdict.json"
        if self._me == self._nodes[0]:
            _until(lambda: set(self._nodes) <= set(read_findings(self._stacks)), OTHERS_S if self._nodes[1:] else 0.0)
        elif _until(verdict.exists, 2 * OTHERS_S):
            return
        by_node = {self._me: [one.finding for one in mine]} | read_findings(self._stacks)
        fault = hang_fault([finding for of_node in by_node.values() for finding in of_node], self._shown)
        self._tell(fault)
        with suppress(OSError):
            verdict.write_text(json.dumps(asdict(fault)) + "\n")

    # ---------- doing

    def _kill(self, ranks: Sequence[Watched]) -> None:
        for rank in ranks:
            rank.send(signal.SIGKILL)

    def _tell(self, fault: Fault) -> None:
        """Say it and record it."""
        attempt = 0
        with suppress(OSError, ValueError, KeyError):
            attempt = json.loads((self._run / "progress.json").read_text())["attempt"]
        append_fault(self._run / "faults.jsonl", replace(fault, attempt=attempt))
        self._say(f"{fault.kind}: {fault.line()}")

    def _keep_stacks(self, rank: Watched) -> str:
        name = f"rank-{rank.rank:05d}.txt"
        with suppress(OSError):
            self._stacks.mkdir(parents=True, exist_ok=True)
            (self._stacks / name).write_text(rank.stacks())
        return f"{self._shown}/{name}"


def all_written(ranks: Sequence[Watched], before: dict[int, int], sizes: dict[int, int]) -> bool:
    """Tell whether all have written their stacks, which come bit by bit: as much as at the last look, in `sizes`.

    The main thread comes last, and its outermost frame at the end; of a deep stack faulthandler leaves the end out.
    """
    last = {rank.rank: sizes[rank.rank] for rank in ranks}
    texts = {rank.rank: rank.stacks() for rank in ranks}
    sizes |= {number: len(text) for number, text in texts.items()}
    whole = all(text.endswith((" in <module>\n", "  ...\n")) for text in texts.values())
    return whole and all(before[number] < size == sizes[number] for number, size in last.items())


def _until(condition: Callable[[], bool], limit_s: float) -> bool:
    """Wait for a condition, for so long at most; return whether it holds."""
    end = time.monotonic() + limit_s
    while not (holds := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return holds


def _read(descriptor: int) -> str:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")


def _say(text: str) -> None:
    """Tell the user, where the first rank of the node does."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())


if __name__ == "__main__":
    for ignored in IGNORED:
        signal.signal(ignored, signal.SIG_IGN)
    Watchdog(json.load(sys.stdin), _say).run()
    os._exit(0)  # a thread may still wait for a disk
