"""Run a test's body on n gloo processes, and fail it the way one process would fail.

    @ranks(4)                                       values = run_ranks(2, function, argument)
    def test_sum(tmp_path): ...                     # function(argument) on each rank; values in rank order

Ranks are forked from a server that has torch and the engine imported, so that four of them start in a tenth of a
second, and meet through a file in a temporary folder, so that no test needs a port. The first failing rank ends all
others and its traceback is the test's. At the deadline every rank's Python and native stacks and its last collectives
are shown. A rank that dies after its last line fails too. What a rank prints is shown with a failure only. Not for
GPUs, and no place for anything that a test would assert.
"""

import ctypes
import datetime
import faulthandler
import functools
import importlib
import importlib.util
import inspect
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import cloudpickle

from engine.fault.watch import last_collectives

PRELOADED = [
    "torch",
    "torch.distributed",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "torch._dynamo",
    "numpy",
    "pytest",
    "launchers.rank",
]
"""What the server imports once for all ranks, the engine included: each rank would take half a second for it."""
START_LIMIT_S = 120.0
"""The first start imports torch in the server; the test's own deadline counts from its ranks' first message."""
LIMIT_S = 200.0
"""Of a test that says no other: many times what any needs, for machines with other work beside."""
GRACE_S = 15.0
"""After the deadline or the first failure: time for stacks to be written and for the other ranks to report."""
ANSWER_S = 3.0
"""For the ranks to write down their collectives, which one that holds the GIL never does."""
NATIVE_LIMIT_S = 60.0
"""For reading the native stacks of a rank, symbols included."""
PR_SET_PTRACER, PR_SET_PTRACER_ANY = 0x59616D61, 2**64 - 1
"""Of linux/prctl.h; without Yama the call fails and nothing is needed."""
LAST_COLLECTIVES = 4
"""Of each rank that hangs, shown beside those that are not done."""


class RanksFailed(AssertionError):
    """A rank failed, died or hung; the text holds tracebacks, stacks and what the rank printed."""


@dataclass
class Rank:
    """One child process and what is known of it."""

    index: int
    process: ForkServerProcess
    inbox: Connection
    values: list[Any] = field(default_factory=list)  # empty until the rank has returned
    error: str = ""
    started: bool = False
    closed: bool = False


def ranks(n: int, timeout_s: float = LIMIT_S) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run the body of a test function on n ranks; its arguments must be picklable and reach every rank."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def test(**arguments: Any) -> None:
            __tracebackhide__ = True
            where = (function.__module__, inspect.getfile(function), function.__qualname__)
            run_ranks(n, _call_undecorated, where, arguments, timeout_s=timeout_s)

        return test

    return decorate


