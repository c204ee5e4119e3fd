"""Compare tokens/s here and in a plain loop around transformers' LlamaForCausalLM.

    python tools/bench.py [CONFIG] [--section.field VALUE ...] [--rounds N] [--steps N] ...

Both sides train the same model from the same weights on the same batches in the same precision with the same
optimizer, each in a process of its own, and take turns: this machine's mood hits both alike, and the ratio of the
medians is what counts. Both losses are printed: they must agree, or the two did not do the same work. Peak memory is
that of each process. The last line is `ratio X.XX`; the JSON has every timing.

    python tools/bench.py layouts [CONFIG] ...

compares layouts of 2 and 4 processes with one process; see `layouts --help`.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch

from configs.check import resolve
from configs.errors import ConfigError, RunError
from configs.load import config_to_dict, load_config
from configs.schema import Config
from engine.metrics import peak_memory_gib
from engine.peaks import choose_peak, measured_gemm_tflops
from launchers.allocator import huge_pages_for_children, keep_freed_memory
from launchers.env import usable_cores
from models.flops import flops_per_token, num_params
from parallel.fsdp import DTYPES
from tools import bench_layouts

WARMUP_STEPS = 3


class Side(Protocol):
    """One of the two trainings."""

    def step(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Train on (batch, seq) tokens and targets; return the loss, on the device."""
        ...


