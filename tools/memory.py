"""Say what a config trains and what a rank of its layout holds for sure, without building or reading anything.

    python tools/memory.py CONFIG [--ranks N] [--section.field VALUE ...]

Weights, gradients and optimizer state are counted; activations, gathered parameters and what libraries keep come on
top. adapter.base = auto counts as sharded: a run decides by the memory that it finds.
"""

import argparse
import sys
from pathlib import Path

from configs.check import resolve
from configs.errors import ConfigError, RunError, problem
from configs.load import load_config
from engine.memory import GIB, held_bytes
from engine.trained import trained_table
from models.flops import num_params


def main(argv: list[str]) -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="tools/memory.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="preset or TOML file")
    parser.add_argument("--ranks", type=int, default=1, help="processes, one a GPU (1)")
    arguments, overrides = parser.parse_known_args(argv)
    try:
        if arguments.ranks < 1:
            raise ConfigError(problem("--ranks", arguments.ranks, "must be at least 1"))
        config = resolve(load_config(Path(arguments.config), overrides), world_size=arguments.ranks)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    params = num_params(config.model)
    if config.adapter.kind == "none":
        print(f"training all {params:,} parameters")
    else:
        print("\n".join(trained_table(config)))
    held = held_bytes(config)
    total = held.state + held.whole
    each = f"{total * arguments.ranks / params:.3g} bytes a parameter of the model, summed over all ranks"
    print(f"a rank holds {total / GIB:.2f} GiB without activations ({each})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
