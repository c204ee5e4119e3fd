"""Compare tokens/s here and in a plain loop around transformers' LlamaForCausalLM.

    python tools/bench.py [CONFIG] [--section.field VALUE ...] [--rounds N] [--steps N] ...

Both sides train the same model from the same weights on the same batches in the same precision with the same
optimizer, each in a process of its own, and take turns: this machine's mood hits both alike, and the ratio of the
medians is what counts. Both losses are printed: they must agree, or the two did not do the same work. Peak memory is
that of each process. The last line is `ratio X.XX`; the JSON has every timing.

    python tools/bench.py lora [CONFIG] ...

compares LoRA here and in transformers with PEFT; see `lora --help`.

    python tools/bench.py members [CONFIG] ...

compares several adapters in one run with one; see `members --help`.

    python tools/bench.py layouts [CONFIG] ...

compares layouts of 2 and 4 processes with one process; see `layouts --help`.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from configs.check import resolve
from configs.errors import INTERRUPTED, ConfigError, RunError
from configs.load import load_config
from configs.schema import Config
from launchers.env import usable_cores
from parallel.float8 import check_float8
from tools import bench_layouts, bench_lora, bench_members
from tools.turns import OURS, Ours, add_turns, measure, print_report, report, train_plainly


class Theirs:
    """A plain loop around transformers' model: bf16 autocast over fp32 weights, torch's fused AdamW."""

    def __init__(self, config: Config, device: torch.device, mode: str) -> None:
        """Build the same model with the same initial weights."""
        from transformers import LlamaConfig, LlamaForCausalLM

        from models.hf_config import hf_config
        from models.hf_weights import our_name
        from models.init import fill_local

        self.config = config
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
        self.model: Any = torch.compile(model) if mode == "compile" else model

    def step(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Train one step."""
        return train_plainly(self.model, self.parameters, self.optimizer, self.config, tokens, targets)


def main(argv: list[str]) -> int:
    """Run the comparison and print it."""
    if argv[:1] == ["layouts"]:
        return bench_layouts.main(argv[1:])
    if argv[:1] == ["lora"]:
        return bench_lora.main(argv[1:])
    if argv[:1] == ["members"]:
        return bench_members.main(argv[1:])
    parser = argparse.ArgumentParser(
        prog="tools/bench.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_turns(parser)
    parser.add_argument("--theirs", choices=("eager", "compile"), default="eager", help="how transformers' model runs")
    parser.add_argument("--tuned", action="store_true", help="give theirs the engine's malloc settings too (CPU)")
    arguments, overrides = parser.parse_known_args(argv)
    try:
        if min(arguments.rounds, arguments.steps) < 1:
            raise ConfigError("--rounds and --steps: at least 1 each.")
        config = resolve(load_config(Path(arguments.config), overrides), world_size=1)
        device = "cuda" if config.run.device != "cpu" and torch.cuda.is_available() else "cpu"
        check_float8(config, torch.device(device))
        threads = config.run.threads or usable_cores()
        sides = {OURS: Ours, arguments.theirs: partial(Theirs, mode=arguments.theirs)}
        found = measure(config, device, threads, sides, arguments.tuned, arguments.rounds, arguments.steps)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    figures = report(config, device, threads, found)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    print_report(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
