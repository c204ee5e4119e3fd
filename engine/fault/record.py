"""What went wrong, told twice: one line to the user, one JSON object in the run's faults.jsonl.

Every process of a run may write: a line is one append. A run is worth more than its records: what can't be written is
only said.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault, as the user and the record are told of it."""

    kind: str
    """A word of docs/reliability.md: rank_lost, hang, stop, non_finite, ..."""
    what: str
    """What happened, without a full stop."""
    did: str
    """What the engine did about it."""
    do: str = ""
    """What the user should do; empty where nothing is needed."""
    rank: int | None = None
    """The rank that it happened on; None where it is all of them."""
    host: str = ""
    """The host of that rank."""
    step: int | None = None
    """Steps done when it happened."""
    file: str = ""
    """The file that it is about."""
    attempt: int = 0
    """Which start of the run, from 1."""
    more: dict[str, Any] = field(default_factory=dict)
    """What else a program may want to know: JSON."""

    def line(self) -> str:
        """Write it as one line for a person: what (where). What was done. What to do."""
        places = [
            f"rank {self.rank}" + (f" on {self.host}" if self.host else "") if self.rank is not None else self.host,
            f"step {self.step}" if self.step is not None else "",
            self.file,
        ]
        where = ", ".join(place for place in places if place)
        return ". ".join(part for part in (f"{self.what} ({where})" if where else self.what, self.did, self.do) if part)


class FaultLog:
    """Takes the faults of one process of a run."""

    def __init__(
        self, path: Path, rank: int, say: Callable[[str], None], attempt: int = 0, redact: Callable[[str], str] = str
    ) -> None:
        """Append to `path` (runs/NAME/faults.jsonl) and tell `say`; `redact` takes secrets out of both."""
        self._path, self.rank, self._say, self.attempt = path, rank, say, attempt
        self.redact = redact
        self.taken = False

    def take(self, fault: Fault, *, said: bool = True) -> None:
        """Record a fault and say it, prefixed by its kind; with `said` False somebody else says it."""
        self.taken = True
        append_fault(self._path, fault, self.redact)
        if said:
            self._say(self.redact(f"{fault.kind}: {fault.line()}"))

    def own(self, kind: str, what: str, did: str, do: str = "", *, step: int | None = None, file: str = "",
            said: bool = True, **more: Any) -> None:  # fmt: skip
        """Record a fault of this rank."""
        fault = Fault(kind=kind, what=what, did=did, do=do, rank=self.rank, host=socket.gethostname(), step=step,
                      file=file, attempt=self.attempt, more=more)  # fmt: skip
        self.take(fault, said=said)


def append_fault(path: Path, fault: Fault, redact: Callable[[str], str] = str) -> None:
    """Append one line to faults.jsonl; a record that can't be written is left out."""
    append_line(path, redact(json.dumps({"time": time.time(), **asdict(fault)})))


def append_line(path: Path, line: str) -> None:
    """Append a line in one write, after a torn one on a line of its own; where that is impossible, leave it out."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            os.write(descriptor, (torn * "\n" + line + "\n").encode())
        finally:
            os.close(descriptor)
    except OSError:
        return


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON objects, one a line, as faults.jsonl; lines that a crash tore are left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found
