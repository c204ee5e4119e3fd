"""Where the nodes of a job meet before any rank is started: a folder in the job's own, on the disk that all share.

Each node leaves a file that says that it is here; the first one's also says at which port the ranks will meet, the
first from the derived one on that nobody holds. So a busy port costs nothing, and a node that never came has a name.
While its ranks run a node writes its file anew every few seconds, and takes it away when it leaves: a file that stands
still is of a node that was lost, and the failure of the other ranks its consequence.
"""

import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from configs.errors import RankFailure, RunError, problem
from launchers.env import NUM_PORTS

POLL_S = 0.1
SILENCE_S = 15.0
"""Seconds without a sign of life after which a node counts as lost; a shared disk may be slow to show one."""


class Presence:
    """This node's file, and those of the others."""

    def __init__(self, folder: Path, hosts: Sequence[str], node: int) -> None:
        """Meet in `folder`; this is the node of that number among `hosts`."""
        self._folder, self._hosts, self._node = folder, hosts, node
        self._beats = 0
        self._speaks = False

    def meet(self, port: int | None, limit_s: float) -> int:
        """Wait until all nodes are here and return the port; `port` is where the first node begins to look for one.

        One task of each node has a port and says so; its other tasks give None and only wait. Raises RankFailure with
        the names of the nodes that are missing.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        if port is not None and self._node == 0:
            temporary = self._folder / ".port.tmp"
            temporary.write_text(f"{free_port(port)}\n")
            os.replace(temporary, self._folder / "port")
        self._speaks = port is not None
        self.beat()
        end = time.monotonic() + limit_s
        while missing := self._absent():
            if time.monotonic() > end:
                raise RankFailure(_absence(self._hosts, missing, limit_s))
            time.sleep(POLL_S)
        if len(self._hosts) > 1:
            _check_address(self._hosts[0], self._hosts[self._node])
        return int((self._folder / "port").read_text())

    def beat(self) -> None:
        """Say that this node is there, if this task speaks for it."""
        if not self._speaks:
            return
        self._beats += 1
        with suppress(OSError):  # a full disk is no reason to end
            # In place and without an empty moment: over NFS an opened file is up to date, a replaced one may be hidden.
            descriptor = os.open(self._path(self._node), os.O_WRONLY | os.O_CREAT, 0o600)
            os.pwrite(descriptor, f"{self._beats:12d}\n".encode(), 0)
            os.close(descriptor)

    def leave(self) -> None:
        """Say that this node has left by itself."""
        if self._speaks:
            with suppress(OSError):
                self._path(self._node).unlink(missing_ok=True)

    def silent(self) -> list[str]:
        """Name the nodes that neither left nor show any life; takes SILENCE_S where there are some."""
        others = [number for number in range(len(self._hosts)) if number != self._node]
        before = {number: self._read(number) for number in others}
        end = time.monotonic() + SILENCE_S
        while True:
            # Asked before the others are looked at: a task that was itself suspended must look once more.
            is_over = time.monotonic() > end
            still = [number for number, text in before.items() if text is not None and self._read(number) == text]
            if not still or is_over:
                break
            time.sleep(POLL_S)
            self.beat()
        return [self._hosts[number] for number in still]

    def decides(self, silent: Sequence[str]) -> bool:
        """Tell whether this task speaks for the first of the nodes that are left."""
        return self._speaks and self._node == next(
            number for number, host in enumerate(self._hosts) if host not in silent
        )

    def _absent(self) -> list[str]:
        # Reads the folder anew, where a network disk may remember what was not there.
        here = set(os.listdir(self._folder))
        absent = [host for number, host in enumerate(self._hosts) if self._path(number).name not in here]
        return absent or ([] if "port" in here else [self._hosts[0]])

    def _path(self, node: int) -> Path:
        return self._folder / f"node-{node}"

    def _read(self, node: int) -> str | None:
        try:
            return self._path(node).read_text()
        except OSError:
            return None


def free_port(port: int) -> int:
    """Give the first port from here on that nobody on this machine holds."""
    for candidate in range(port, port + NUM_PORTS):
        with socket.socket() as probe:
            try:
                probe.bind(("", candidate))
            except OSError:
                continue
            return candidate
    return port


def _absence(hosts: Sequence[str], missing: Sequence[str], limit_s: float) -> str:
    expected = (
        f"{len(hosts) - len(missing)} of {len(hosts)} nodes joined in {limit_s:g} s; missing {', '.join(missing)}"
    )
    do = "See the logs of the missing nodes, if they wrote any, and `sinfo -R`; --sbatch exclude=NODE goes without one."
    return problem("rendezvous", "", expected, do=do)


def _check_address(address: str, host: str) -> None:
    """Refuse a first node whose name leads nowhere: the ranks would try it until their patience ends."""
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        do = "Mend the name service of that node, or leave it out by --sbatch exclude=NODE."
        raise RunError(problem(f"rendezvous: {address}", "", f"can't be resolved on {host}: {error}", do=do)) from None
