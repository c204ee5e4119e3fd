"""How a process ended that was somebody else's child: by which signal, in which line, and whether memory ran out.

Its parent takes the exit code away the moment it can, so it is read from the process table while the process is still
there, and afterwards from what the kernel remembers (PIDFD_GET_INFO of Linux 6.15, include/uapi/linux/pidfd.h). What a
process died of by itself, Python's faulthandler wrote down.
"""

import fcntl
import os
import re
import signal
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engine.fault.stacks import fatal_error

_GET_INFO, _EXIT_KNOWN = 0xC040FF0B, 8
_INFO = struct.Struct("=QQ11Ii")
_SIGNALS = {"Bus error": "SIGBUS", "Segmentation fault": "SIGSEGV", "Aborted": "SIGABRT",
            "Floating-point exception": "SIGFPE", "Illegal instruction": "SIGILL"}  # fmt: skip
"""By the words of Python's faulthandler."""
_AGAIN = "The same command continues from the last checkpoint"


@dataclass(frozen=True, slots=True)
class Ending:
    """How a process ended, as far as it can be known."""

    signal: str = ""
    """Name of the signal that killed it; empty where it ended by itself, or where nobody knows."""
    code: int | None = None
    """Its exit code, where it ended by itself."""
    error: str = ""
    """What faulthandler says that it died of."""
    place: str = ""
    """Where that was."""

    def told(self, out_of_memory: bool) -> tuple[str, str]:
        """Return what happened and what to do, for the user; the kernel has killed for `out_of_memory` lately."""
        where = f" at {self.place}" if self.place else ""
        if self.signal == "SIGBUS":
            do = f"Leave the files of a run alone while it runs. {_AGAIN} once they are whole"
            return f"died of SIGBUS{where}: a file that was mapped became shorter (data store or weights)", do
        if self.error:
            return f"died of {self.signal or self.error}{where}", f"{_AGAIN}; its stacks are in the file"
        if self.code is not None:
            return f"ended with exit code {self.code} and without a word", f"{_AGAIN}; its log may say more"
        if out_of_memory and self.signal in ("", "SIGKILL"):
            do = f"Lower data.micro_batch_size or run fewer ranks on the host. {_AGAIN}"
            return "was killed by SIGKILL, by the kernel's out-of-memory killer", do
        if self.signal:
            return f"was killed by {self.signal}", _AGAIN
        return "is gone without a word, as after SIGKILL", _AGAIN


def how_it_ended(process: int, pid: int, stacks: str) -> Ending:
    """Find out how the process behind a pidfd ended, from what the system knows and what faulthandler wrote."""
    error, place = fatal_error(stacks)
    status = _status_of_zombie(pid)
    if status is None:
        status = _status_remembered(process)
    if status is None:
        return Ending(signal=_SIGNALS.get(error, ""), error=error, place=place)
    if os.WIFSIGNALED(status):
        return Ending(signal=signal.Signals(os.WTERMSIG(status)).name, error=error, place=place)
    return Ending(code=os.WEXITSTATUS(status), error=error, place=place)


def oom_kills() -> int:
    """Count the processes that the kernel has killed for want of memory, in this control group or else on this host."""
    with suppress(OSError, ValueError):
        group = re.findall(r"^0::/(.+)$", Path("/proc/self/cgroup").read_text(), re.M)
        for path in [f"/sys/fs/cgroup/{group[0]}/memory.events" if group else "", "/proc/vmstat"]:
            if path and Path(path).exists():
                return int(re.findall(r"^oom_kill (\d+)$", Path(path).read_text(), re.M)[0])
    return 0


def _status_of_zombie(pid: int) -> int | None:
    """Read the status of a process that its parent has not waited for yet."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[-1]) if fields[0] == "Z" else None


def _status_remembered(process: int) -> int | None:
    """Ask a kernel that remembers it."""
    asked = bytearray(_INFO.pack(_EXIT_KNOWN, 0, *[0] * 11, 0))
    try:
        fcntl.ioctl(process, _GET_INFO, asked)
    except OSError:
        return None
    mask, *_, status = _INFO.unpack(asked)
    return status if mask & _EXIT_KNOWN else None
