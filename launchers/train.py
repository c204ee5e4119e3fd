"""Train: `torchrun --nproc-per-node N launchers/train.py CONFIG [--section.field VALUE ...]`, or plain python for one
process. The same command again continues the run from its last checkpoint.

Reads the command line and the environment, starts torch.distributed, hands over to engine.train, and turns errors that
a user can cause into one message and an exit code: 2 for a configuration, 1 for a failure, 130 for Ctrl-C.
"""

import logging
import os
import re
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from rich.console import Console

from configs.check import missing_files, resolve
from configs.cli import parse_command_line
from configs.errors import ConfigError, LayoutError, RankFailure, RunError, problem
from configs.load import find_config
from configs.schema import Config
from engine.build import build_run
from engine.folder import RunFolder
from engine.progress import ProgressDisplay
from engine.train import train
from launchers.env import Launch, environment_of, read_launch, threads_per_rank, usable_cores

# What gloo and NCCL say when a peer is gone.
_LOST_PEER = re.compile(
    r"connection (was )?(closed|reset|refused)|timed out|broken pipe|remote process|unhandled system", re.I
)


def main(argv: Sequence[str]) -> int:
    """Run the command line; return the exit code."""
    try:
        launch = read_launch(os.environ)
    except RunError as error:
        return _report(error, "")
    speaks = launch.rank == 0
    try:
        path, config = parse_command_line(list(argv), "launchers/train.py")
        config = resolve(config, launch.world_size)
        problems = missing_files(config)
        if problems:
            raise ConfigError(problems)
        _run(config, find_config(path).read_text(), launch)
    except RunError as error:
        logging.getLogger().error("%s", error)
        # What all ranks find, rank 0 says; what one rank finds, it says itself.
        if speaks or not isinstance(error, ConfigError | LayoutError):
            return _report(error, "" if speaks else f"rank {launch.rank}: ")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _report(error: RunError, prefix: str) -> int:
    sys.stderr.write(f"{prefix}error: {error}\n")
    return error.exit_code


def _run(config: Config, given: str, launch: Launch) -> None:
    """Start torch.distributed, train, and take everything down in order."""
    device = _device(config, launch)
    torch.set_num_threads(threads_per_rank(config.run.threads, launch.local_world_size, usable_cores()))
    if config.run.deterministic:
        _be_deterministic()
    _start_process_group(config, device, launch)
    console = Console() if launch.rank == 0 else None
    with ProgressDisplay(console, config.run.steps) if console else nullcontext() as progress:
        try:
            run = build_run(config, given, device, launch.local_world_size, progress)
            _log_to(run.folder, launch)
            try:
                outcome = train(run)
                if progress is not None:
                    progress.say(f"done: {outcome.step} steps, {run.folder.path}")
            finally:
                run.close()
        except (RuntimeError, OSError) as error:
            logging.getLogger().error("%s", traceback.format_exc())
            if isinstance(error, RuntimeError) and launch.world_size > 1 and _LOST_PEER.search(str(error)):
                raise RankFailure(_lost_peer(error, launch)) from error
            raise
    dist.destroy_process_group()


def _lost_peer(error: RuntimeError, launch: Launch) -> str:
    first_line = str(error).strip().splitlines()[0]
    do = "Look for the first error of another rank; the same command continues from the last checkpoint."
    return problem(f"rank {launch.rank} of {launch.world_size}", "", "lost contact with another rank", first_line, do)


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


def _start_process_group(config: Config, device: torch.device, launch: Launch) -> None:
    """Meet the other ranks; a single process meets nobody and opens no port."""
    timeout = timedelta(seconds=config.fault.first_step_timeout_s)
    # Checkpoints and counters of the host travel by gloo beside NCCL.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    os.environ.update(environment_of(launch, os.environ))
    if launch.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    device_id = device if device.type == "cuda" else None
    dist.init_process_group(
        backend, rank=launch.rank, world_size=launch.world_size, timeout=timeout, device_id=device_id
    )


def _log_to(folder: RunFolder, launch: Launch) -> None:
    root = logging.getLogger()
    root.addHandler(folder.log_of(launch.rank))
    root.setLevel(logging.INFO)
    root.info("rank %d of %d, process %d, torch %s", launch.rank, launch.world_size, os.getpid(), torch.__version__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
