"""torchrun as a tool starts and ends it: one command, and no process left behind.

torchrun gives each rank a session of its own, which no signal to torchrun's group reaches; so whoever ends it looks its
descendants up.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from configs.errors import INTERRUPTED
from launchers.env import LOOPBACK_ADDRESS, port_of
from launchers.meeting import free_port


def command_of(ranks: int, argv: Sequence[str], *options: str) -> list[str]:
    """Return the command that trains on so many ranks of this machine; `argv` are launchers/train.py's arguments."""
    # torchrun warns where it is unset; the launcher sets each rank's threads itself.
    command = ["env", "OMP_NUM_THREADS=1", sys.executable, "-m", "torch.distributed.run"]
    # --standalone would be a rendezvous that unpickles what it finds in its store.
    port = free_port(port_of(str(os.getpid()), 0))
    command += ["--master-addr", LOOPBACK_ADDRESS, "--master-port", str(port), "--nproc-per-node", str(ranks), *options]
    return [*command, "launchers/train.py", *argv]


def to_end(command: Sequence[str]) -> int:
    """Run a command of `command_of` and return its exit code; 130 where Ctrl-C, SIGTERM or SIGHUP came.

    Its ranks are then asked to save and stop; a second one ends all at once.
    """
    with interrupted_by_signals():
        # A session of its own: otherwise Ctrl-C reaches torchrun by itself, which prints a traceback.
        torchrun = subprocess.Popen(command, start_new_session=True)
        try:
            try:
                return torchrun.wait()
            except KeyboardInterrupt:
                ranks = [pid for pid, parent in _parents().items() if parent == torchrun.pid]
                if ranks:
                    _say("\ninterrupted: the ranks save and leave; again ends them at once, unsaved")
                else:  # it is only starting
                    end(torchrun)
                # A rank that has stopped exits 0, so torchrun has nothing to report; SIGINT would be a failure to it.
                for pid in ranks:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGTERM)
                torchrun.wait()
        except KeyboardInterrupt:  # from the first word on
            end(torchrun)
            _say("ended; the same command continues from the last checkpoint, if there was one")
    return INTERRUPTED


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Take SIGTERM and SIGHUP, which a closed terminal sends, for Ctrl-C: who has started processes must end them."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    heeded = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) is not signal.SIG_IGN]  # nohup
    with _answered(heeded, interrupt):
        yield


@contextmanager
def _answered(
    signums: Iterable[int], answer: Callable[[int, FrameType | None], None] | signal.Handlers
) -> Iterator[None]:
    before = {signum: signal.signal(signum, answer) for signum in signums}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def end(torchrun: subprocess.Popen[bytes]) -> None:
    """Kill torchrun, its ranks and all that they have started, at one moment as far as the system permits."""
    with _answered((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), signal.SIG_IGN):  # one more must not interrupt this
        torchrun.send_signal(signal.SIGSTOP)  # it must start no rank while they are looked up
        below = _descendants_of(torchrun.pid)
        torchrun.kill()
        for pid in below:
            for kill in (os.killpg, os.kill):  # a process just forked leads no group yet
                with suppress(ProcessLookupError):
                    kill(pid, signal.SIGKILL)
        torchrun.wait()


def _say(text: str) -> None:
    with suppress(OSError):  # the terminal is gone
        print(text, file=sys.stderr, flush=True)


def _descendants_of(pid: int) -> list[int]:
    """List children and their children, nearest first."""
    parents = _parents()
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def _parents() -> dict[int, int]:
    if Path("/proc/self/stat").exists():  # Linux, where containers often have no ps
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # ended since
                parents[int(stat.parent.name)] = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
        return parents
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True)
    return dict((int(child), int(parent)) for child, parent in (line.split() for line in listed.stdout.splitlines()))
