"""What to prepare, and how: the options of prepare.py, and which of them contradict each other or the corpus.

A setting that has no effect is an error: it was meant to have one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.errors import ConfigError, problem
from engine.data.examples import Fields
from engine.data.sources import Corpus
from engine.data.tokenizer_training import check_vocab
from engine.data.writer import SHARD_BYTES

DEFAULT_HELDOUT = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareOptions:
    """What to prepare, and how."""

    sources: tuple[str, ...]
    out: Path
    tokenizer: Path | None = None
    train_tokenizer: int = 0
    """Train a tokenizer of this many tokens instead of loading one."""
    text_field: str = "text"
    format: Literal["auto", "text", "completion", "instruction", "messages"] = "auto"
    """What records hold: text, or an example of a format of examples.py; auto looks at each file. Anything but auto
    makes a store of examples, whose answers are marked; auto does so when a file holds examples."""
    prompt_field: str = ""
    completion_field: str = ""
    messages_field: str = ""
    chat_template: Path | None = None
    """Template of conversations, instead of the tokenizer's own."""
    chat: bool = False
    """Lay pairs and instructions out as conversations."""
    on_bad_record: Literal["fail", "skip"] = "fail"
    seq_len: int = 0
    """Most tokens of an example; 0 leaves it to the run to refuse what is too long for it."""
    on_long_example: Literal["fail", "skip", "truncate"] = "fail"
    heldout_fraction: float = DEFAULT_HELDOUT
    """Share of the documents that is kept out of training; 0 keeps none."""
    workers: int = 0
    """Processes that tokenize; 0 takes one a core. The result doesn't depend on it."""
    max_bytes: int = 0
    """Stop before the document that would exceed this many bytes of text; 0 takes everything."""
    eos_token: str = ""
    bos: bool = False
    """Begin each document with the begin-of-text token."""
    dtype: Literal["auto", "uint16", "uint32"] = "auto"
    shard_bytes: int = SHARD_BYTES

    @property
    def fields(self) -> Fields:
        """Which fields of a record hold what."""
        return Fields(self.text_field, self.prompt_field, self.completion_field, self.messages_field, self.format)


def check_options(options: PrepareOptions) -> None:
    """Raise ConfigError with all that is wrong with the options, whatever the corpus is."""
    problems = []
    if (options.tokenizer is None) == (options.train_tokenizer == 0):
        do = "Give either --tokenizer FILE or --train-tokenizer VOCAB."
        problems.append(problem("tokenizer", "", "exactly one way to get one is expected", do=do))
    if options.train_tokenizer and options.eos_token:
        why = "a trained tokenizer's is </s>"
        problems.append(problem("--eos-token", options.eos_token, "goes with --tokenizer only", why))
    if not 0 <= options.heldout_fraction < 1:
        problems.append(problem("--heldout-fraction", options.heldout_fraction, "must be at least 0 and below 1"))
    if options.on_long_example != "fail" and not options.seq_len:
        do = "Give the longest length that may stay: --seq-len N."
        problems.append(problem("--on-long-example", options.on_long_example, "has no effect without --seq-len", do=do))
    problems += _contradictions(options)
    for name in ("workers", "max_bytes", "seq_len"):
        if getattr(options, name) < 0:
            where = f"--{name.replace('_', '-')}"
            problems.append(problem(where, getattr(options, name), "must not be negative"))
    if problems:
        raise ConfigError(problems)
    if options.train_tokenizer:
        check_vocab(options.train_tokenizer)


def check_effects(options: PrepareOptions, corpus: Corpus, marked: bool) -> None:
    """Raise ConfigError for options that have no effect on the files that were found."""
    formats = {file.format for file in corpus.files}
    pairs, chats = bool(formats & {"completion", "instruction"}), "messages" in formats
    problems = []
    if options.seq_len and not marked:
        why = "plain documents are cut to sequences by the run"
        problems.append(problem("--seq-len", options.seq_len, "has no effect without examples", why, "Remove it."))
    if options.chat and not pairs:
        why = "no file holds prompts and completions, or instructions"
        problems.append(problem("--chat", "", "has no effect here", why, "Remove it."))
    if options.chat_template is not None and not chats and not (options.chat and pairs):
        do = "Lay pairs out as conversations with --chat, or remove it."
        problems.append(problem("--chat-template", str(options.chat_template), "has no effect without messages", do=do))
    if problems:
        raise ConfigError(problems)


def _contradictions(options: PrepareOptions) -> Iterator[str]:
    """Fields of one format asked for beside another."""
    takes = {
        "prompt_field": ("auto", "completion"),
        "completion_field": ("auto", "completion"),
        "messages_field": ("auto", "messages"),
    }
    for name, formats in takes.items():
        value = getattr(options, name)
        if value and options.format not in formats:
            where, do = f"--{name.replace('_', '-')}", f"Use --format {formats[1]}, or remove it."
            yield problem(where, value, f"has no effect under --format {options.format}", do=do)
    if options.messages_field and (options.prompt_field or options.completion_field):
        yield problem("--messages-field", options.messages_field, "excludes --prompt-field and --completion-field")
