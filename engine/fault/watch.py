"""Having a rank watched: its heart and its stacks in memory, and one watchdog process for the ranks of a node.

A node is who can see each other's processes. Only on Linux: elsewhere a hung run is ended by its collectives' time-outs
alone. The memory goes with the last process that holds it, so nothing has to be cleared up.
"""

import faulthandler
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from configs.faults import FaultConfig
from engine.fault.heartbeat import Heart
from engine.fault.watchdog import DUMP_SIGNAL
from engine.ranks import gather_json

REVIVALS = 3
"""How often a watchdog that is gone is started again."""


class WatchedHeart(Heart):
    """A heart whose beats, stacks and collectives the watchdog's process can read."""

    def __init__(self, fault: FaultConfig) -> None:
        """Make the memory, and have the stacks written there at a signal and when the process dies of an error."""
        self.files = {name: os.memfd_create(name) for name in ("beats", "stacks", "collectives")}
        os.ftruncate(self.files["beats"], os.sysconf("SC_PAGESIZE"))
        super().__init__(fault, self.files["beats"])
        faulthandler.enable(self.files["stacks"])
        faulthandler.register(DUMP_SIGNAL, self.files["stacks"])
        self._job: dict[str, Any] = {}
        self._watchdog: subprocess.Popen[str] | None = None
        self._revivals = 0

    def start_watchdog(self, job: dict[str, Any]) -> None:
        """Start the process that watches the ranks of this node; it ends by itself."""
        self._job = job
        # The name of the run is for whoever reads the list of processes. The current folder is no place for modules.
        command = [sys.executable, "-P", "-m", "engine.fault.watchdog", job["shown"]]
        self._watchdog = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True, text=True
        )
        assert self._watchdog.stdin is not None, "it is a pipe"
        with suppress(BrokenPipeError):
            self._watchdog.stdin.write(json.dumps(job))
            self._watchdog.stdin.close()

    def revive_watchdog(self) -> str:
        """Start the process again where it has died; one that always does is left alone at last."""
        # It exits 0 where it has nobody left to watch, or can't, which it has said then.
        if self._watchdog is None or self.phase == "end" or not self._watchdog.poll() or self.pulse.read().gone:
            return ""
        if self._revivals == REVIVALS:
            self._watchdog = None
            return "It is left alone now; a hung run is ended by its collectives' time-outs"
        self._revivals += 1
        try:
            self.start_watchdog(self._job)
        except OSError as error:
            return f"It can't be started again: {error.strerror}"
        return "It was started again"

    def leave(self) -> None:
        """Leave in order, and the watchdog to itself: it outlives this rank."""
        super().leave()
        if self._watchdog is not None:
            self._watchdog.returncode = 0

    def answer_if_asked(self) -> None:
        """Write down the last collectives of this process, as JSON, if the watchdog wants to know."""
        question = self.pulse.open_question()
        if not question:
            return
        text = json.dumps(last_collectives()).encode()
        os.ftruncate(self.files["collectives"], 0)
        os.pwrite(self.files["collectives"], text, 0)
        self.pulse.answer(question)


@contextmanager
def watched(fault: FaultConfig, run: Path, *, under_torchrun: bool) -> Iterator[Heart]:
    """Have this rank watched in the block; collective. What ends the block, ends it in order."""
    if not fault.watchdog or not hasattr(os, "pidfd_open"):
        yield Heart(fault)
        return
    heart = WatchedHeart(fault)
    me = {
        "rank": dist.get_rank(),
        "pid": os.getpid(),
        "parent": os.getppid() if under_torchrun else 0,
        "host": socket.gethostname(),
        "node": _node(),
        "began": time.strftime("%Y%m%d-%H%M%S"),
        "files": heart.files,
    }
    ranks = gather_json(me, None) if dist.get_world_size() > 1 else [me]
    mine = [rank for rank in ranks if rank["node"] == me["node"]]
    if mine[0] is ranks[me["rank"]]:
        firsts: dict[str, int] = {}
        for rank in ranks:
            firsts.setdefault(rank["node"], rank["rank"])
        heart.start_watchdog(
            {"run": str(run.resolve()), "shown": str(run), "began": ranks[0]["began"], "ranks": mine,
             "nodes": sorted(firsts.values())}
        )  # fmt: skip
    try:
        yield heart
    finally:
        heart.leave()


def last_collectives() -> dict[str, Any]:
    """Return the flight recorders' entries: {backend: {"entries": [...], "pg_status": {...}, ...}}."""
    found = {}
    for backend, name in (("gloo", "_dump_fr_trace_json"), ("nccl", "_dump_nccl_trace_json")):
        dump = getattr(c10d, name, None)
        if dump is not None:
            found[backend] = json.loads(dump(True, False))
    return found


def _node() -> str:
    """Name those who see this process under the number that it has itself."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)
