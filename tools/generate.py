"""Continue a prompt with a trained model; the text appears as it is made.

    python tools/generate.py RUN_OR_CHECKPOINT_OR_FOLDER --prompt "Once upon a time" [--greedy] [--seed N]
    python tools/generate.py ADAPTER_RUN --no-adapter ...             # its base alone
    python tools/generate.py HF_FOLDER --adapter PEFT_FOLDER ...      # the same as: PEFT_FOLDER --base HF_FOLDER

Text goes to the standard output, speed and remarks to the standard error. The tokenizer is the one saved with the
model. An empty prompt starts a new document.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from configs.errors import INTERRUPTED, CheckpointError, ConfigError, RunError, problem
from engine.data.tokenizer import Tokenizer
from engine.generate import Sampling, generate
from engine.hf_tokenizer import leading_ids
from engine.saved_model import SavedModel, load_model
from models.flops import num_params
from models.hf_weights import HfWeights
from tools.source import add_source, open_source

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

MAX_THREADS = 1024
SMALL = 100_000_000
"""Parameters below which threads that wait for each other cost more than they compute, most of all on busy cores."""


def main(argv: Sequence[str] | None = None) -> int:
    """Generate once; return the exit code."""
    args = _parser().parse_args(argv)
    try:
        _generate(args)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print()
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None, "the module docstring is the help text"
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="tools/generate.py", description=__doc__, formatter_class=formatter)
    add_source(parser)
    parser.add_argument("--merged", action="store_true", help="merge the adapter into the base first, in memory")
    parser.add_argument("--prompt", default="", help="text to continue (default: a new document)")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="stop after so many (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="mass to draw from (default: %(default)s)")
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token; same as --temperature 0")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default: %(default)s)")
    parser.add_argument("--device", default="", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: one for a small model, else all)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="format to compute in (default: the model's own)")
    parser.add_argument("--tokenizer", default="", help="tokenizer.json or .model (default: the one with the model)")
    return parser


def _generate(args: argparse.Namespace) -> None:
    if not 0 <= args.threads <= MAX_THREADS:
        raise ConfigError(problem("--threads", args.threads, f"must be from 0 to {MAX_THREADS}"))
    try:
        args.prompt.encode("utf-8")
    except UnicodeEncodeError:  # the shell passes any bytes
        raise ConfigError(problem("--prompt", args.prompt, "must be text in UTF-8")) from None
    sampling = Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=0.0 if args.greedy else args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )
    device = _device(args.device)
    saved = open_source(args)
    if args.merged and saved.adapter is None:
        raise ConfigError(problem("--merged", "", f"{saved.where} has no adapter to merge", do="Leave it out."))
    tokenizer = _tokenizer(args.tokenizer, saved)
    prompt = _prompt(args.prompt, tokenizer, saved)
    threads = args.threads or int(num_params(saved.config) < SMALL)
    if threads:
        torch.set_num_threads(threads)
    model = load_model(saved, device, DTYPES[args.dtype] if args.dtype else saved.dtype, merged=args.merged)
    stream = tokenizer.stream()
    num_tokens = 0
    print(args.prompt, end="", flush=True)
    begin = time.perf_counter()
    virtual = _num_virtual_tokens(saved)
    for token in generate(model, prompt, sampling, tokenizer.eos_id, tokenizer.vocab_size, virtual):
        num_tokens += 1
        print(stream.push(token), end="", flush=True)
    print(stream.finish(), flush=True)
    took_s = time.perf_counter() - begin
    print(f"{num_tokens} tokens, {num_tokens / took_s:.1f} tokens/s on {device} ({saved.where})", file=sys.stderr)
    if virtual + len(prompt) + num_tokens == saved.config.max_seq_len and num_tokens < sampling.max_new_tokens:
        print(f"note: the model's context of {saved.config.max_seq_len} tokens is full", file=sys.stderr)


def _num_virtual_tokens(saved: SavedModel) -> int:
    adapter = None if saved.adapter is None else saved.adapter.config
    return adapter.num_virtual_tokens if adapter is not None and adapter.kind in ("prompt", "prefix") else 0


def _device(name: str) -> torch.device:
    """The device to compute on; ConfigError for one that is not there."""
    chosen = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(chosen)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(problem("--device", chosen, "can't be used", reason, "Use --device cpu.")) from None
    return device


def _tokenizer(given: str, saved: SavedModel) -> Tokenizer:
    """The tokenizer to read and write text with, checked against the model's vocabulary."""
    path = Path(given) if given else saved.tokenizer
    if path is None:
        do = "Give --tokenizer FILE."
        raise CheckpointError(problem(saved.where, "", "no tokenizer was saved with the model", do=do))
    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size > saved.config.vocab_size:
        expected = f"must be at most model.vocab_size = {saved.config.vocab_size}"
        why = "the tokenizer is not the one the model was trained with"
        raise ConfigError(problem(f"tokens of {path}", tokenizer.vocab_size, expected, why))
    return tokenizer


def _prompt(text: str, tokenizer: Tokenizer, saved: SavedModel) -> list[int]:
    """The ids to continue: as transformers would begin a text for a Hugging Face folder, as training did for a run."""
    leading = leading_ids(tokenizer.path) if isinstance(saved.reader, HfWeights) else []
    return leading + tokenizer.encode(text) or [tokenizer.eos_id]


if __name__ == "__main__":
    sys.exit(main())
