"""Measure the held-out loss of a saved model on token stores, on one process: what an adapter gained, and what it cost.

    python tools/evaluate.py RUN_OR_FOLDER --store data/NAME [--store ...] [--no-adapter] [--max-sequences N]

Takes whatever tools/generate.py takes. Of a store of examples the answers count, packed and kept apart; of any other
each token does. The same sequences are read whatever the model, so that two models compare.
"""

import argparse
import math
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist

from configs.errors import INTERRUPTED, ConfigError, NonFiniteError, RunError, problem
from configs.schema import DataConfig, ObjectiveConfig, ParallelConfig, StoreConfig
from engine.data.batches import Batches
from engine.data.store import TokenStore
from engine.evaluate import HeldoutLoss, evaluate
from engine.loss import chunk_cross_entropy, next_token
from engine.saved_model import SavedModel, load_model
from engine.step import direct
from launchers.env import usable_cores
from parallel.mesh import build_layout
from tools.source import add_source, open_source

SEQUENCES_AT_ONCE = 8
DEFAULT_SEQ_LEN = 1024
_ONE = ParallelConfig(dp_replicate=1, dp_shard=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    args = _parser().parse_args(argv)
    try:
        if args.seq_len < 0 or args.max_sequences < 0:
            raise ConfigError(problem("--seq-len and --max-sequences", "", "must be at least 0"))
        saved = open_source(args)
        found = heldout_losses(saved, args.store, args.seq_len, args.max_sequences)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    for store, (objective, heldout) in found.items():
        bits = "" if heldout.bits_per_byte is None else f"  bits/byte {heldout.bits_per_byte:.4f}"
        print(f"{store}  {objective}  held-out loss {heldout.loss:.4f}{bits}  {heldout.num_tokens:,} tokens")
    return 0


def heldout_losses(
    saved: SavedModel, stores: Sequence[str], seq_len: int = 0, max_sequences: int = 0
) -> dict[str, tuple[str, HeldoutLoss]]:
    """Give the objective and the loss for each store; 0 takes the model's longest sequence (1,024 at most), and all."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if seq_len > saved.config.max_seq_len:
        expected = f"must be at most max_seq_len = {saved.config.max_seq_len} of {saved.where}"
        raise ConfigError(problem("--seq-len", seq_len, expected))
    seq_len = seq_len or min(saved.config.max_seq_len, DEFAULT_SEQ_LEN)
    virtual = _num_virtual_tokens(saved)
    # All are opened before a loss is computed.
    opened = {store: _open(store, saved, seq_len, virtual) for store in stores}
    torch.set_num_threads(usable_cores())
    model = load_model(saved, device, saved.dtype)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        layout = build_layout(_ONE, device)
        forward, _ = direct(model, next_token(ObjectiveConfig(), chunk_cross_entropy), "sharded")
        found: dict[str, tuple[str, HeldoutLoss]] = {}
        for store, (objective, batches) in opened.items():
            read = batches.heldout_microbatches(0, 1, SEQUENCES_AT_ONCE, max_sequences)
            heldout = evaluate(model, forward, (batch.to(device) for batch in read), layout)
            if not math.isfinite(heldout.loss):
                expected, why = "must be finite", "a weight is NaN or infinite, or the format is too narrow for it"
                do = "Take an earlier checkpoint with --step."
                raise NonFiniteError(
                    problem(f"held-out loss of {saved.where} on {store}", heldout.loss, expected, why, do)
                )
            found[store] = objective, heldout
        return found
    finally:
        dist.destroy_process_group()


def _open(store: str, saved: SavedModel, seq_len: int, virtual: int) -> tuple[str, Batches]:
    """Open a store and choose how it is read."""
    opened = TokenStore.open(store)
    if opened.tokenizer.vocab_size > saved.config.vocab_size:
        expected = f"must be at most model.vocab_size = {saved.config.vocab_size}"
        why = "the store is of another tokenizer than the model"
        raise ConfigError(problem(f"tokens of {store}", opened.tokenizer.vocab_size, expected, why))
    objective = "sft" if opened.has_answers else "next_token"
    apart = opened.has_answers or virtual > 0
    data = DataConfig(
        stores=(StoreConfig(path=store),),
        seq_len=seq_len,
        global_batch_size=SEQUENCES_AT_ONCE,
        packing="best_fit" if apart else "concat",
        document_mask=apart,
    )
    return objective, Batches(data, 0, "heldout", objective=objective, num_virtual_tokens=virtual)


def _num_virtual_tokens(saved: SavedModel) -> int:
    adapter = None if saved.adapter is None else saved.adapter.config
    return adapter.num_virtual_tokens if adapter is not None and adapter.kind in ("prompt", "prefix") else 0


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None, "the module docstring is the help text"
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="tools/evaluate.py", description=__doc__, formatter_class=formatter)
    add_source(parser)
    parser.add_argument("--store", action="append", required=True, help="token store; may be given several times")
    parser.add_argument("--seq-len", type=int, default=0, help="tokens a sequence (default: the model's, 1024 at most)")
    parser.add_argument("--max-sequences", type=int, default=0, help="of each store, evenly spaced (default: all)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
