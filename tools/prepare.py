"""Make a token store: `python tools/prepare.py INPUT... --out DIR (--tokenizer FILE | --train-tokenizer VOCAB)`.

A thin command over engine/data/prepare.py: arguments in, a progress bar, and at the end what was made and how to train
on it. docs/data.md says what is read, what a bad record is and how the store looks.
"""

import argparse
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from configs.errors import INTERRUPTED, RunError
from engine.data.options import DEFAULT_HELDOUT, PrepareOptions
from engine.data.prepare import Prepared, Progress, ProgressCallback, prepare
from engine.data.sources import FORMATS, STDLIB, STDLIB_DOCS, listed_suffixes, supported

NEXT_COMMAND = "{torchrun} --nproc-per-node 2 launchers/train.py configs/quickstart.toml {overrides}"
"""What to run on a new store; `torchrun` is that of this environment, `overrides` names the store, its vocabulary and a
run of its own."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    options = _parse(arguments)
    begin = time.perf_counter()
    try:
        with _progress_bar() as report:
            prepared = prepare(options, report)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"interrupted: {options.out} was not made", file=sys.stderr)
        return INTERRUPTED
    _print("\n".join(_summary(prepared, time.perf_counter() - begin)))
    return 0


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough; Python would try again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminate(signum: int, frame: FrameType | None) -> None:
    """End by an exception, so that nothing half-made is left."""
    raise SystemExit(128 + signum)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python tools/prepare.py",
        description="Turn text into a token store, which a run then reads. The store appears whole or not at all.",
        epilog="Example: python tools/prepare.py ~/novels --out data/novels --train-tokenizer 4096",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help=f"files, folders (searched recursively), {STDLIB} (the sources of Python's own standard library) or "
        f"{STDLIB_DOCS} (questions about its functions, and their answers). "
        f"Read are {supported()}. A text file is one document; .jsonl and .parquet hold one a record",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make; must not exist yet")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="sentencepiece .model, Hugging Face tokenizer.json, or a folder with one (also that of another store)",
    )
    which.add_argument(
        "--train-tokenizer",
        type=int,
        default=0,
        metavar="VOCAB",
        help="train a sentencepiece BPE tokenizer of this many tokens on a sample of the inputs",
    )
    _add_record_options(parser)
    _add_example_options(parser.add_argument_group("examples", "answers of which a model learns: see docs/data.md"))
    return parser


def _add_record_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text-field", default="text", metavar="NAME", help="field or column that holds the text (default: text)"
    )
    parser.add_argument(
        "--on-bad-record",
        choices=("fail", "skip"),
        default="fail",
        help="a record without usable text (broken JSON, no such field, not a string, not UTF-8, empty, too long), or "
        "an example without an answer or of which the answer can't be told apart, ends the preparation, or is left out "
        "and counted (default: fail)",
    )
    parser.add_argument(
        "--heldout-fraction",
        type=float,
        default=DEFAULT_HELDOUT,
        metavar="X",
        help="share of the documents kept out of training, chosen by a hash of their text (default: %(default)s)",
    )
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that tokenize (default: one a core)"
    )
    parser.add_argument(
        "--max-bytes", type=int, default=0, metavar="N", help="stop after this much text (default: take everything)"
    )
    parser.add_argument(
        "--eos-token",
        default="",
        metavar="TOKEN",
        help="token that ends a document (default: what the tokenizer's own files say)",
    )
    parser.add_argument("--bos", action="store_true", help="begin each document with the begin-of-text token")
    parser.add_argument(
        "--dtype",
        choices=("auto", "uint16", "uint32"),
        default="auto",
        help="type of a token in the store (default: the smallest that holds the vocabulary)",
    )


def _add_example_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--format",
        choices=("auto", *FORMATS),
        default="auto",
        help="what records hold: a text, {prompt, completion}, {instruction, input, output} or {messages} "
        "(default: auto, by the fields of each file). Any but auto and text that is found so makes a store of examples",
    )
    group.add_argument("--prompt-field", default="", metavar="NAME", help="field with the prompt (default: prompt)")
    group.add_argument(
        "--completion-field", default="", metavar="NAME", help="field with the answer to it (default: completion)"
    )
    group.add_argument(
        "--messages-field",
        default="",
        metavar="NAME",
        help="field with the messages (default: messages, conversations)",
    )
    group.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="jinja template of messages (default: the tokenizer's own)"
    )
    group.add_argument("--chat", action="store_true", help="lay prompts and instructions out by the chat template too")
    group.add_argument(
        "--seq-len", type=int, default=0, metavar="N", help="most tokens of an example (default: any number)"
    )
    group.add_argument(
        "--on-long-example",
        choices=("fail", "skip", "truncate"),
        default="fail",
        help="an example of more tokens ends the preparation, is left out and counted, or is cut (default: fail)",
    )


def _parse(arguments: Sequence[str] | None) -> PrepareOptions:
    given = _parser().parse_args(arguments)
    return PrepareOptions(sources=tuple(given.inputs), **{k: v for k, v in vars(given).items() if k != "inputs"})


@contextmanager
def _progress_bar() -> Iterator[ProgressCallback]:
    """A bar on a terminal; a log gets the summary only."""
    from rich import progress as bars  # here: each worker process imports this file and needs no bar
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TextColumn("{task.fields[documents]:,} documents  {task.fields[tokens]:,} tokens  {task.fields[bad]} bad"),
        bars.TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with bars.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("finding files", total=None, documents=0, tokens=0, bad=0)

        def report(now: Progress) -> None:
            bar.update(
                task,
                description=now.stage,
                completed=now.done_bytes,
                total=now.total_bytes,
                documents=now.documents,
                tokens=now.tokens,
                bad=now.bad_records,
            )

        yield report


def _summary(prepared: Prepared, took_s: float) -> list[str]:
    manifest = prepared.manifest
    train, heldout = manifest.splits["train"], manifest.splits["heldout"]
    tokenizer, made = manifest.tokenizer, manifest.preparation
    num_bytes, tokens = train.bytes + heldout.bytes, train.tokens + heldout.tokens
    lines = [
        f"wrote {prepared.path} in {took_s:.1f} s, from {made['files']:,} files",
        f"  train      {train.documents:>12,} documents  {train.tokens:>15,} tokens  {train.bytes:>17,} bytes",
        f"  held out   {heldout.documents:>12,} documents  {heldout.tokens:>15,} tokens  {heldout.bytes:>17,} bytes",
        f"  tokenizer  {tokenizer.kind}, {tokenizer.vocab_size:,} tokens, {num_bytes / tokens:.2f} bytes a token, "
        f"stored as {manifest.dtype}",
    ]
    if heldout.documents == 0:
        lines.append("  no document is held out: train with --eval.every_steps 0")
    if made["left_out"]:
        lines.append(f"  not text by their suffix, left out: {listed_suffixes(made['left_out'])}")
    if prepared.bad_records:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in prepared.bad_records.items())
        lines.append(f"  bad records left out: {counts}; the first:")
        lines += [f"    {example}" for example in made["bad_records"]["examples"][:5]]
    lines += _about_examples(made.get("examples"), tokens)
    if made["inexact_documents"]:
        lines.append(
            f"  in {made['inexact_documents']:,} documents the tokenizer changes the text, so that bits per byte are "
            "approximate"
        )
    return [*lines, "", *_how_to_go_on(prepared.path, tokenizer.vocab_size, examples="examples" in made)]


def _about_examples(examples: dict[str, Any] | None, tokens: int) -> list[str]:
    if examples is None:
        return []
    answers, cut = examples["answer_tokens"], examples["truncated"]
    formats = ", ".join(f"{count:,} {name}" for name, count in examples["formats"].items())
    lines = [f"  answers    {answers:>12,} tokens, {answers / tokens:.1%} of all; files by format: {formats}"]
    if cut["count"]:
        lines.append(f"  cut to {examples['seq_len']:,} tokens: {cut['count']:,} examples; the first:")
        lines += [f"    {example}" for example in cut["examples"][:5]]
    return lines


def _how_to_go_on(path: Path, vocab_size: int, *, examples: bool = False) -> list[str]:
    quoted = str(path).replace("\\", "\\\\").replace('"', '\\"')
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().name)
    stores = shlex.quote(f'[{{path = "{quoted}"}}]')
    overrides = f"--run.name {name} --model.vocab_size {vocab_size} --data.stores {stores}"
    if examples:
        overrides += " --objective.kind sft --data.packing best_fit --data.document_mask true"
    torchrun = shlex.quote(os.path.relpath(Path(sys.executable).with_name("torchrun")))  # .venv need not be active
    return [
        "In a config:",
        "  [[data.stores]]",
        f'  path = "{quoted}"',
        "Or from here:",
        f"  {NEXT_COMMAND.format(torchrun=torchrun, overrides=overrides)}",
    ]


if __name__ == "__main__":
    sys.exit(main())
