"""torchrun as a tool starts and ends it: one command, and no process left behind.

torchrun gives each rank a session of its own, which no signal to torchrun's group reaches; so whoever ends it looks its
descendants up.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

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


def end(torchrun: subprocess.Popen[bytes]) -> None:
    """Kill torchrun, its ranks and all that they have started, at one moment as far as the system permits."""
    torchrun.send_signal(signal.SIGSTOP)  # it must start no rank while they are looked up
    below = _descendants_of(torchrun.pid)
    torchrun.kill()
    for pid in below:
        for kill in (os.killpg, os.kill):  # a process just forked leads no group yet
            with suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)
    torchrun.wait()


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
