"""Which batch a step learns from, after roll backs that left the data of bad steps out.

The batch of step s is number s - 1, until a run goes back: from the first bad step on it then takes the batches that
follow the last bad one's. Steps before that are repeated as they were, bit for bit. The list of roll backs is in each
checkpoint and, since a run may be killed between a roll back and its next checkpoint, in rollbacks.json of the run's
folder, written before anything goes on.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.errors import DataError, problem
from engine.files import sync_folder, write_all


@dataclass(frozen=True, slots=True, kw_only=True)
class RollBack:
    """A run went back to the checkpoint of `to_step`, since the steps from `first` to `last` were bad."""

    to_step: int
    first: int
    last: int
    batch: int
    """Number of the batch that step `first` takes from then on; the steps after it take those that follow."""


class RollBacks:
    """The roll backs of a run, oldest first, the same on every rank."""

    def __init__(self, path: Path) -> None:
        """Know of none yet; `path` is the run's rollbacks.json."""
        self._path = path
        self.all: list[RollBack] = []

    def batch_of(self, step: int) -> int:
        """Return the number of the batch that a step (from 1) learns from."""
        for one in reversed(self.all):
            if step >= one.first:
                return one.batch + step - one.first
        return step - 1

    def in_a_row(self, to_step: int) -> int:
        """Count the roll backs that one to `to_step` would follow in a row: with no checkpoint from after bad steps."""
        count = 0
        for one in reversed(self.all):
            if to_step > one.last:
                break
            count, to_step = count + 1, one.to_step
        return count

    def add(self, to_step: int, first: int, last: int) -> RollBack:
        """Take one more; `write` keeps it."""
        self.all.append(RollBack(to_step=to_step, first=first, last=last, batch=self.batch_of(last) + 1))
        return self.all[-1]

    def state(self) -> list[dict[str, int]]:
        """Return the list as JSON, for a checkpoint."""
        return [asdict(one) for one in self.all]

    def load(self, saved: Sequence[dict[str, int]], written: Sequence[dict[str, int]]) -> None:
        """Take what a checkpoint and the folder know: whichever knows more, since both only grow."""
        self.all = [RollBack(**one) for one in max(saved, written, key=len)]

    def read(self) -> list[dict[str, Any]]:
        """Read the list that the folder has; DataError where it isn't one."""
        if not self._path.exists():
            return []
        try:
            entries = json.loads(self._path.read_text())
            return [asdict(RollBack(**{name: int(value) for name, value in one.items()})) for one in entries]
        except (ValueError, TypeError, AttributeError) as error:
            why = "it says which batches the steps after a roll back learn from"
            do = "Restore it; without it the run would repeat the data of bad steps."
            raise DataError(problem(str(self._path), "", f"can't be read ({error})", why, do)) from None

    def write(self) -> None:
        """Keep the list in the folder, whole or not at all."""
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            write_all(descriptor, memoryview((json.dumps(self.state()) + "\n").encode()))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, self._path)
        sync_folder(self._path.parent)

    def forget(self) -> None:
        """Remove what an earlier life of the folder left, for a run that starts at its first step."""
        self._path.unlink(missing_ok=True)
