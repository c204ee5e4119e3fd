"""The life of one rank: its device, its threads, the process group, the run, and the way out of each.

What goes wrong here is written in full into the rank's own log (logs/ in the run folder); what the user reads is one
RunError, raised to launchers/train.py.
"""

import logging
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from configs.errors import ConfigError, LayoutError, RankFailure, RunError, problem
from configs.schema import Config
from engine.build import build_run
from engine.fault.attempts import Start
from engine.fault.memory_snapshot import is_out_of_memory, tell_out_of_memory
from engine.fault.record import Fault, FaultLog, append_fault, read_lines
from engine.fault.stop import StopRequests, reason_text
from engine.fault.watch import watched
from engine.folder import RunFolder
from engine.progress import ProgressDisplay
from engine.run import Run
from engine.train import Outcome, train
from launchers.allocator import keep_freed_memory
from launchers.env import Launch, compile_cache, environment_of, threads_per_rank, usable_cores
from launchers.redaction import redactor
from launchers.rendezvous import meet

# What gloo, NCCL and the rendezvous say when a peer is gone.
_LOST_PEER = re.compile(
    r"connection (was )?(closed|reset|refused)|timed out|timeout|broken pipe|remote process|unhandled system", re.I
)

VERDICT_S = 10.0
"""How long a rank that has lost another waits to hear what became of it."""
CAUSES = ("rank_lost", "error", "out_of_memory", "bad_batch")
"""Faults that take a rank away from the others."""


def run_rank(config: Config, given: str, launch: Launch, requests: StopRequests, began: float) -> int:
    """Train as one of the ranks; `config` is resolved and `given` its text. Raises RunError for what users can mend.

    `began` is time.monotonic() when the process did. Returns what asked the run to stop, 0 where it is done.
    """
    device = _device(config, launch)
    torch.set_num_threads(threads_per_rank(config.run.threads, launch.local_world_size, usable_cores()))
    if device.type == "cpu":
        keep_freed_memory()
    if config.run.deterministic:
        _be_deterministic()
    console = Console() if launch.rank == 0 else None
    with (
        _as_run_errors(launch, config, device, began),
        ProgressDisplay(console, config.run.steps) if console else nullcontext() as progress,
    ):
        if config.compile.blocks or config.compile.loss:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = compile_cache(launch, os.environ)
        stopped_by = _start_process_group(config, device, launch, requests)
        if stopped_by:
            return stopped_by
        folder, under_torchrun = RunFolder(config.run).path, launch.started_by == "torchrun"
        with watched(config.fault, folder, under_torchrun=under_torchrun) as heart:
            start = Start(
                began=began,
                started_by=launch.started_by,
                restart_count=launch.restart_count,
                job=launch.job,
                world_size=launch.world_size,
                redact=redactor(os.environ),
            )
            tell = progress.say if progress is not None else _teller(launch)
            run = build_run(config, given, device, launch.local_world_size, progress, start, requests, tell, heart)
            try:
                _log_to(run.folder, launch)
                outcome = train(run)
            except BaseException as error:
                heart.beat(run.step, "end")
                cause = _known(error, run, launch)
                _end_attempt(run, f"error: {cause}")
                _close_after_error(run)
                raise cause  # noqa: B904 - the same, or raised from it
            _end_attempt(run, reason_text(outcome.stopped_by) if outcome.stopped_by else "done")
            run.close()
            if progress is not None:
                progress.say(_farewell(run, outcome))
    dist.destroy_process_group()
    return outcome.stopped_by


def _teller(launch: Launch) -> Callable[[str], None]:
    """Return what tells the user of a fault on this rank; the first rank has its display for it."""

    def tell(text: str) -> None:
        sys.stderr.write(f"rank {launch.rank}: {text}\n")

    return tell


def _end_attempt(run: Run, reason: str) -> None:
    if run.care.attempts is not None:
        run.care.attempts.end(reason)


def _farewell(run: Run, outcome: Outcome) -> str:
    if outcome.step == run.config.run.steps:
        return f"done: {outcome.step} steps, {run.folder.path}"
    asked = reason_text(outcome.stopped_by)
    kept = f"saved step {outcome.step}" if outcome.step else "nothing to save"
    return f"stopped by {asked} after step {outcome.step} of {run.config.run.steps}: {kept}; the same command goes on"


def _known(error: BaseException, run: Run, launch: Launch) -> BaseException:
    """Return the error, or what memory's end is to a user; the snapshot is taken while the run still stands."""
    error = _cause(error, launch)
    if _is_lost_peer(error, launch):
        _log_error("".join(traceback.format_exception(error)))
        known = RankFailure(_lost_peer(error, launch, run.folder, run.care.start.began))
        known.__cause__ = error
        return known
    if not is_out_of_memory(error):
        if isinstance(error, Exception) and not isinstance(error, RunError):
            what, do = f"{type(error).__name__}: {error}", f"Read the traceback in {run.folder.logs}"
            run.care.log.own("error", what, "the run ended", do, step=run.step, said=False)
        return error
    _log_error("".join(traceback.format_exception(error)))
    ranks = launch.local_world_size
    known = tell_out_of_memory(error, run.config, run.layout.device, ranks, run.care.log, run)
    known.__cause__ = error
    return known


def _close_after_error(run: Run) -> None:
    """Close a run that ended early; what goes wrong now is a consequence, and must not hide its cause."""
    try:
        run.close()
    except (RunError, RuntimeError, OSError):
        _log_error(f"while closing the run: {traceback.format_exc()}")