class Ours:
    """The engine's own train step on one process, without its data, metrics and checkpoints."""

    def __init__(self, config: Config, device: torch.device) -> None:
        """Build the model as a run does."""
        import torch.distributed as dist

        from engine.build import build_passes
        from engine.optim import build_optimizer
        from engine.weights import starting_weights
        from parallel.apply import build_model
        from parallel.mesh import build_layout

        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self.config, self.layout = config, build_layout(config.parallel, device)
        self.model = build_model(config, self.layout, starting_weights(config))
        self.optimizer = build_optimizer(self.model, config.optim)
        _, self.forward_backward = build_passes(config, self.layout, self.model)

    def step(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Train one step, in microbatches where the config asks for them."""
        from engine.data.batches import Batch
        from engine.step import train_step

        size = self.config.data.micro_batch_size
        batches = [
            Batch(tokens=part, targets=wanted, positions=None, documents=None, num_bytes=0)
            for part, wanted in zip(tokens.split(size), targets.split(size), strict=True)
        ]
        optim = self.config.optim
        result = train_step(
            self.model, self.optimizer, self.forward_backward, batches, optim.lr, optim.max_grad_norm, self.layout
        )
        return result.loss_sum / result.num_tokens


class Theirs:
    """A plain loop around transformers' model: bf16 autocast over fp32 weights, torch's fused AdamW."""

    def __init__(self, config: Config, device: torch.device, mode: str) -> None:
        """Build the same model with the same initial weights."""
        from transformers import LlamaConfig, LlamaForCausalLM

        from models.hf_config import hf_config
        from models.hf_weights import our_name
        from models.init import fill_local

        self.config, self.device = config, device
        with device:
            model: torch.nn.Module = LlamaForCausalLM(LlamaConfig(**hf_config(config.model, "float32", None, None)))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                shape = tuple(parameter.shape)
                fill_local(parameter, config.model, config.run.seed, our_name(name), shape, (0,) * len(shape))
        optim = config.optim
        groups = [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": optim.weight_decay},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True
        )
        self.parameters = list(model.parameters())
        self.model = torch.compile(model) if mode == "compile" else model

    def step(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Train one step; `shift_labels` are targets that need no shifting."""
        total = torch.zeros((), device=self.device)
        size = self.config.data.micro_batch_size
        compute = DTYPES[self.config.precision.compute]
        for part, wanted in zip(tokens.split(size), targets.split(size), strict=True):
            with torch.autocast(self.device.type, compute, enabled=compute == torch.bfloat16):
                loss = self.model(input_ids=part, labels=wanted, shift_labels=wanted).loss * len(part) / len(tokens)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optim.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def _work(side: str, config: Config, device_type: str, threads: int, tuned: bool, pipe: Connection) -> None:
    """Be one side: build, warm up, then train as many steps as the pipe says, until it says 0."""
    torch.set_num_threads(threads)
    device = torch.device(device_type, 0) if device_type == "cuda" else torch.device("cpu")
    if device_type == "cpu" and (side == "ours" or tuned):
        keep_freed_memory()  # as a run does
    trained: Side = Ours(config, device) if side == "ours" else Theirs(config, device, side)
    generator = torch.Generator().manual_seed(config.run.seed)

    def run(steps: int) -> tuple[list[float], list[float]]:
        seconds, losses = [], []
        for _ in range(steps):
            shape = (config.data.global_batch_size, config.data.seq_len + 1)
            tokens = torch.randint(config.model.vocab_size, shape, generator=generator).to(device)
            begin = time.perf_counter()
            # The loss is read each step: on a GPU the read waits for the work that is measured.
            losses.append(trained.step(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).item())
            seconds.append(time.perf_counter() - begin)
        return seconds, losses

    pipe.send(run(WARMUP_STEPS))
    while steps := pipe.recv():
        pipe.send(run(steps))
    pipe.send(peak_memory_gib(device)[0])


@dataclass
class Measured:
    """What one side did."""

    seconds: list[float]
    losses: list[float]
    peak_gib: float = 0.0


def measure(
    config: Config, device: str, threads: int, theirs: str, tuned: bool, rounds: int, steps: int
) -> dict[str, Measured]:
    """Let both sides train in turns; the first steps of each are not counted."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    found: dict[str, Measured] = {}
    processes = []
    for side in ("ours", theirs):
        near, far = context.Pipe()
        process = context.Process(target=_work, args=(side, config, device, threads, tuned, far), daemon=True)
        with huge_pages_for_children() if side == "ours" or tuned else nullcontext():
            process.start()
        far.close()
        processes.append(process)
        pipes[side] = near
        found[side] = Measured([], near.recv()[1])
        print(f"{side}: warm, losses {', '.join(f'{loss:.4f}' for loss in found[side].losses)}", flush=True)
    for number in range(1, rounds + 1):
        for side, pipe in pipes.items():
            pipe.send(steps)
            seconds, losses = pipe.recv()
            found[side].seconds += seconds
            found[side].losses += losses
            print(f"round {number}/{rounds}  {side:8s} {statistics.median(seconds):.3f} s/step", flush=True)
    for side, pipe in pipes.items():
        pipe.send(0)
        found[side].peak_gib = pipe.recv()
    for process in processes:
        process.join()
    return found


def report(config: Config, device: str, threads: int, found: dict[str, Measured]) -> dict[str, Any]:
    """Put the figures together; spreads are the middle half of the steps."""
    tokens = config.data.global_batch_size * config.data.seq_len
    compute = DTYPES[config.precision.compute]
    where = torch.device(device, 0) if device == "cuda" else torch.device("cpu")
    gemm = measured_gemm_tflops(where, compute, threads)
    peak = choose_peak(config.metrics.peak_tflops, where, compute, gemm)
    sides: dict[str, Any] = {}
    for side, measured in found.items():
        rates = sorted(tokens / seconds for seconds in measured.seconds)
        median = statistics.median(rates)
        tflops = median * flops_per_token(config.model, config.data.seq_len, causal=False) / 1e12
        sides[side] = {
            "tokens_per_s": median,
            "tokens_per_s_quartiles": [rates[len(rates) // 4], rates[(3 * len(rates)) // 4]],
            "tflops": tflops,
            "mfu": tflops / peak.tflops,
            "gemm_share": tflops / gemm,
            "peak_gib": measured.peak_gib,
            "step_s": measured.seconds,
            "losses": measured.losses,
        }
    ours, theirs = sides.values()
    return {
        "ratio": ours["tokens_per_s"] / theirs["tokens_per_s"],
        "memory_ratio": ours["peak_gib"] / theirs["peak_gib"],
        "sides": sides,
        "gemm_tflops": gemm,
        "peak": {"tflops": peak.tflops, "kind": peak.kind, "name": peak.name},
        "threads": threads,
        "parameters": num_params(config.model),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "config": config_to_dict(config),
    }


def main(argv: list[str]) -> int:
    """Run the comparison and print it."""
    if argv[:1] == ["layouts"]:
        return bench_layouts.main(argv[1:])
    parser = argparse.ArgumentParser(
        prog="tools/bench.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "config", nargs="?", default="configs/bench.toml", help="preset or TOML file of the model and batch"
    )
    parser.add_argument("--rounds", type=int, default=6, help="turns of each side (6)")
    parser.add_argument("--steps", type=int, default=3, help="steps a turn (3)")
    parser.add_argument("--theirs", choices=("eager", "compile"), default="eager", help="how transformers' model runs")
    parser.add_argument("--tuned", action="store_true", help="give theirs the engine's malloc settings too (CPU)")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    arguments, overrides = parser.parse_known_args(argv)
    try:
        if min(arguments.rounds, arguments.steps) < 1:
            raise ConfigError("--rounds and --steps: at least 1 each.")
        config = resolve(load_config(Path(arguments.config), overrides), world_size=1)
        device = "cuda" if config.run.device != "cpu" and torch.cuda.is_available() else "cpu"
        threads = config.run.threads or usable_cores()
        found = measure(config, device, threads, arguments.theirs, arguments.tuned, arguments.rounds, arguments.steps)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    figures = report(config, device, threads, found)
    for side, of_side in figures["sides"].items():
        low, high = of_side["tokens_per_s_quartiles"]
        print(
            f"{side:8s} {of_side['tokens_per_s']:,.0f} tokens/s (middle half {low:,.0f} to {high:,.0f}), "
            f"{100 * of_side['gemm_share']:.0f}% of the measured GEMM rate, peak memory {of_side['peak_gib']:.2f} GiB"
        )
    print(f"memory ratio {figures['memory_ratio']:.2f}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"ratio {figures['ratio']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
