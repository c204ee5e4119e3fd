"""Layouts against one process: `python tools/bench.py layouts [CONFIG] [--layouts NAME ...] [--section.field VALUE]`.

Each layout trains the same model on the same global batches as one process with as many threads in all, and the two
take turns, so that what a layout costs on this machine shows as a ratio of medians. A layout is written as its degrees:
`dp_shard=2` or `dp_shard=2,tp=2`; any other field of [parallel] may stand there too. On CPUs a rank computes with one
thread unless run.threads says otherwise. The share of a step outside forward, backward, clipping, optimizer and
collectives is the framework's own cost.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from configs.check import resolve
from configs.errors import INTERRUPTED, RunError
from configs.load import load_config
from configs.schema import Config
from launchers.allocator import huge_pages_for_children, keep_freed_memory
from parallel.float8 import check_float8

LAYOUTS = ("dp_shard=2", "dp_replicate=2", "cp=2", "tp=2", "pp=2", "dp_shard=4", "dp_shard=2,tp=2", "dp_shard=2,pp=2")
WARMUP_STEPS = 2


class Timed:
    """Adds up the seconds spent in the functions that it wraps."""

    def __init__(self) -> None:
        """Start at nothing."""
        self.seconds = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its time counted."""

        def timed(*arguments: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - begin

        return timed


def _work(config: Config, device_type: str, rank: int, world_size: int, meeting: str, pipe: Connection) -> None:
    """Be one rank of a layout: train as many steps as the pipe says, with so many threads, until it says 0."""
    import torch.distributed as dist

    from engine import step as engine_step
    from engine.build import build_passes
    from engine.data.batches import Batch
    from engine.fault.guard import Guard
    from engine.optim import build_optimizer
    from engine.weights import starting_weights
    from parallel.apply import build_model
    from parallel.mesh import build_layout

    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cpu":
        keep_freed_memory()
    else:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    layout = build_layout(config.parallel, device)
    model = build_model(config, layout, starting_weights(config))
    optimizer = build_optimizer(model, config.optim)
    _, passes = build_passes(config, layout, model)
    guard = Guard(config.fault, 0, device)
    inside = Timed()
    passes = inside.wrap(passes)
    optimizer.step = inside.wrap(optimizer.step)
    engine_step.clip_grad_norm = inside.wrap(engine_step.clip_grad_norm)
    generator = torch.Generator().manual_seed(config.run.seed)
    shape = (config.data.global_batch_size, config.data.seq_len + 1)
    while steps_and_threads := pipe.recv():
        steps, threads = steps_and_threads
        torch.set_num_threads(threads)
        seconds, own, losses = [], [], []
        for _ in range(steps):
            tokens = torch.randint(config.model.vocab_size, shape, generator=generator)
            mine = tokens.chunk(layout.dp_size)[layout.dp_rank]
            batches = [
                engine_step.part_of_rank(
                    Batch(part[:, :-1].contiguous(), part[:, 1:].contiguous(), None, None, 0), layout
                ).to(device)
                for part in mine.split(config.data.micro_batch_size)
            ]
            dist.barrier()
            inside.seconds, begin = 0.0, time.perf_counter()
            optim = config.optim
            result = engine_step.train_step(
                model, optimizer, passes, batches, optim.lr, optim.max_grad_norm, layout, guard
            )
            before_wait = time.perf_counter()
            loss = result.loss_sum.item() / result.num_tokens.item()
            seconds.append(time.perf_counter() - begin)
            own.append(before_wait - begin - inside.seconds)
            losses.append(loss)
        pipe.send((seconds, own, losses))


@dataclass
class Side:
    """The ranks of one layout and what they measured."""

    name: str
    ranks: int
    pipes: list[Connection]
    processes: list[BaseProcess]
    seconds: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def stop(self) -> None:
        """End the ranks."""
        for pipe in self.pipes:
            pipe.send(0)
        for process in self.processes:
            process.join()

    def train(self, steps: int, threads: int) -> float:
        """Train some steps on all ranks; return the median seconds."""
        for pipe in self.pipes:
            pipe.send((steps, threads))
        answers = [pipe.recv() for pipe in self.pipes]
        seconds, own, losses = answers[0]
        self.seconds += seconds
        self.own += own
        self.losses += losses
        return statistics.median(seconds)


def start(name: str, config: Config, ranks: int, device: str, folder: str) -> Side:
    """Start the ranks of a layout; they wait for their first command."""
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    processes: list[BaseProcess] = []
    for rank in range(ranks):
        near, far = context.Pipe()
        arguments = (config, device, rank, ranks, f"{folder}/{name}", far)
        with huge_pages_for_children():
            processes.append(context.Process(target=_work, args=arguments, daemon=True))
            processes[-1].start()
        far.close()
        pipes.append(near)
    return Side(name, ranks, pipes, processes)


def compare(one: Side, other: Side, threads: int, rounds: int, steps: int) -> dict[str, Any]:
    """Let a layout and one process take turns; return the layout's figures."""
    one.train(WARMUP_STEPS, threads * other.ranks)
    other.train(WARMUP_STEPS, threads)
    other.seconds.clear()
    other.own.clear()
    alone: list[float] = []
    for _ in range(rounds):
        alone.append(one.train(steps, threads * other.ranks))
        other.train(steps, threads)
    step_s = statistics.median(other.seconds)
    return {
        "ranks": other.ranks,
        "step_s": step_s,
        "one_process_step_s": statistics.median(alone),
        "ratio": statistics.median(alone) / step_s,
        "own_share": statistics.median(other.own) / step_s,
        "losses": other.losses,
    }


def read_layout(name: str) -> tuple[list[str], int]:
    """Turn `dp_shard=2,tp=2` into overrides and the number of ranks."""
    words, ranks = [], 1
    for pair in name.split(","):
        key, _, value = pair.partition("=")
        words += [f"--parallel.{key}", value]
        if key in ("dp_replicate", "dp_shard", "cp", "tp", "pp") and value.isdigit():
            ranks *= int(value)
    return words, ranks


def main(argv: Sequence[str]) -> int:
    """Measure the layouts one after the other and print a table."""
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(prog="tools/bench.py layouts", description=__doc__, formatter_class=formatter)
    parser.add_argument("config", nargs="?", default="configs/quickstart.toml", help="preset of the model and batch")
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, metavar="NAME", help="degrees, as dp_shard=2,tp=2")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each side (4)")
    parser.add_argument("--steps", type=int, default=2, help="steps a turn (2)")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    arguments, overrides = parser.parse_known_args(list(argv))
    figures: dict[str, Any] = {}
    try:
        configs: dict[str, tuple[Config, int]] = {}
        for name in ("1 process", *arguments.layouts):
            words, ranks = read_layout(name) if name != "1 process" else ([], 1)
            configs[name] = (resolve(load_config(Path(arguments.config), [*overrides, *words]), ranks), ranks)
        device = "cuda" if configs["1 process"][0].run.device != "cpu" and torch.cuda.is_available() else "cpu"
        check_float8(configs["1 process"][0], torch.device(device))
        threads = configs["1 process"][0].run.threads or 1
        with tempfile.TemporaryDirectory() as folder:
            one = start("1 process", *configs.pop("1 process"), device, folder)
            print(f"{'layout':24s} tokens/s   of one process   step, middle half        framework", flush=True)
            for name, (config, ranks) in configs.items():
                side = start(name, config, ranks, device, folder)
                figures[name] = compare(one, side, threads, arguments.rounds, arguments.steps)
                side.stop()
                _print(name, side, config, figures[name])
            one.stop()
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def _print(name: str, side: Side, config: Config, found: dict[str, Any]) -> None:
    tokens = config.data.global_batch_size * config.data.seq_len
    times = sorted(side.seconds)
    low, high = times[len(times) // 4], times[(3 * len(times)) // 4]
    print(
        f"{name:24s} {tokens / found['step_s']:8,.0f}   {found['ratio']:14.2f}   {low:.3f} to {high:.3f} s"
        f"   {100 * found['own_share']:12.2f}%",
        flush=True,
    )
