"""The whole way once: prepare a corpus, train a small Llama on two processes, and show what came out.

    python tools/quickstart.py [--section.field VALUE ...]

Runs `torchrun --nproc-per-node 2 launchers/train.py configs/quickstart.toml` as a person would, then reads what the run
left. Again: it reuses what is there. Interrupted: it saves, and continues from there.
"""

import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from configs.check import resolve
from configs.errors import INTERRUPTED, RunError
from configs.load import load_config
from configs.schema import Config
from engine.folder import RunFolder
from engine.metrics_log import read_metrics
from tools import torchrun

CONFIG = Path("configs/quickstart.toml")
RANKS = 2
PROMPT = "def "


def main(argv: list[str]) -> int:
    """Train if anything is left to train, then report; return the exit code."""
    if argv in (["--help"], ["-h"]):
        print(f"{__doc__}\nEvery field: python launchers/train.py quickstart --help")
        return 0
    try:
        config = resolve(load_config(CONFIG, argv), RANKS)
        folder = RunFolder(config.run)
        if not is_trained(folder, config):
            code = train(CONFIG, argv)
            if code != 0:
                return code
        else:
            print(f"{folder.path} is trained already; reusing it (remove the folder to train again)")
        report(folder, config)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def is_trained(folder: RunFolder, config: Config) -> bool:
    """Say whether a run has reached its last step."""
    last = folder.checkpoints / f"step-{config.run.steps:08d}"
    return last.is_dir() and folder.metrics.is_file()


def train(preset: Path, argv: list[str]) -> int:
    """Run torchrun on a preset; Ctrl-C has its ranks save and stop."""
    print(
        f".venv/bin/torchrun --nproc-per-node {RANKS} launchers/train.py {' '.join([str(preset), *argv])}", flush=True
    )
    return torchrun.to_end(torchrun.command_of(RANKS, [str(preset), *argv]))


def report(folder: RunFolder, config: Config) -> None:
    """Print what the run achieved, what it wrote, and a sample of its text."""
    lines = read_metrics(folder.metrics)
    steps = [line for line in lines if line["kind"] == "step"]
    evals = [line for line in lines if line["kind"] == "eval"]
    # The first interval holds the warm-up of kernels and caches.
    rates = [line["tokens_per_s"] for line in steps[1:] or steps]
    print("\nheld-out documents       loss  bits per byte")
    for name, line in (("before training", evals[0]), ("after training", evals[-1])):
        print(f"  {name:18s}  {line['heldout_loss']:8.4f}  {line['bits_per_byte']:13.4f}")
    _print_speed(steps[-1], statistics.median(rates))
    print("\nwritten")
    for path, what in (
        (Path(config.data.stores[0].path), "token store and tokenizer"),
        (folder.checkpoints, "checkpoints"),
        (folder.metrics, "metrics, one JSON object a logged step"),
        (folder.tensorboard, f"for: .venv/bin/tensorboard --logdir {folder.path.parent}"),
    ):
        print(f"  {path!s:40s} {what}")
    _print_sample(folder)


def _print_speed(last: dict[str, Any], tokens_per_s: float) -> None:
    scale = tokens_per_s / last["tokens_per_s"]
    measured = last["peak_kind"] == "measured"
    note = "no datasheet peak is known for this device: MFU is against the measured GEMM rate" if measured else ""
    print(
        f"\nspeed (median)  {tokens_per_s:,.0f} tokens/s on {last['num_devices']} ranks, "
        f"MFU {100 * scale * last['mfu']:.1f}% ({100 * scale * last['mfu_causal']:.1f}% with causal attention), "
        f"{100 * scale * last['gemm_share']:.1f}% of the measured GEMM rate"
        + (f"\n                {note}" if note else "")
    )


def _print_sample(folder: RunFolder) -> None:
    """Stream a sample from the newest checkpoint, as a person would ask for it."""
    command = [sys.executable, "tools/generate.py", str(folder.path), "--prompt", PROMPT, "--max-new-tokens", "120"]
    print(f"\nsample: {shlex.join([os.path.relpath(sys.executable), *command[1:]])}\n", flush=True)
    subprocess.run(command, check=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
