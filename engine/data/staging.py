"""A folder that appears whole or not at all.

It is built as `.NAME.preparing` beside its place and renamed at the end, so nobody can take half of it for the whole.
The builder holds a lock in it: what a killed build left behind is recognised by its free lock, and taken over.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.errors import DataError, problem
from engine.files import sync_folder

_LOCK = "lock"


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder to fill; it becomes `target` when the block ends well, and vanishes when it doesn't.

    Files written inside must be forced to the disk by their writers. Raises DataError when `target` exists, or when
    another process is building it.
    """
    refuse_existing(target)
    staging = target.with_name(f".{target.name}.preparing")
    try:
        lock = _take(staging)
    except OSError as error:
        why = error.strerror or str(error)
        raise DataError(problem(str(target), "", "can't be written here", why, "Choose another folder.")) from None
    try:
        try:
            yield staging
            # Someone may have put another result there meanwhile.
            refuse_existing(target)
            _commit(staging, target)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    except OSError as error:
        do = "Make room or choose another folder; nothing was left behind."
        raise DataError(problem(str(target), "", "can't be written", error.strerror or str(error), do)) from None
    finally:
        os.close(lock)


def refuse_existing(target: Path) -> None:
    """Raise DataError when there is something at `target` already; an empty folder is nothing."""
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        do = "Remove it or choose another folder."
        raise DataError(problem(str(target), "", "exists already", "nothing is written over", do))


def _take(staging: Path) -> int:
    """Make the staging folder, or take over an abandoned one, and empty it; return the descriptor of its lock."""
    staging.parent.mkdir(parents=True, exist_ok=True)
    staging.mkdir(exist_ok=True)
    lock = os.open(staging / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        do = "Wait for it, or choose another folder."
        raise DataError(problem(str(staging), "", "another process is writing here", do=do)) from None
    except OSError:
        pass  # some network file systems have no locks; preparing is worth more than the guard
    for entry in staging.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != _LOCK:
            entry.unlink()
    return lock


def _commit(staging: Path, target: Path) -> None:
    for folder, _, _ in os.walk(staging):
        sync_folder(Path(folder))
    # The lock goes along and is removed last: before the rename, another builder could take the folder over.
    os.rename(staging, target)
    (target / _LOCK).unlink()
    sync_folder(target.parent)
