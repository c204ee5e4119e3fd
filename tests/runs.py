"""A tiny run for tests, and its real processes: launchers/train.py as torchrun would start it, without torchrun's cost.

Ranks are forked from the server of tests/ranks.py, which has torch imported, and run the launcher's file as a script;
they meet at a store of this process, on a port that the system chose, as they would meet at torchrun's agent. What they
print goes into files. A test that needs torchrun itself starts it as a subprocess.
"""

import multiprocessing
import os
import random
import runpy
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from engine.checkpoint.checkpointer import open_checkpoint
from engine.data.prepare import PrepareOptions, prepare
from engine.metrics_log import read_metrics
from tests.ranks import PRELOADED

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "launchers" / "train.py"
VOCAB = 300
STEPS = 24
LIMIT_S = 200.0
CONFIG = f"""
[run]
name = "tiny"
steps = {STEPS}
threads = 1
[model]
vocab_size = {VOCAB}
dim = 16
num_layers = 2
num_heads = 4
num_kv_heads = 2
ffn_dim = 24
max_seq_len = 64
[data]
seq_len = 16
global_batch_size = 8
[[data.stores]]
path = "store"
[optim]
lr = 3e-3
[lr]
warmup_steps = 2
[checkpoint]
every_steps = 5
[metrics]
every_steps = 1
tensorboard = false
gemm_seconds = 0.05
[eval]
every_steps = 10
max_sequences = 8
"""


def make_workplace(folder: Path) -> Path:
    """Put a store and tiny.toml into a folder; commands are run there."""
    make_texts(folder / "texts", "hemp")
    prepare(PrepareOptions(sources=(str(folder / "texts"),), out=folder / "store", train_tokenizer=VOCAB, workers=1))
    (folder / "tiny.toml").write_text(CONFIG)
    return folder


def make_texts(folder: Path, seed: str) -> None:
    """Write 20 files of random words of a language of its own."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(80)]
    folder.mkdir()
    for number in range(20):
        (folder / f"{number:02d}.txt").write_text(" ".join(draw.choices(words, k=150)) + "\n")


class Processes:
    """The ranks of one start of a run; a context manager, so that none outlives its test."""

    def __init__(
        self,
        workplace: Path,
        n: int,
        *argv: str,
        limits: Callable[[], None] | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """Start `launchers/train.py tiny.toml ARGV` on n ranks; `limits` is called in each before anything else.

        `variables` are set in each beside, or instead of, those that torchrun sets.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._outputs = [workplace / f"output-{rank}" for rank in range(n)]
        self.ranks = []
        for rank, output in enumerate(self._outputs):
            output.write_bytes(b"")
            place = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(n),
                "LOCAL_WORLD_SIZE": str(n),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self._store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": "0",
            }
            environment = (place if n > 1 else {}) | dict(variables or {})
            given = (["tiny.toml", *argv], environment, str(workplace), str(output), limits)
            self.ranks.append(context.Process(target=_rank_main, args=given, daemon=True))
            self.ranks[-1].start()

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *error: object) -> None:
        self.send(signal.SIGKILL)
        self.join()

    def send(self, signum: signal.Signals) -> None:
        """Send a signal to every rank that is still there."""
        for rank in self.ranks:
            if rank.exitcode is None and rank.pid is not None:
                with suppress(ProcessLookupError):  # ended since, and reaped by the fork server
                    os.kill(rank.pid, signum)

    def join(self, *, end_all: bool = True, limit_s: float = LIMIT_S) -> list[int | None]:
        """Wait until every rank has ended and return their exit codes; end all once one failed, as torchrun does."""
        end = time.monotonic() + limit_s
        while any(rank.exitcode is None for rank in self.ranks) and time.monotonic() < end:
            connection.wait([rank.sentinel for rank in self.ranks if rank.exitcode is None], timeout=1.0)
            if end_all and any(rank.exitcode for rank in self.ranks):
                self.send(signal.SIGTERM)
        codes = [rank.exitcode for rank in self.ranks]
        assert None not in codes, f"not done after {limit_s:g} s: {self.output()}"
        return codes

    def until(self, condition: Callable[[], Any], limit_s: float = LIMIT_S) -> None:
        """Wait until a condition holds; it must come true while all ranks live."""
        end = time.monotonic() + limit_s
        while not condition():
            ended = connection.wait([rank.sentinel for rank in self.ranks], timeout=0.001)
            assert not ended or condition(), f"a rank ended too early: {self.output()}"
            assert time.monotonic() < end, f"not so after {limit_s:g} s: {self.output()}"

    def output(self) -> str:
        """Return all that the ranks printed, rank after rank."""
        return "".join(path.read_text(errors="replace") for path in self._outputs)