def run_ranks(n: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = LIMIT_S) -> list[Any]:
    """Call function(*arguments) on n ranks of one gloo group and return their values in rank order.

    Raises RanksFailed when a rank raises, exits with a code other than 0, or isn't done after timeout_s seconds.
    """
    __tracebackhide__ = True
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    work = cloudpickle.dumps((function, arguments))  # not multiprocessing's pickler: it would share tensors' memory
    with tempfile.TemporaryDirectory(prefix="ranks-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        group: list[Rank] = []
        try:
            for index in range(n):
                inbox, outbox = context.Pipe(duplex=False)
                process = context.Process(
                    target=_rank_main, args=(index, n, name, timeout_s, work, outbox), daemon=True
                )
                process.start()
                outbox.close()
                group.append(Rank(index, process, inbox))
            problem = _watch(group, timeout_s, folder)
        finally:
            for rank in group:
                rank.process.kill()
                rank.process.join()
                rank.inbox.close()
        if problem:
            raise RanksFailed(problem)
        return [rank.values[0] for rank in group]


def _watch(group: Sequence[Rank], timeout_s: float, folder: Path) -> str:
    """Wait for all ranks; the text of a failure, or nothing."""
    limit_s, begin, started = START_LIMIT_S, time.monotonic(), False
    while busy := _awaited(group):
        if time.monotonic() >= begin + limit_s:
            return _describe_hang(group, limit_s, folder)
        wait(busy, timeout=max(0.0, begin + limit_s - time.monotonic()))
        _receive(group)
        if not started and any(rank.started for rank in group):
            limit_s, begin, started = timeout_s, time.monotonic(), True
        if any(rank.error or rank.process.exitcode for rank in group):
            return _describe_failure(group, folder)
    if any(rank.process.exitcode for rank in group):
        return _describe_failure(group, folder)
    missing = [rank.index for rank in group if not rank.values]
    return f"ranks {missing} exited with code 0 before they returned" if missing else ""


def _awaited(group: Sequence[Rank]) -> list[Any]:
    """What becomes ready when a rank speaks or ends. Asked once a round: a rank may end between two questions."""
    awaited: list[Any] = [rank.inbox for rank in group if not rank.closed]
    return awaited + [rank.process.sentinel for rank in group if rank.process.exitcode is None]


def _receive(group: Sequence[Rank]) -> None:
    """Take in every message that is there."""
    for rank in group:
        while not rank.closed and rank.inbox.poll():
            try:
                kind, content = pickle.loads(rank.inbox.recv_bytes())  # from our own child, this very second
            except (EOFError, OSError):
                rank.closed = True
                continue
            rank.started = True
            if kind == "value":
                rank.values.append(content)
            elif kind == "error":
                rank.error = content


def _describe_failure(group: Sequence[Rank], folder: Path) -> str:
    """The rank that failed first, in full; of the others, which came after it, one line each."""
    first = [rank for rank in group if rank.error or rank.process.exitcode]
    end = time.monotonic() + GRACE_S
    while (busy := _awaited(group)) and time.monotonic() < end:
        wait(busy, max(0.0, end - time.monotonic()))
        _receive(group)
    failed = [rank for rank in group if rank.error or rank.process.exitcode]
    # A peer's death reaches the others as "connection closed": who died without a word is the cause, whenever noticed.
    silent = [rank for rank in failed if not rank.error]
    cause = (silent or first)[0]
    parts = [f"rank {cause.index} of {len(group)} {_ending(cause)}", cause.error or _stacks(cause, folder)]
    parts.append(_printed(cause, folder))
    for rank in failed:
        if rank is not cause:
            last = rank.error.strip().splitlines()[-1] if rank.error else _ending(rank)
            parts.append(f"after it, rank {rank.index}: {last}")
    return "\n".join(part for part in parts if part)


def _describe_hang(group: Sequence[Rank], limit_s: float, folder: Path) -> str:
    """Every rank that isn't done: its Python stacks, its collectives, its native stacks, and what it printed."""
    hanging = [rank for rank in group if rank.process.exitcode is None]
    end = time.monotonic() + GRACE_S
    # The ranks' own timers write both at the deadline, which begins with each rank's start.
    while time.monotonic() < end and not all(_stacks(rank, folder) for rank in hanging if rank.started):
        time.sleep(0.05)
    until_answered = time.monotonic() + ANSWER_S
    while time.monotonic() < until_answered and not all(_answer_of(rank, folder).exists() for rank in hanging):
        time.sleep(0.05)
    parts = [f"not done after {limit_s:g} s"]
    for rank in group:
        if rank in hanging:
            where = "after it returned" if rank.values else "" if rank.started else "before it started"
            parts += [f"rank {rank.index} of {len(group)} hangs {where}".rstrip(), _stacks(rank, folder)]
            parts += [_collectives(rank, folder), _native_stacks(rank), _printed(rank, folder)]
    return "\n".join(part for part in parts if part)


def _collectives(rank: Rank, folder: Path) -> str:
    """The last collectives that the rank's flight recorder holds, and all that are not done."""
    path = _answer_of(rank, folder)
    if not path.exists():
        return f"rank {rank.index} did not answer for its collectives (it holds the GIL, or has not started)"
    lines = []
    for backend, recorded in json.loads(path.read_text()).items():
        entries = recorded.get("entries", [])
        for number, entry in enumerate(entries):
            pending = entry["state"] != "completed"
            if pending or number >= len(entries) - LAST_COLLECTIVES:
                group, sizes = entry.get("process_group"), entry.get("input_sizes")
                name, count = entry["profiling_name"], entry["collective_seq_id"]
                lines.append(f"  {backend} {name} number {count} of group {group}, sizes {sizes}: {entry['state']}")
    return f"rank {rank.index}, last and pending collectives:\n" + ("\n".join(lines) or "  none")


def _answer_of(rank: Rank, folder: Path) -> Path:
    return folder / f"collectives-{rank.index}"


def _native_stacks(rank: Rank) -> str:
    """All threads down to their C++ frames, as py-spy reads them from outside."""
    py_spy = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if py_spy is None or not sys.platform.startswith("linux"):
        return f"rank {rank.index}: no native stacks (py-spy is not installed, or this is not Linux)"
    command = [py_spy, "dump", "--native", "--pid", str(rank.process.pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NATIVE_LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"rank {rank.index}: no native stacks within {NATIVE_LIMIT_S:g} s"
    return f"rank {rank.index}, native stacks:\n{(done.stdout or done.stderr).strip()}"


def _ending(rank: Rank) -> str:
    code = rank.process.exitcode
    if rank.error:
        return "failed"
    after = " after it returned" if rank.values else ""
    return f"was killed by {signal.Signals(-code).name}{after}" if code and code < 0 else f"exited with {code}{after}"


def _stacks(rank: Rank, folder: Path) -> str:
    path = folder / f"stacks-{rank.index}"
    return path.read_text(errors="replace").strip() if path.exists() else ""


def _printed(rank: Rank, folder: Path) -> str:
    path = folder / f"output-{rank.index}"
    text = path.read_text(errors="replace").strip() if path.exists() else ""
    return f"rank {rank.index} printed:\n{text[-4000:]}" if text else ""


def _rank_main(index: int, n: int, folder: str, timeout_s: float, work: bytes, outbox: Connection) -> None:
    """The life of a rank, in the child."""
    output = os.open(f"{folder}/output-{index}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - lives as long as the process
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    stacks = open(f"{folder}/stacks-{index}", "w")  # noqa: SIM115
    faulthandler.enable(stacks)
    faulthandler.dump_traceback_later(timeout_s, file=stacks)
    # After the Python stacks, since this takes the GIL and may wait for ever.
    answer = threading.Timer(timeout_s + 0.2, _write_collectives, (f"{folder}/collectives-{index}",))
    answer.daemon = True
    answer.start()
    _let_others_read_stacks()
    # No one kills the ranks of a test run that was itself killed; the default action of SIGALRM ends them.
    signal.setitimer(signal.ITIMER_REAL, timeout_s + 30 + n * NATIVE_LIMIT_S)
    outbox.send_bytes(pickle.dumps(("started", None)))
    try:
        value = _in_group(index, n, folder, timeout_s, work)
        outbox.send_bytes(pickle.dumps(("value", value)))
    except BaseException as error:
        outbox.send_bytes(pickle.dumps(("error", _format(error))))
        os._exit(1)  # an orderly exit would wait for peers that will be killed anyway
    outbox.close()


def _let_others_read_stacks() -> None:
    """Let py-spy, which is no ancestor of this process, attach where Linux would refuse it (Yama's ptrace_scope 1)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(PR_SET_PTRACER_ANY), 0, 0, 0)


def _write_collectives(path: str) -> None:
    """Write down the last collectives of this process, whole or not at all."""
    part = Path(f"{path}.part")
    part.write_text(json.dumps(last_collectives()))
    part.rename(path)


def _in_group(index: int, n: int, folder: str, timeout_s: float, work: bytes) -> Any:
    """Join the process group, call the function, leave the group."""
    import torch
    import torch.distributed as dist

    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Past our deadline, so that a hang shows stacks and not gloo's time-out.
    limit = datetime.timedelta(seconds=timeout_s + 30 + n * NATIVE_LIMIT_S)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=n, timeout=limit)
    function, arguments = pickle.loads(work)
    value = function(*arguments)
    if dist.is_initialized():
        # A rank that needs no peer would leave while a slow one still connects to it, and fail that one.
        dist.barrier()
        dist.destroy_process_group()
    return value


def _format(error: BaseException) -> str:
    """The traceback below this file; for a bare assert also the values at hand, since pytest rewrites none here."""
    tb = error.__traceback__
    while tb is not None and tb.tb_next is not None and tb.tb_frame.f_code.co_filename == __file__:
        tb = tb.tb_next
    text = "".join(traceback.format_exception(type(error), error, tb))
    if isinstance(error, AssertionError) and tb is not None:
        while tb.tb_next is not None:
            tb = tb.tb_next
        values = tb.tb_frame.f_locals.items()
        text += "".join(f"    {name} = {repr(value)[:300]}\n" for name, value in values)
    return text


def _call_undecorated(where: tuple[str, str, str], arguments: dict[str, Any]) -> None:
    """Find a decorated test in this process and call its body."""
    module, path, qualname = where
    if module not in sys.modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError:
            spec = importlib.util.spec_from_file_location(module, path)
            assert spec is not None and spec.loader is not None, f"{path} can't be imported"
            sys.modules[module] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[module])
    test: Any = functools.reduce(getattr, qualname.split("."), sys.modules[module])
    test.__wrapped__(**arguments)
