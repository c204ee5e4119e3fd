"""Several LoRA adapters in one run against one: `python tools/bench.py members [CONFIG] [--section.field VALUE ...]`.

Both sides train beside the same frozen base, each in a process of its own, in turns: one adapter on the config's batch,
and `--members` of them on such a batch each. The first of these has the single run's weights and batches, so their
losses must agree. What the members share is the base's pass: the smaller a member's batch, the worse one alone uses the
machine, and the more there is to gain. The last line is `factor X.XX`: tokens/s of all together over the single run's.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from configs.adapters import MemberConfig
from configs.check import resolve
from configs.errors import INTERRUPTED, ConfigError, RunError, problem
from configs.load import load_config
from configs.schema import Config
from engine.data.members import joined
from launchers.env import usable_cores
from tools.turns import OURS, Measured, Ours, add_turns, measure

TOGETHER = "together"


class Together(Ours):
    """The engine's own train step with several members, which all get the same tokens."""

    def __init__(self, config: Config, device: torch.device, count: int) -> None:
        """Give all the same rank, and the others than the first other seeds and learning rates, as a sweep does."""
        others = (MemberConfig(name=f"m{at}", seed=at, lr=config.optim.lr / 2**at) for at in range(1, count))
        members = (MemberConfig(name="m0"), *others)
        super().__init__(replace(config, adapter=replace(config.adapter, members=members)), device)
        self._count = count

    def step(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Train one step; returns the loss of the first."""
        return self.train([joined([part] * self._count) for part in self.microbatches(tokens, targets)])[0]


def main(argv: Sequence[str]) -> int:
    """Run the comparison and print it."""
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(prog="tools/bench.py members", description=__doc__, formatter_class=formatter)
    add_turns(parser)
    parser.add_argument("--members", type=int, default=4, help="adapters that are trained together (4)")
    arguments, overrides = parser.parse_known_args(list(argv))
    try:
        if min(arguments.rounds, arguments.steps) < 1 or arguments.members < 2:
            raise ConfigError("--rounds and --steps: at least 1 each; --members: at least 2.")
        config = resolve(load_config(Path(arguments.config), ["--adapter.kind", "lora", *overrides]), world_size=1)
        if config.adapter.members:
            do = "Leave it out: --members says how many."
            raise ConfigError(problem("adapter.members", "", "is what the other side gets", do=do))
        device = "cuda" if config.run.device != "cpu" and torch.cuda.is_available() else "cpu"
        threads = config.run.threads or usable_cores()
        sides = {OURS: Ours, TOGETHER: partial(Together, count=arguments.members)}
        found = measure(config, device, threads, sides, True, arguments.rounds, arguments.steps)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    figures = report(config, found, arguments.members)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    for side, of_side in figures["sides"].items():
        low, high = of_side["tokens_per_s_quartiles"]
        spread = f"(middle half {low:,.0f} to {high:,.0f})"
        print(f"{side:8s} {of_side['tokens_per_s']:,.0f} tokens/s {spread}, peak memory {of_side['peak_gib']:.2f} GiB")
    print(f"losses agree to {figures['loss_difference']:.1e}")
    print(f"factor {figures['factor']:.2f}")
    return 0


def report(config: Config, found: dict[str, Measured], count: int) -> dict[str, Any]:
    """Put the figures of both sides together; spreads are the middle half of the steps."""
    tokens = config.data.global_batch_size * config.data.seq_len
    sides: dict[str, Any] = {}
    for side, measured in found.items():
        trained = tokens * (count if side == TOGETHER else 1)
        rates = sorted(trained / seconds for seconds in measured.seconds)
        sides[side] = {
            "tokens_per_s": statistics.median(rates),
            "tokens_per_s_quartiles": [rates[len(rates) // 4], rates[(3 * len(rates)) // 4]],
            "peak_gib": measured.peak_gib,
            "step_s": measured.seconds,
            "losses": measured.losses,
        }
    losses = zip(found[OURS].losses, found[TOGETHER].losses, strict=True)
    return {
        "factor": sides[TOGETHER]["tokens_per_s"] / sides[OURS]["tokens_per_s"],
        "loss_difference": max(abs(one - other) for one, other in losses),
        "members": count,
        "sides": sides,
    }
