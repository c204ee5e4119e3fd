"""How the ranks meet: each checks in by name at a store, before torch.distributed starts, so that who is missing has
a name and not a time-out.

torchrun's agent keeps the store and hands it on to the ranks of a restart, so keys begin with the start's number;
under srun rank 0 opens it. Whoever reaches the port may read and write the store: it carries names and addresses, and
nothing of ours is unpickled from it. The connection is opened in a thread, because torch's own waits for ever for a
listener that does not answer.
"""

import errno
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from configs.errors import LayoutError, RankFailure, RunError, problem
from engine.fault.stop import StopRequests
from launchers.env import Launch

_VERDICT, _STOP = "verdict", "stop"
_SHOWN = 8
"""Missing ranks that are named one by one."""
_FAREWELL_S = 1.0
"""How long a rank 0 that keeps the store lets the others read its verdict; more than the longest pause of `_polls`."""


def meet(
    launch: Launch, timeout_s: float, requests: StopRequests, record: Callable[[str], None]
) -> tuple[dist.Store, int]:
    """Wait until all ranks are there; return the store for torch.distributed, and the code of a stop asked meanwhile.

    Raises RunError within `timeout_s`; `record` is given what this rank found itself.
    """
    end = time.monotonic() + timeout_s
    where = f"rendezvous at {launch.master_addr}:{launch.master_port}"
    try:
        # A store of torchrun lives on over a restart of its ranks, and with it the addresses of the dead ones.
        store = dist.PrefixStore(f"ropewalk-{launch.job}-{launch.restart_count}", _open_store(launch, end, timeout_s))
        store.set(_name(launch.rank), socket.gethostname())
        verdict = _judge(store, launch, end, requests) if launch.rank == 0 else _await(store, launch, end, requests)
    except RunError as error:
        record(str(error))
        raise
    except RuntimeError as error:
        first_line = str(error).strip().splitlines()[0]
        do = "Look for the first error of rank 0; the same command starts the run again."
        text = problem(where, "", "lost contact with the store while the ranks met", first_line, do)
        record(text)
        raise RankFailure(text) from None
    if "missing" in verdict:
        met, of = launch.world_size - verdict["missing"], launch.world_size
        what = f"{met} of {of} ranks met in {timeout_s:g} s; missing {verdict['who']}"
        do = "Look at what they printed and at their nodes; where they only start slowly, raise "
        text = problem(where, "", what, do=f"{do}fault.rendezvous_timeout_s.")
        if verdict["found_by"] == launch.rank:
            record(text)
        raise RankFailure(text)
    return store, verdict.get(_STOP, 0)


def _judge(store: dist.Store, launch: Launch, end: float, requests: StopRequests) -> dict[str, Any]:
    """Wait for all ranks, as rank 0, and tell them how it ended."""
    verdict: dict[str, Any] = {}
    keys = [_name(rank) for rank in range(launch.world_size)]
    for _ in _polls(end):
        if store.check(keys):
            break
        if requests.code or store.check([_STOP]):
            verdict = {_STOP: requests.code or int(store.get(_STOP))}
            break
    else:
        verdict = _missing(store, launch)
    store.set(_VERDICT, json.dumps(verdict))
    if verdict and not launch.agent_store:
        time.sleep(_FAREWELL_S)
    return verdict


def _await(store: dist.Store, launch: Launch, end: float, requests: StopRequests) -> dict[str, Any]:
    """Wait for what rank 0 found; a little longer than rank 0 waits for us."""
    for _ in _polls(end + _FAREWELL_S):
        if store.check([_VERDICT]):
            return json.loads(store.get(_VERDICT))
        if requests.code and not store.check([_STOP]):
            store.set(_STOP, str(requests.code))
    return _missing(store, launch)


def _missing(store: dist.Store, launch: Launch) -> dict[str, Any]:
    """Say who did not check in, and on which host, where another rank of its node told."""
    here = [rank for rank in range(launch.world_size) if store.check([_name(rank)])]
    hosts = {rank // launch.local_world_size: store.get(_name(rank)).decode() for rank in here}
    missing = sorted(set(range(launch.world_size)) - set(here))
    if not missing:  # rank 0 is there and says nothing
        missing = [0]
    names = []
    for rank in missing[:_SHOWN]:
        node = rank // launch.local_world_size
        names.append(f"rank {rank} on {hosts[node]}" if node in hosts else f"rank {rank} of node {node}")
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    return {"missing": len(missing), "who": ", ".join(names) + more, "found_by": 0 if 0 in here else launch.rank}


def _open_store(launch: Launch, end: float, timeout_s: float) -> dist.Store:
    """Open the store, as its keeper or as its client, within the time that is left."""
    keeper = launch.rank == 0 and not launch.agent_store
    address, port = launch.master_addr, launch.master_port
    try:
        socket.getaddrinfo(address, port)
    except OSError as error:
        do = "Use a name or an address that leads from every node to that of rank 0."
        why = f"on {socket.gethostname()}: {error.strerror}"
        raise LayoutError(problem("MASTER_ADDR", address, "can't be resolved", why, do)) from None
    heard = "no answer from rank 0's node"
    if not keeper:
        heard = _knock(address, port, end)
    opened: list[dist.Store | Exception] = []

    def connect() -> None:
        left = timedelta(seconds=max(1.0, end - time.monotonic()))
        try:
            store = dist.TCPStore(address, port, launch.world_size, keeper, left, wait_for_workers=False)
            opened.append(store)
        except Exception as error:  # told by the thread that waits
            opened.append(error)

    thread = threading.Thread(target=connect, name="rendezvous", daemon=True)
    if not heard or keeper:
        thread.start()
        for _ in _polls(end):
            if not thread.is_alive():
                break
        heard = "something listens there that is not this run's store"
    found = opened[0] if opened else None
    if isinstance(found, dist.Store):
        return found
    if keeper and re.search("EADDRINUSE|address already in use", str(found), re.I):
        why, do = f"rank 0 opens it on {socket.gethostname()}", "`ss -ltnp` shows who holds it; choose another port."
        raise LayoutError(problem("MASTER_PORT", port, "is in use by another process", why, do))
    why = str(found).splitlines()[0] if found else heard
    do = "See that rank 0 has started, that MASTER_ADDR and MASTER_PORT are its own, and that no firewall is between."
    raise RankFailure(problem(f"{address}:{port}", "", f"no rendezvous within {timeout_s:g} s", why, do))


def _knock(address: str, port: int, end: float) -> str:
    """Wait until somebody listens; torch's own way of waiting fills the screen. Return the last error, or nothing."""
    last = "no time was left"
    for _ in _polls(end):
        try:
            socket.create_connection((address, port), timeout=max(0.1, end - time.monotonic())).close()
        except OSError as error:
            last = error.strerror or str(error)
            if error.errno not in (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT, None):
                return last
        else:
            return ""
    return last


def _polls(end: float) -> Iterator[None]:
    """Come round at growing intervals until the end; always once."""
    pause_s = 0.01
    while True:
        yield
        if time.monotonic() >= end:
            return
        time.sleep(min(pause_s, max(0.0, end - time.monotonic())))
        pause_s = min(2 * pause_s, 0.5)


def _name(rank: int) -> str:
    return f"rank-{rank}"
