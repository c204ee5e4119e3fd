"""Which saved model a tool uses: the options, and the opening; for tools that compute with a model in one process."""

import argparse
import sys
from pathlib import Path

from engine.saved_model import SavedModel, open_model


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose a model, its checkpoint and its adapter."""
    parser.add_argument(
        "source", type=Path, metavar="FOLDER", help="runs/NAME, a checkpoint, a Hugging Face folder or one of PEFT's"
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--step", type=int, help="checkpoint of this step (default: the newest good one)")
    chosen.add_argument("--best", action="store_true", help="checkpoint with the lowest held-out loss")
    parser.add_argument("--adapter", type=Path, metavar="PEFT_FOLDER", help="put this adapter beside the model")
    parser.add_argument("--no-adapter", action="store_true", help="use the base of a run of an adapter alone")
    parser.add_argument("--member", default="", help="which of several adapters that were trained at once")
    parser.add_argument("--base", type=Path, metavar="HF_FOLDER", help="the adapter's base, where it has moved to")


def open_source(args: argparse.Namespace) -> SavedModel:
    """Open what the options chose, and pass its notes on; raises RunError as open_model does."""
    saved = open_model(
        args.source,
        step=args.step,
        best=args.best,
        base=args.base,
        adapter=args.adapter,
        member=args.member,
        use_adapter=not args.no_adapter,
    )
    for note in saved.notes:
        print(f"note: {note}", file=sys.stderr)
    return saved
