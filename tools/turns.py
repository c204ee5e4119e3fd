"""Two trainings of the same model that take turns, each in a process of its own: the engine's and somebody else's.

This machine's mood hits both alike, so the ratio of the medians is what counts. tools/bench.py and tools/bench_lora.py
bring the other side.
"""

import argparse
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch

from configs.load import config_to_dict
from configs.schema import Config
from engine.data.batches import Batch
from engine.memory import choose_base
from engine.metrics import peak_memory_gib
from engine.peaks import choose_peak, measured_gemm_tflops
from launchers.allocator import huge_pages_for_children, keep_freed_memory
from models.adapters import trained_shapes
from models.flops import flops_per_token, num_params
from parallel.fsdp import DTYPES

WARMUP_STEPS = 3
GEMM_TURNS, GEMM_S = 3, 1.2
OURS = "ours"


class Side(Protocol):
    """One of the two trainings."""

    def step(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Train on (batch, seq) tokens and targets; return the loss, on the device."""
        ...


Build = Callable[[Config, torch.device], Side]
"""Called in the side's own process."""


class Ours:
    """The engine's own train step on one process, without its data, metrics and checkpoints."""

    def __init__(self, config: Config, device: torch.device) -> None:
        """Build the model as a run does."""
        import torch.distributed as dist

        from engine.build import build_passes
        from engine.fault.guard import Guard
        from engine.optim import build_optimizer
        from engine.weights import starting_weights
        from parallel.apply import build_model
        from parallel.mesh import build_layout

        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        config = choose_base(config, device, 1)
        self.config, self.layout = config, build_layout(config.parallel, device)
        self.model = build_model(config, self.layout, starting_weights(config))
        adapter = config.adapter
        self.optimizer = build_optimizer(self.model, config.optim, adapter.lora_plus_ratio, adapter.members)
        _, self.forward_backward = build_passes(config, self.layout, self.model)
        self.guard = Guard(config.fault, len(adapter.members), device)

    def step(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Train one step, in microbatches where the config asks for them."""
        return self.train(self.microbatches(tokens, targets))

    def microbatches(self, tokens: torch.Tensor, targets: torch.Tensor) -> list[Batch]:
        """Cut (batch, seq) tokens and targets into the config's microbatches."""
        size = self.config.data.micro_batch_size
        return [
            Batch(tokens=part, targets=wanted, positions=None, documents=None, num_bytes=0)
            for part, wanted in zip(tokens.split(size), targets.split(size), strict=True)
        ]

    def train(self, batches: Sequence[Batch]) -> torch.Tensor:
        """Train one step; return the loss, of each member where there are several."""
        from engine.step import train_step

        optim, passes = self.config.optim, self.forward_backward
        result = train_step(
            self.model, self.optimizer, passes, batches, optim.lr, optim.max_grad_norm, self.layout, self.guard
        )
        return result.loss_sum / result.num_tokens


def add_turns(parser: argparse.ArgumentParser) -> None:
    """Add the options that every comparison has: what is trained, for how long, and where the figures go."""
    parser.add_argument(
        "config", nargs="?", default="configs/bench.toml", help="preset or TOML file of the model and batch"
    )
    parser.add_argument("--rounds", type=int, default=6, help="turns of each side (6)")
    parser.add_argument("--steps", type=int, default=3, help="steps a turn (3)")
    parser.add_argument("--json", type=Path, help="write every figure to this file")


def train_plainly(
    model: torch.nn.Module,
    parameters: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    config: Config,
    tokens: torch.Tensor,
    targets: torch.Tensor,
) -> torch.Tensor:
    """Train a transformers model one step under autocast; `shift_labels` are targets that need no shifting."""
    total = torch.zeros((), device=tokens.device)
    size, compute = config.data.micro_batch_size, DTYPES[config.precision.compute]
    for part, wanted in zip(tokens.split(size), targets.split(size), strict=True):
        with torch.autocast(tokens.device.type, compute, enabled=compute == torch.bfloat16):
            loss = model(input_ids=part, labels=wanted, shift_labels=wanted).loss * len(part) / len(tokens)
        loss.backward()
        total += loss.detach()
    torch.nn.utils.clip_grad_norm_(parameters, config.optim.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return total


@dataclass
class Measured:
    """What one side did."""

    seconds: list[float]
    losses: list[float]
    cpu_seconds: list[float]
    """Of all threads of the process: what other processes do hardly touches it, most of all with --run.threads 1."""
    peak_gib: float = 0.0


def measure(
    config: Config, device: str, threads: int, sides: Mapping[str, Build], tuned: bool, rounds: int, steps: int
) -> dict[str, Measured]:
    """Let the sides train in turns; the first steps of each are not counted. `tuned`: malloc as ours for all."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    found: dict[str, Measured] = {}
    processes = []
    for side, build in sides.items():
        near, far = context.Pipe()
        as_a_run = side == OURS or tuned
        process = context.Process(target=_work, args=(build, config, device, threads, as_a_run, far), daemon=True)
        with huge_pages_for_children() if as_a_run else nullcontext():
            process.start()
        far.close()
        processes.append(process)
        pipes[side] = near
        found[side] = Measured([], near.recv()[1], [])
        print(f"{side}: warm, losses {', '.join(f'{loss:.4f}' for loss in found[side].losses)}", flush=True)
    for number in range(1, rounds + 1):
        for side, pipe in pipes.items():
            pipe.send(steps)
            seconds, losses, cpu_seconds = pipe.recv()
            found[side].seconds += seconds
            found[side].losses += losses
            found[side].cpu_seconds += cpu_seconds
            print(f"round {number}/{rounds}  {side:8s} {statistics.median(seconds):.3f} s/step", flush=True)
    for side, pipe in pipes.items():
        pipe.send(0)
        found[side].peak_gib = pipe.recv()
    for process in processes:
        process.join()
    return found


def _work(build: Build, config: Config, device_type: str, threads: int, as_a_run: bool, pipe: Connection) -> None:
    """Be one side: build, warm up, then train as many steps as the pipe says, until it says 0."""
    torch.set_num_threads(threads)
    device = torch.device(device_type, 0) if device_type == "cuda" else torch.device("cpu")
    if device_type == "cpu" and as_a_run:
        keep_freed_memory()
    trained = build(config, device)
    generator = torch.Generator().manual_seed(config.run.seed)

    def run(steps: int) -> tuple[list[float], list[float], list[float]]:
        seconds, losses, cpu_seconds = [], [], []
        for _ in range(steps):
            shape = (config.data.global_batch_size, config.data.seq_len + 1)
            tokens = torch.randint(config.model.vocab_size, shape, generator=generator).to(device)
            begin, cpu_begin = time.perf_counter(), time.process_time()
            # The loss is read each step: on a GPU the read waits for the work that is measured.
            losses.append(trained.step(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).item())
            seconds.append(time.perf_counter() - begin)
            cpu_seconds.append(time.process_time() - cpu_begin)
        return seconds, losses, cpu_seconds

    pipe.send(run(WARMUP_STEPS))
    while steps := pipe.recv():
        pipe.send(run(steps))
    pipe.send(peak_memory_gib(device)[0])


def report(config: Config, device: str, threads: int, found: dict[str, Measured]) -> dict[str, Any]:
    """Put the figures of our side and the other together; spreads are the middle half of the steps."""
    tokens = config.data.global_batch_size * config.data.seq_len
    compute = DTYPES[config.precision.compute]
    where = torch.device(device, 0) if device == "cuda" else torch.device("cpu")
    # Other work can only slow it.
    gemm = max(measured_gemm_tflops(where, compute, threads, budget_s=GEMM_S) for _ in range(GEMM_TURNS))
    peak = choose_peak(config.metrics.peak_tflops, where, compute, gemm)
    trained = None if config.adapter.kind == "none" else trained_shapes(config.model, config.adapter)
    flops = flops_per_token(config.model, config.data.seq_len, causal=False, trained=trained)
    sides: dict[str, Any] = {}
    for side, measured in found.items():
        rates = sorted(tokens / seconds for seconds in measured.seconds)
        median = statistics.median(rates)
        tflops = median * flops / 1e12
        sides[side] = {
            "tokens_per_s": median,
            "tokens_per_s_quartiles": [rates[len(rates) // 4], rates[(3 * len(rates)) // 4]],
            "tflops": tflops,
            "mfu": tflops / peak.tflops,
            "gemm_share": tflops / gemm,
            "peak_gib": measured.peak_gib,
            "step_s": measured.seconds,
            "step_cpu_s": measured.cpu_seconds,
            "losses": measured.losses,
        }
    ours, theirs = sides.values()
    return {
        "ratio": ours["tokens_per_s"] / theirs["tokens_per_s"],
        "memory_ratio": ours["peak_gib"] / theirs["peak_gib"],
        "cpu_ratio": statistics.median(theirs["step_cpu_s"]) / statistics.median(ours["step_cpu_s"]),
        "sides": sides,
        "gemm_tflops": gemm,
        "peak": {"tflops": peak.tflops, "kind": peak.kind, "name": peak.name},
        "threads": threads,
        "parameters": num_params(config.model),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "config": config_to_dict(config),
    }


def print_report(figures: dict[str, Any]) -> None:
    """Print a line for each side, and the ratios; the last line is that of the tokens/s."""
    for side, of_side in figures["sides"].items():
        low, high = of_side["tokens_per_s_quartiles"]
        print(
            f"{side:8s} {of_side['tokens_per_s']:,.0f} tokens/s (middle half {low:,.0f} to {high:,.0f}), "
            f"{100 * of_side['gemm_share']:.0f}% of the measured GEMM rate, peak memory {of_side['peak_gib']:.2f} GiB"
        )
    print(f"memory ratio {figures['memory_ratio']:.2f}")
    print(f"ratio in tokens a CPU second {figures['cpu_ratio']:.2f}")
    print(f"ratio {figures['ratio']:.2f}")
