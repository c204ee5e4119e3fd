"""The folder of one run: what lies where, who may write, and the configs as given and as resolved.

    runs/NAME/config.toml  config.resolved.json  metrics.jsonl  tensorboard/  checkpoints/  adapter/
    runs/NAME/logs/rank-00000.log   memory/rank-00000.json
    runs/NAME/faults.jsonl  attempts.jsonl  progress.json
    runs/NAME/proved.json   inputs that were proved, so that the next start needn't
    runs/NAME/rollbacks.json    which batches steps learn from after the run went back
    runs/NAME/stop          whoever makes this file has the run save and stop

One process at a time owns a run folder: a second run of the same name would otherwise write into the first one's.
"""

import fcntl
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from configs.errors import RunError, problem
from configs.load import config_to_dict
from configs.schema import Config, RunConfig

LOCK = ".lock"
TRIES = 100


class RunFolder:
    """Paths of a run; rank 0 makes and locks the folder with `claim`, the other ranks only read paths."""

    def __init__(self, run: RunConfig) -> None:
        """Name the paths; nothing is made yet."""
        self.path = Path(run.dir) / run.name
        self._mode = 0o700 if run.private else 0o750
        self.config = self.path / "config.toml"
        self.resolved = self.path / "config.resolved.json"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.logs = self.path / "logs"
        self.faults = self.path / "faults.jsonl"
        self.rollbacks = self.path / "rollbacks.json"
        self.stop = self.path / "stop"
        self.proved = self.path / "proved.json"
        self._lock: IO[str] | None = None
        self._held = False
        """No other process can have the lock too."""

    def claim(self) -> None:
        """Make the folder and hold it until this process ends, however it ends."""
        with _writing(self.path):
            for _ in range(TRIES):  # a refused start may take the folder away meanwhile
                self._lock = self._open_lock()
                if self._take_lock(self._lock):
                    break
                self._lock.close()
            if self._lock is not None and self._held:
                self._lock.truncate(0)
                self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                self._lock.flush()

    def _open_lock(self, tries: int = TRIES) -> IO[str]:
        """Make the folder, and its lock file unless there is one."""
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            with suppress(PermissionError):  # somebody else's folder, which this user may write all the same
                self.path.chmod(self._mode)
            return (self.path / LOCK).open("a+")
        except (FileNotFoundError, FileExistsError):  # another start was refused, and takes its folder away just now
            if tries == 1:
                raise
        return self._open_lock(tries - 1)

    def _take_lock(self, lock: IO[str]) -> bool:
        """Tell whether the lock that was opened is the folder's; raises RunError where another process holds it."""
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            self.release()
            do = "Wait for it, stop it, or choose another --run.name."
            raise RunError(problem(str(self.path), "", f"in use by {owner}", "one run writes a folder", do)) from None
        except OSError:
            # Some network file systems have no locks; a run is worth more than the guard.
            return True
        with suppress(FileNotFoundError):
            self._held = os.path.samestat(os.fstat(lock.fileno()), os.stat(self.path / LOCK))
        return self._held

    def release(self) -> None:
        """Let another process have the folder."""
        if self._lock is not None:
            self._lock.close()
        self._lock, self._held = None, False

    def give_up(self) -> None:
        """Release the folder, and take it away where nothing has come into it: a run was refused before it began."""
        with suppress(OSError):  # logs of an earlier start; or the disk has failed, which is told already
            if self._held and {entry.name for entry in self.path.iterdir()} <= {LOCK, self.logs.name}:
                self.logs.rmdir()
                (self.path / LOCK).unlink()
                self.path.rmdir()
        self.release()

    def has_checkpoints(self) -> bool:
        """Tell whether the run has saved any state, good or not."""
        return any(self.checkpoints.glob("step-*"))

    def write_configs(self, given: str, resolved: Config) -> None:
        """Keep the config as the user wrote it and as it was understood."""
        with _writing(self.path):
            _replace(self.config, given)
            _replace(self.resolved, json.dumps(config_to_dict(resolved), indent=2) + "\n")

    def log_of(self, rank: int, redact: Callable[[str], str] = str) -> logging.Handler:
        """Open this rank's own log; `redact` takes the secrets out of its lines."""
        with _writing(self.logs):
            self.logs.mkdir(parents=True, exist_ok=True)
            handler = logging.FileHandler(self.logs / f"rank-{rank:05d}.log")
        handler.setFormatter(_Redacted("%(asctime)s %(levelname)s %(message)s", redact))
        return handler


class _Redacted(logging.Formatter):
    """Lines of a log without secrets."""

    def __init__(self, pattern: str, redact: Callable[[str], str]) -> None:
        super().__init__(pattern)
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        return self._redact(super().format(record))


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Say what folder it is that can't be written, and why."""
    try:
        yield
    except OSError as error:
        do = "Make it writable, make room, or choose another --run.dir."
        raise RunError(problem(str(folder), "", f"can't be written: {error.strerror}", do=do)) from None


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