@contextmanager
def _as_run_errors(launch: Launch, config: Config, device: torch.device, began: float) -> Iterator[None]:
    """Log every error in full; turn what the machine or another rank did to this one into a RunError."""
    try:
        yield
    except RunError as error:
        _log_error(str(error))
        raise
    except (MemoryError, RuntimeError, OSError) as failed:
        _log_error(traceback.format_exc())
        error = _cause(failed, launch)
        if is_out_of_memory(error):  # while the run was built
            log = FaultLog(RunFolder(config.run).faults, launch.rank, lambda text: None, redact=redactor(os.environ))
            raise tell_out_of_memory(error, config, device, launch.local_world_size, log, None) from error
        if _is_lost_peer(error, launch):
            raise RankFailure(_lost_peer(error, launch, RunFolder(config.run), began)) from error
        if not isinstance(error, OSError) or error.errno is None:
            raise
        where = error.filename or f"rank {launch.rank} of {launch.world_size}"
        do = "The same command continues the run once that is mended."
        raise RunError(problem(str(where), "", error.strerror or str(error), do=do)) from error


def _cause(error: BaseException, launch: Launch) -> BaseException:
    """Return what is behind an error, where that is known: torch's pipelines wrap all that happens in a stage."""
    behind: BaseException | None = error
    while behind is not None:
        if is_out_of_memory(behind) or _is_lost_peer(behind, launch):
            return behind
        behind = behind.__cause__ or behind.__context__
    return error


def _is_lost_peer(error: BaseException, launch: Launch) -> bool:
    known = isinstance(error, RuntimeError) and not isinstance(error, RunError)
    return known and launch.world_size > 1 and _LOST_PEER.search(str(error)) is not None


def _lost_peer(error: BaseException, launch: Launch, folder: RunFolder, began: float) -> str:
    """Say that another rank is gone, and which, where it or the watchdog tells within a moment."""
    where, what = f"rank {launch.rank} of {launch.world_size}", "lost contact with another rank"
    now = time.monotonic()
    since, end = time.time() - (now - began), now + VERDICT_S
    while time.monotonic() < end:
        faults: list[dict[str, Any]] = []
        with suppress(OSError):
            faults = read_lines(folder.faults)
        for fault in faults:
            if fault.get("kind") in CAUSES and fault.get("time", 0) > since and fault.get("rank") != launch.rank:
                why = f"rank {fault.get('rank')} {fault.get('what')}".splitlines()[0].rstrip(".")
                do = fault.get("do") or "The same command continues from the last checkpoint"
                return problem(where, "", what, why, f"{do}.")
        time.sleep(0.1)
    # gloo puts the place in its sources before, and good wishes behind.
    why = re.sub(r"^\[[^]]*\] ", "", str(error).strip().splitlines()[0]).partition(". This is typically")[0]
    do = "Look for the first error of another rank; the same command continues from the last checkpoint."
    return problem(where, "", what, why, do)


def _device(config: Config, launch: Launch) -> torch.device:
    """Pick this rank's device."""
    available = torch.cuda.is_available()
    if config.run.device == "cuda" and not available:
        raise ConfigError(problem("run.device", "cuda", "torch finds no CUDA device here", "", "Use cpu or auto."))
    if config.run.device == "cpu" or not available:
        return torch.device("cpu")
    if launch.local_rank >= torch.cuda.device_count():
        expected = f"this node has {torch.cuda.device_count()} GPUs"
        do = f"Start {torch.cuda.device_count()} processes a node, or use --run.device cpu."
        raise LayoutError(problem("local rank", launch.local_rank, expected, "one rank drives one GPU", do))
    device = torch.device("cuda", launch.local_rank)
    torch.cuda.set_device(device)
    return device


def _be_deterministic() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def _start_process_group(config: Config, device: torch.device, launch: Launch, requests: StopRequests) -> int:
    """Meet the other ranks; a single process meets nobody and opens no port. Returns what asked to stop meanwhile."""
    timeout = timedelta(seconds=config.fault.first_step_timeout_s)
    # Checkpoints and counters of the host travel by gloo beside NCCL.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    os.environ.update(environment_of(launch, os.environ))
    if launch.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return 0

    def record(what: str) -> None:
        folder, host = RunFolder(config.run), socket.gethostname()
        with suppress(OSError):
            folder.path.mkdir(parents=True, exist_ok=True)
        fault = Fault(kind="rendezvous", what=what, did="the run did not start", rank=launch.rank, host=host)
        append_fault(folder.faults, fault, redactor(os.environ))

    store, stopped_by = meet(launch, config.fault.rendezvous_timeout_s, requests, record)
    if stopped_by:
        return stopped_by
    device_id = device if device.type == "cuda" else None
    dist.init_process_group(
        backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout, device_id=device_id
    )
    return 0


def _log_to(folder: RunFolder, launch: Launch) -> None:
    logging.raiseExceptions = False  # a full disk is said once, and not by each line of the log
    root = logging.getLogger()
    root.addHandler(folder.log_of(launch.rank, redactor(os.environ)))
    root.setLevel(logging.INFO)
    # A thread's error reaches the user through whoever waits for the thread.
    threading.excepthook = lambda args: _log_error(
        "".join(traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback))
    )
    root.info("rank %d of %d, process %d, torch %s", launch.rank, launch.world_size, os.getpid(), torch.__version__)


def _log_error(text: str) -> None:
    root = logging.getLogger()
    if root.handlers:  # before the log is open, logging would write to the user instead
        root.error("%s", text)