def run_to_end(
    workplace: Path,
    n: int,
    *argv: str,
    limits: Callable[[], None] | None = None,
    variables: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    """Start, wait, and return the first exit code that isn't 0, and what was printed."""
    with Processes(workplace, n, *argv, limits=limits, variables=variables) as processes:
        codes = processes.join()
        failed = [code for code in codes if code and code != -signal.SIGTERM]
        return (failed or [0])[0], processes.output()


def steps_of(run: Path) -> list[tuple[Any, ...]]:
    """Return what is in metrics.jsonl and must not depend on how often the run was killed, line by line."""
    names = ("kind", "step", "loss", "grad_norm", "lr", "num_tokens", "heldout_loss", "bits_per_byte")
    return [tuple(entry.get(name) for name in names) for entry in read_metrics(run / "metrics.jsonl")]


def assert_same_end(run: Path, whole: Path) -> None:
    """Hold a run against one that nobody interrupted: every logged number, and every bit of the last checkpoint."""
    assert steps_of(run) == steps_of(whole)
    found, expected = open_checkpoint(run / "checkpoints"), open_checkpoint(whole / "checkpoints")
    assert found.step == expected.step == steps_of(whole)[-1][1]
    assert found.names("") == expected.names("")
    for name in expected.names(""):
        assert torch.equal(found.read(name), expected.read(name)), name


def last_step(run: Path) -> int:
    """Return the newest step in metrics.jsonl, -1 before there is one."""
    path = run / "metrics.jsonl"
    return max((entry["step"] for entry in read_metrics(path)), default=-1) if path.exists() else -1


def until(condition: Callable[[], Any], limit_s: float = LIMIT_S) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not so after {limit_s:g} s"
        time.sleep(0.01)


def freeze(rank: int, step: int) -> tuple[str, ...]:
    """Have a rank stop itself before a step, until somebody sends SIGCONT: what is done to it then comes in time."""
    return ("--fault.inject.kind", "freeze", "--fault.inject.rank", str(rank), "--fault.inject.step", str(step))


def stands_still(pid: int | None) -> bool:
    """Tell whether every thread of a process is stopped; SIGSTOP takes a moment to reach them."""
    states: list[str] = []
    with suppress(OSError):
        stats = Path(f"/proc/{pid}/task").glob("*/stat")
        states.extend(stat.read_text().rpartition(")")[2].split()[0] for stat in stats)
    return bool(states) and set(states) <= {"T", "t"}


def processes_naming(path: Path) -> dict[int, str]:
    """Command lines of all processes that name `path`, by their numbers."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found[int(entry.parent.name)] = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return {pid: line for pid, line in found.items() if str(path) in line}


def _rank_main(
    argv: Sequence[str], variables: dict[str, str], workplace: str, output: str, limits: Callable[[], None] | None
) -> None:
    """The life of a rank, in the child."""
    with ExitStack() as kept:
        file = kept.enter_context(open(output, "ab", buffering=0))
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - lives as long as the process
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Nobody kills the ranks of a test run that was itself killed.
    signal.setitimer(signal.ITIMER_REAL, 2 * LIMIT_S)
    if limits is not None:
        limits()
    os.environ.update(variables, OMP_NUM_THREADS="1")
    os.chdir(workplace)
    sys.argv = [str(SCRIPT), *argv]
    runpy.run_path(str(SCRIPT), run_name="__main__")
