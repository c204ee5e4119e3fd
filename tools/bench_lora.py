"""LoRA here against transformers + PEFT: `python tools/bench.py lora [CONFIG] [--section.field VALUE ...]`.

Both sides freeze the same bf16 base and train the same fp32 adapters (rank 16 beside all projections unless [adapter]
says otherwise) on the same batches with the same optimizer, each in a process of its own, in turns. Theirs is a plain
loop: autocast to bf16, as trainers around PEFT run it. `--theirs bf16` holds their adapters in bf16, which saves casts
and costs precision. Losses must agree. The last two lines are `memory ratio X.XX` and `ratio X.XX`.
"""

import argparse
import importlib.util
import json
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from configs.adapters import AdapterConfig
from configs.check import resolve
from configs.errors import INTERRUPTED, ConfigError, RunError, problem
from configs.load import load_config
from configs.schema import Config
from launchers.env import usable_cores
from parallel.fsdp import DTYPES
from tools.turns import OURS, Ours, add_turns, measure, print_report, report, train_plainly

COMPARED = {"kind", "targets", "rank", "alpha", "rslora", "dora", "base"}
"""Fields of [adapter] that may be set; the others are left as they are, since only ours would do what they say."""


class Peft:
    """transformers' model with PEFT's LoRA beside its projections, and torch's fused AdamW over the adapters."""

    def __init__(self, config: Config, device: torch.device, adapters: str) -> None:
        """Build the same model with the same initial weights; `adapters`: the format they are held in."""
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM

        from models.hf_config import hf_config

        self.config = config
        with device:
            base: Any = LlamaForCausalLM(LlamaConfig(**hf_config(config.model, "float32", None, None)))
        base = base.to(DTYPES[config.precision.compute])
        _fill(base, config, "")
        adapter = config.adapter
        targets = "all-linear" if adapter.targets == ("all-linear",) else list(adapter.targets)
        lora = LoraConfig(
            task_type="CAUSAL_LM",
            r=adapter.rank,
            lora_alpha=adapter.alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=0.0,
            target_modules=targets,
            use_rslora=adapter.rslora,
            use_dora=adapter.dora,
        )
        self.model: torch.nn.Module = get_peft_model(base, lora, autocast_adapter_dtype=adapters == "fp32")
        _fill(self.model, config, "lora_")
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optim = config.optim
        groups = [
            {"params": [p for p in self.parameters if p.dim() > 1], "weight_decay": optim.weight_decay},
            {"params": [p for p in self.parameters if p.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            fused=True,
        )

    def step(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Train one step."""
        return train_plainly(self.model, self.parameters, self.optimizer, self.config, tokens, targets)


def _fill(model: torch.nn.Module, config: Config, kind: str) -> None:
    """Give parameters whose names hold `kind` the values that ours start from."""
    from models.hf_weights import our_name
    from models.init import fill_local

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            plain = our_name(name.removeprefix("base_model.model.").replace(".default", ""))
            shape, start = tuple(parameter.shape), (0,) * parameter.dim()
            if kind in plain and "lora_magnitude" not in plain:  # PEFT has taken that from the base
                fill_local(parameter, config.model, config.run.seed, plain, shape, start)


def main(argv: list[str]) -> int:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(
        prog="tools/bench.py lora", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_turns(parser)
    parser.add_argument("--theirs", choices=("fp32", "bf16"), default="fp32", help="format of PEFT's adapters (fp32)")
    parser.add_argument("--tuned", action="store_true", help="give theirs the engine's malloc settings too (CPU)")
    arguments, overrides = parser.parse_known_args(argv)
    try:
        if min(arguments.rounds, arguments.steps) < 1:
            raise ConfigError("--rounds and --steps: at least 1 each.")
        _find_peft()
        is_said = any(word.partition("=")[0] == "--adapter.kind" for word in overrides)
        kind = [] if is_said else ["--adapter.kind", "lora"]
        config = resolve(load_config(Path(arguments.config), [*kind, *overrides]), world_size=1)
        _check_compared(config)
        device = "cuda" if config.run.device != "cpu" and torch.cuda.is_available() else "cpu"
        threads = config.run.threads or usable_cores()
        sides = {OURS: Ours, "peft": partial(Peft, adapters=arguments.theirs)}
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


def _find_peft() -> None:
    if importlib.util.find_spec("peft") is None:
        do = "Run make bench, or: pip install -e '.[bench]'."
        raise ConfigError(problem("tools/bench.py lora", "", "peft is not installed", "it is the other side", do))


def _check_compared(config: Config) -> None:
    """Refuse settings that the other side would not follow."""
    adapter, default = config.adapter, AdapterConfig()
    if adapter.kind != "lora":
        raise ConfigError(problem("adapter.kind", adapter.kind, "must be lora, which is what is compared"))
    names = [field.name for field in fields(AdapterConfig) if field.name not in COMPARED]
    other = [name for name in names if getattr(adapter, name) != getattr(default, name)]
    why, do = "the other side would not do it", "Remove it."
    if other:
        raise ConfigError([problem(f"adapter.{n}", getattr(adapter, n), "is not compared", why, do) for n in other])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
