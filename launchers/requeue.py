"""Whether a job whose ranks have ended goes back into SLURM's queue, and the words that say why.

A signal alone says little: srun sends one to the healthy ranks when another has died. What is queued again is a job
that was signalled, whose ranks then saved and left by themselves, whose run isn't done, and that SLURM isn't ending by
itself; or whose ranks failed because a node fell silent. Unless its starts lead nowhere. What it needs to know is in
files: attempts.jsonl, the names of the checkpoints, and requeues.jsonl in the job's folder, written here.
"""

import json
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.fault.record import read_lines

ASK_LIMIT_S = 60
EARLY_S = 60
"""How much earlier than asked SLURM may send the signal before the time limit; it counts minutes."""
ENDING_STATES = (
    "CANCELLED",
    "COMPLETED",
    "COMPLETING",
    "FAILED",
    "NODE_FAIL",
    "PENDING",
    "PREEMPTED",
    "REQUEUED",
    "TIMEOUT",
)
UNFINISHED = 1
"""Exit code of a job that is not done and not queued again, so that what depends on it doesn't start."""


@dataclass(frozen=True, slots=True)
class Limits:
    """When a job is not queued again."""

    requeue: bool
    """False never queues again."""
    max_requeues: int
    """Time-outs after which to give up."""
    max_fruitless_starts: int
    """Starts in a row without a newer checkpoint after which to give up; 0 never gives up."""
    signal_from_s: float
    """A signal this long after the start, or later, is taken for that of the time limit."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of the job."""

    requeue: bool
    code: int
    """What the job exits with; it means nothing where the job is queued again."""
    why: str

    def text(self) -> str:
        """Say it in the job's log."""
        return f"{'queued again' if self.requeue else 'not queued again'}: {self.why}"


@dataclass(frozen=True, slots=True)
class Standing:
    """What SLURM says of a job that still runs here."""

    ending: str = ""
    """Why SLURM itself is ending the job; empty while it lets it run."""
    preempted: bool = False


class History:
    """What the files of a run and of a job tell; nothing of it is kept in memory, since a node may be lost."""

    def __init__(self, run: Path, job_folder: Path) -> None:
        """Look at `run`, a run's folder, and at the folder of a job that trains it."""
        self._attempts, self._checkpoints = run / "attempts.jsonl", run / "checkpoints"
        self._requeues = job_folder / "requeues.jsonl"

    def last_attempt(self) -> int:
        """Return the number of the run's last start, 0 before the first."""
        return max((entry["attempt"] for entry in _sound_lines(self._attempts, attempt=int)), default=0)

    def ended_by(self, attempt: int) -> str:
        """Return why a start ended, in the words of the rank that wrote it down; empty where none did."""
        lines = _sound_lines(self._attempts, event=str, attempt=int, reason=str)
        ends = [entry for entry in lines if entry["event"] == "end" and entry["attempt"] == attempt]
        return ends[-1]["reason"] if ends else ""

    def newest_step(self) -> int:
        """Return the step of the newest committed checkpoint, 0 without one."""
        found = (re.fullmatch(r"step-(\d+)", path.name) for path in self._checkpoints.glob("step-*"))
        return max((int(match[1]) for match in found if match), default=0)

    def fruitless_starts(self, began_at: int) -> int:
        """Count the last starts by this job that began where the run still stands; the present one at `began_at`."""
        newest, count = self.newest_step(), 0
        for step in [began_at, *(entry["from_step"] for entry in reversed(self._requeue_lines()))]:
            if step != newest:
                break
            count += 1
        return count

    def num_requeues(self, why: str = "") -> int:
        """Count how often the job was queued again by its first task, for one reason or for any."""
        return sum(not why or entry["why"] == why for entry in self._requeue_lines())

    def add_requeue(self, why: str, began_at: int) -> None:
        """Write down that the job is being queued again."""
        line: dict[str, Any] = {"time": time.time(), "why": why, "from_step": began_at, "step": self.newest_step()}
        with self._requeues.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _requeue_lines(self) -> list[dict[str, Any]]:
        return _sound_lines(self._requeues, why=str, from_step=int)


@dataclass(frozen=True, slots=True)
class Ending:
    """How the ranks of a start ended; all of them with 0, or because a node was lost."""

    attempt: int
    began_at: int
    """Step of the newest checkpoint when they started."""
    first_signal_s: float | None = None
    """When the job was signalled, from its start; None where it was not."""
    lost: str = ""
    """The nodes that fell silent."""


def judge(history: History, limits: Limits, standing: Standing, ending: Ending) -> Verdict:
    """Decide what becomes of a job."""
    reason = history.ended_by(ending.attempt)
    if reason == "done":
        return Verdict(False, 0, "the run is done")
    if ending.first_signal_s is None and not ending.lost:
        return Verdict(False, 0, f"the run was stopped by {reason or 'itself'}")
    if standing.ending:
        return Verdict(False, UNFINISHED if ending.lost else 0, standing.ending)
    why = "signalled"
    if ending.lost:
        why = f"lost {ending.lost}"
    elif standing.preempted:
        why = "preempted"
    elif ending.first_signal_s is not None and ending.first_signal_s >= limits.signal_from_s:
        why = "time limit"
    if not limits.requeue:
        return Verdict(False, UNFINISHED, f"{why}, and --no-requeue")
    fruitless, newest = history.fruitless_starts(ending.began_at), history.newest_step()
    if limits.max_fruitless_starts and fruitless >= limits.max_fruitless_starts:
        text = f"the last {fruitless} starts all began at step {newest} and saved nothing newer"
        return Verdict(False, UNFINISHED, f"{text} (fault.max_fruitless_starts); mend the cause, then submit again")
    if why == "time limit" and history.num_requeues(why) >= limits.max_requeues:
        return Verdict(False, UNFINISHED, f"its time was up more than --max-requeues = {limits.max_requeues} times")
    return Verdict(True, 0, why)


def ask_slurm(job: str, restarts: int) -> Standing:
    """Ask SLURM how a job stands; one that can't be asked about counts as running, and a failed requeue is then said.

    A job that SLURM is ending is COMPLETING, whether it was cancelled or is to start again; the second has one more
    restart to its name.
    """
    try:
        command = ["scontrol", "show", "job", "-o", job]
        text = subprocess.run(command, capture_output=True, text=True, timeout=ASK_LIMIT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return Standing()
    fields = dict(re.findall(r"(\w+)=(\S*)", text))
    if fields.get("JobState") in ENDING_STATES:
        by_itself = int(fields.get("Restarts", 0)) > restarts
        return Standing("SLURM does so by itself" if by_itself else "SLURM is ending the job, cancelled or out of time")
    return Standing(preempted=fields.get("PreemptTime", "None") != "None")


def _sound_lines(path: Path, **wanted: type) -> list[dict[str, Any]]:
    """Read the lines that have what is asked of them; somebody may have edited the file, and a job outlives that."""
    try:
        lines = read_lines(path)
    except OSError:
        return []
    return [line for line in lines if all(isinstance(line.get(name), kind) for name, kind in wanted.items())]


def names(signals: Sequence[int]) -> str:
    """Name signals, each once."""
    return ", ".join(dict.fromkeys(signal.Signals(signum).name for signum in signals))
