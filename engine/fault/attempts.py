"""The history of a run's starts: where each began, how far it came, why it ended; from it lost steps and goodput.

    attempts.jsonl   {"event": "start", ...} and {"event": "end", ...}, appended by rank 0
    progress.json    where the present start stands, written over every second, so that a killed one leaves its last

Productive time is the time of steps and evaluations that the weights still know of: a checkpoint carries the sum, so
that what was done after it and lost is never counted. Goodput is that sum over the time of all starts.
"""

import json
import os
import re
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import RunError, problem
from engine.fault.record import append_line, read_lines

TAIL_BYTES = 1 << 16
"""As much of metrics.jsonl's end is read: some dozens of logged steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What the launcher knows of this start of the run."""

    began: float = field(default_factory=time.monotonic)
    """On time.monotonic()."""
    started_by: str = "nothing"
    restart_count: int = 0
    """Automatic restarts by torchrun or SLURM since somebody last started the run by hand."""
    job: str = ""
    """SLURM's job id."""
    world_size: int = 1
    redact: Callable[[str], str] = str
    """Takes the secrets of the environment out of a text."""


@dataclass(slots=True)
class Progress:
    """Where a start stands."""

    attempt: int = 1
    step: int = 0
    wall_s: float = 0.0
    productive_s: float = 0.0
    """Over all starts, up to this step."""


class Attempts:
    """Rank 0's record of this start among the earlier ones."""

    def __init__(self, folder: Path, start: Start) -> None:
        """Read what earlier starts left in the run's folder; nothing is written yet."""
        self._history, self._progress = folder / "attempts.jsonl", folder / "progress.json"
        self._start = start
        self._metrics = folder / "metrics.jsonl"
        self._past = [entry for entry in read_lines(self._history) if _is_sound(entry)]
        self.last = self._read_progress()
        self._starts = [entry for entry in self._past if entry["event"] == "start"]
        self.number = 1 + max((entry["attempt"] for entry in self._starts), default=0)
        self.begun = False
        """Whether this start has been written down."""
        self._earlier_wall_s = 0.0
        self.now = Progress(attempt=self.number)

    def refuse_fruitless(self, from_step: int, limit: int) -> None:
        """Raise RunError when automatic restarts have begun at this step `limit` times and never came further."""
        same = 0
        for entry in reversed(self._starts):
            if entry["from_step"] != from_step:
                break
            same += 1
            if not entry["restart_count"]:
                break
        if not limit or not self._start.restart_count or same < limit:
            return
        why = f"the last {same} starts all began there and saved nothing newer; {self._history} has the history"
        do = "Mend the cause, then start the run by hand."
        text = problem(f"{self._history.parent}", "", f"no progress since step {from_step}, not started again", why, do)
        raise RunError(text)

    def begin(self, from_step: int, productive_s: float) -> int:
        """Write this start down; return the steps that the one before it had done and that are lost."""
        last = self.last if self._starts else None
        walls = {entry["attempt"]: entry["wall_s"] for entry in self._past if entry["event"] == "end"}
        lost = 0
        if last is not None:
            if last.attempt not in walls:  # it was killed, up to a second after it last wrote its progress
                last.step = max(last.step, from_step, self._last_logged_step())
                walls[last.attempt] = last.wall_s
                self._append({"event": "end", **asdict(last), "reason": "killed"})
            lost = max(0, last.step - from_step)
        self._earlier_wall_s = sum(walls.values())
        self.begun = True
        self.now = Progress(attempt=self.number, step=from_step, productive_s=productive_s)
        fields = {name: value for name, value in asdict(self._start).items() if name not in ("began", "redact")}
        self._append(
            {"event": "start", "attempt": self.number, "time": time.time(), "host": socket.gethostname(),
             "pid": os.getpid(), "from_step": from_step, "lost_steps": lost, **fields}
        )  # fmt: skip
        self.write_progress()
        return lost

    def end(self, reason: str) -> None:
        """Write down how this start ended."""
        self.write_progress()
        self._append({"event": "end", **asdict(self.now), "reason": self._start.redact(reason)})

    def advance(self, step: int, productive_s: float) -> None:
        """Note a step and the productive time up to it; cheap, and written by `write_progress`."""
        self.now.step, self.now.productive_s = step, productive_s

    def write_progress(self) -> None:
        """Write down where this start stands; the sentinel calls it every second."""
        self.now.wall_s = self.wall_s()
        temporary = self._progress.with_name(".progress.json.tmp")
        try:  # a run is worth more than its history
            temporary.write_text(json.dumps(asdict(self.now)) + "\n")
            os.replace(temporary, self._progress)
        except OSError:
            return

    def wall_s(self) -> float:
        """Seconds since this start began."""
        return time.monotonic() - self._start.began

    def goodput(self) -> float:
        """Productive time over the time of all starts."""
        return self.now.productive_s / max(self._earlier_wall_s + self.wall_s(), 1e-9)

    def _append(self, entry: dict[str, Any]) -> None:
        append_line(self._history, json.dumps(entry))

    def _read_progress(self) -> Progress | None:
        try:
            entry = json.loads(self._progress.read_text())
            return Progress(
                int(entry["attempt"]), int(entry["step"]), float(entry["wall_s"]), float(entry["productive_s"])
            )
        except (OSError, ValueError, TypeError, KeyError, OverflowError):
            return None

    def _last_logged_step(self) -> int:
        """Read how far a start came that could not say so itself; nothing has been cut from metrics.jsonl yet."""
        try:
            with self._metrics.open("rb") as file:
                file.seek(max(0, self._metrics.stat().st_size - TAIL_BYTES))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return 0
        steps = [re.match(r'\{"kind": "step", "step": (\d+),', line) for line in lines]
        return max((int(step[1]) for step in steps if step), default=0)


def _is_sound(entry: dict[str, Any]) -> bool:
    """Say whether a line of the history has what is asked of it here; somebody may have edited the file."""
    wanted = {"start": ("attempt", "from_step", "restart_count"), "end": ("attempt", "step", "wall_s")}
    event = entry.get("event")
    return event in wanted and all(isinstance(entry.get(name), int | float) for name in wanted[event])
