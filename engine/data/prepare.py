"""A corpus -> a token store: find files, train or load the tokenizer, encode in parallel, write, publish at once.

The store is a function of the corpus and the options: not of the number of workers, the time or the machine. A document
is held out when the hash of its text says so, thus wherever and however often it occurs, it lies on one side.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from configs.errors import DataError, problem
from configs.schema import StoreConfig
from engine.data.answers import TEMPLATE, find_template
from engine.data.chat import ChatTemplate
from engine.data.encoding import Encoded, Encoder, encode_corpus, num_workers, text_hash
from engine.data.examples import find_formats
from engine.data.options import PrepareOptions, check_effects, check_options
from engine.data.records import BadRecord
from engine.data.sources import Corpus, find_files, listed_suffixes
from engine.data.staging import refuse_existing, staged_folder
from engine.data.store import (
    DTYPES,
    MANIFEST,
    TOKEN_BYTES,
    TOKENIZER,
    Split,
    SplitEntry,
    StoreManifest,
    TokenizerEntry,
    smallest_dtype,
)
from engine.data.tokenizer import Tokenizer
from engine.data.tokenizer_training import SAMPLE_BYTES_PER_TOKEN, sample_texts, train_tokenizer
from engine.data.writer import SplitWriter
from engine.files import FileEntry, write_whole

BAD_EXAMPLES = 20
"""Bad records that are kept by name; all are counted."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a preparation has come."""

    stage: Literal["training the tokenizer", "tokenizing"]
    done_bytes: int
    total_bytes: int
    """Bytes of the corpus on the disk."""
    documents: int
    tokens: int
    bad_records: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """A finished store and what became of the corpus."""

    path: Path
    manifest: StoreManifest

    @property
    def bad_records(self) -> dict[str, int]:
        """Count the bad records by kind."""
        return self.manifest.preparation["bad_records"]["counts"]


ProgressCallback = Callable[[Progress], None]


def prepare_from_config(store: StoreConfig, progress: ProgressCallback | None = None) -> Path:
    """Make the store of a config if its folder doesn't exist yet; return the folder."""
    path = Path(store.path)
    if path.exists():
        return path
    if not store.sources:
        raise DataError(problem(str(path), "", "no such token store", do="Make it with tools/prepare.py."))
    options = PrepareOptions(
        sources=store.sources,
        out=path,
        tokenizer=Path(store.tokenizer) if store.tokenizer else None,
        train_tokenizer=store.train_tokenizer,
        max_bytes=store.max_bytes,
    )
    return prepare(options, progress).path


def prepare(options: PrepareOptions, progress: ProgressCallback | None = None) -> Prepared:
    """Write a token store; raises ConfigError or DataError, and then leaves nothing behind."""
    check_options(options)
    refuse_existing(options.out)
    if options.tokenizer is not None:
        Tokenizer(options.tokenizer, options.eos_token)  # a wrong one is refused before anything is read
    corpus = find_formats(find_files(options.sources), options.fields)
    marked = options.format != "auto" or any(file.format != "text" for file in corpus.files)
    check_effects(options, corpus, marked)
    report = progress or _silent
    with staged_folder(options.out) as folder:
        tokenizer = _copy_tokenizer(options, corpus, folder, report)
        if options.chat or any(file.format == "messages" for file in corpus.files):
            _copy_template(options, tokenizer, folder)
        build = _Build(options, corpus, folder, tokenizer, marked)
        try:
            build.run(report)
        finally:
            build.close()
        manifest = build.manifest()
        write_whole(folder / MANIFEST, manifest.to_text().encode())
    return Prepared(options.out, manifest)


def is_held_out(hashes: npt.NDArray[np.uint64] | int, fraction: float) -> npt.NDArray[np.bool_]:
    """Tell for each text hash whether the document is held out: the lowest `fraction` of all hashes is."""
    return np.asarray(hashes, dtype=np.uint64) < np.uint64(min(int(fraction * 2.0**64), 2**64 - 1))


def _silent(progress: Progress) -> None:
    """Report to nobody."""


def _copy_tokenizer(options: PrepareOptions, corpus: Corpus, folder: Path, report: ProgressCallback) -> Tokenizer:
    """Put the tokenizer into the store and load it from there."""
    if options.tokenizer is not None:
        Tokenizer(options.tokenizer, options.eos_token).copy_to(folder / TOKENIZER)
    else:
        report(Progress("training the tokenizer", 0, corpus.size_bytes, 0, 0, 0))
        budget = options.train_tokenizer * SAMPLE_BYTES_PER_TOKEN

        def is_trained_on(text: str) -> bool:
            return not is_held_out(text_hash(text), options.heldout_fraction)

        sample = sample_texts(corpus, options.fields, budget, options.max_bytes, is_trained_on)
        trained = folder / "trained.model"
        train_tokenizer(sample, options.train_tokenizer, trained)
        Tokenizer(trained).copy_to(folder / TOKENIZER)
        trained.unlink()
    return Tokenizer(folder / TOKENIZER)


def _copy_template(options: PrepareOptions, tokenizer: Tokenizer, folder: Path) -> None:
    """Put the template of conversations beside the tokenizer, for all who will talk with the model."""
    source = find_template(tokenizer, options.chat_template)
    where = str(options.chat_template or options.tokenizer or "the trained tokenizer")
    if not source:
        do = "Give one with --chat-template FILE."
        raise DataError(problem(where, "", "has no chat template", "conversations are laid out by one", do))
    ChatTemplate(source, where, tokenizer.named_tokens())  # a broken one is refused before anything is read
    (folder / TOKENIZER / TEMPLATE).write_text(source, encoding="utf-8")


@dataclass
class _Build:
    """The store while it is being written."""

    options: PrepareOptions
    corpus: Corpus
    folder: Path
    tokenizer: Tokenizer
    marked: bool
    """The records are examples."""
    bad_counts: Counter[str] = field(default_factory=Counter)
    bad_examples: list[str] = field(default_factory=list)
    num_cut: int = 0
    cut_examples: list[str] = field(default_factory=list)
    answer_tokens: int = 0
    inexact: int = 0
    total_bytes: int = 0
    """Bytes of text taken so far."""
    lowest: int = 1 << 64
    """The lowest hash of a document in the train split, and which documents have it."""
    lowest_documents: list[int] = field(default_factory=list)
    entries: dict[str, SplitEntry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dtype = _dtype(self.options, self.tokenizer)
        self.shard_tokens = max(1, self.options.shard_bytes // DTYPES[self.dtype].itemsize)
        if self.options.bos and self.tokenizer.bos_id is None:
            raise DataError(problem(str(self.tokenizer.path), "", "has no begin-of-text token", do="Leave out --bos."))
        self._begin()

    def _begin(self) -> None:
        self.train, self.heldout = (
            SplitWriter(self.folder / name, self.dtype, self.shard_tokens, with_answers=self.marked)
            for name in ("train", "heldout")
        )

    def run(self, report: ProgressCallback) -> None:
        """Encode the corpus and write both splits."""
        encoder = Encoder(
            self.folder / TOKENIZER,
            self.options.fields,
            self.dtype,
            bos=self.options.bos,
            marked=self.marked,
            as_chat=self.options.chat,
            seq_len=self.options.seq_len,
            truncate=self.options.on_long_example == "truncate",
        )
        workers = num_workers(self.options.workers, self.options.max_bytes or self.corpus.size_bytes)
        done = 0
        chunks = encode_corpus(self.corpus, encoder, workers)
        try:
            for chunk in chunks:
                done += chunk.disk_bytes
                more = self._take(chunk)
                documents = self.train.documents + self.heldout.documents
                tokens = self.train.tokens + self.heldout.tokens
                bad = sum(self.bad_counts.values())
                report(Progress("tokenizing", done, self.corpus.size_bytes, documents, tokens, bad))
                if not more:
                    break
        finally:
            chunks.close()  # stops the workers, now and not when the generator is collected
        self._finish()

    def close(self) -> None:
        """Let go of the files."""
        self.train.close()
        self.heldout.close()

    def manifest(self) -> StoreManifest:
        """Describe the finished store."""
        tokenizer, options = self.tokenizer, self.options
        files = {f"{TOKENIZER}/{file.name}": _sync(file) for file in sorted((self.folder / TOKENIZER).iterdir())}
        files[TOKEN_BYTES] = write_whole(self.folder / TOKEN_BYTES, tokenizer.token_bytes().astype("<u2").tobytes())
        bos = tokenizer.bos_id if options.bos else None
        entry = TokenizerEntry(
            kind=tokenizer.kind,
            sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            bos_id=bos,
            prefix_bytes=tokenizer.prefix_bytes(),
            files=files,
        )
        preparation: dict[str, Any] = {
            "sources": list(options.sources),
            "files": len(self.corpus.files),
            "left_out": self.corpus.left_out,
            "text_field": options.text_field,
            "heldout_fraction": options.heldout_fraction,
            "max_bytes": options.max_bytes,
            "bad_records": {"counts": dict(sorted(self.bad_counts.items())), "examples": self.bad_examples},
            "inexact_documents": self.inexact,
        }
        if self.marked:
            preparation["examples"] = {
                "formats": dict(sorted(Counter(file.format for file in self.corpus.files).items())),
                "answer_tokens": self.answer_tokens,
                "seq_len": options.seq_len,
                "truncated": {"count": self.num_cut, "examples": self.cut_examples},
            }
        return StoreManifest(self.dtype, self.shard_tokens, entry, self.entries, preparation)

    def _take(self, chunk: Encoded) -> bool:
        """Write the documents of a chunk; False when max_bytes is reached."""
        limit = self.options.max_bytes
        ends = self.total_bytes + np.cumsum(chunk.num_bytes)
        count = int(np.searchsorted(ends, limit, side="right")) if limit else len(ends)
        more = count == len(ends)
        for before, record in chunk.bad:
            if more or before < count:
                self._note(record)
        if not more and self.total_bytes == 0 and count == 0:
            what = f"is less than the first document, of {int(chunk.num_bytes[0])} bytes"
            raise DataError(problem("max_bytes", limit, what, do="Allow more."))
        for before, record in chunk.cut:
            if before < count:
                self.num_cut += 1
                self.cut_examples += [str(record)] if len(self.cut_examples) < BAD_EXAMPLES else []
        tokens = chunk.tokens[: int(chunk.lengths[:count].sum())]
        answers = None if chunk.answers is None else chunk.answers[: len(tokens)]
        self.answer_tokens += 0 if answers is None else int(answers.sum())
        lengths, num_bytes, hashes = chunk.lengths[:count], chunk.num_bytes[:count], chunk.hashes[:count]
        self.total_bytes += int(num_bytes.sum())
        self.inexact += chunk.inexact
        held = is_held_out(hashes, self.options.heldout_fraction)
        self._watch_lowest(hashes[~held])
        for writer, side in ((self.train, ~held), (self.heldout, held)):
            taken = np.repeat(side, lengths)
            writer.append(tokens[taken], lengths[side], num_bytes[side], None if answers is None else answers[taken])
        return more

    def _note(self, record: BadRecord) -> None:
        too_long = record.kind == "over_seq_len"
        handling = self.options.on_long_example if too_long else self.options.on_bad_record
        if handling == "fail":
            option = "--on-long-example skip (or truncate)" if too_long else "--on-bad-record skip"
            do = f"{self._repair(record)}, or leave such records out: tools/prepare.py {option}."
            raise DataError(f"{record}. {do}")
        self.bad_counts[record.kind] += 1
        if len(self.bad_examples) < BAD_EXAMPLES:
            self.bad_examples.append(f"{record.kind}: {record}")

    def _repair(self, record: BadRecord) -> str:
        fields = "Name the fields (--prompt-field, --completion-field, --messages-field) or the --format"
        return {
            "missing_field": fields if self.marked else "Name the field by --text-field",
            "unmarked": "Give a template with {% generation %} blocks by --chat-template",
            "no_end": "Name the token that ends an answer by --eos-token, or give another --chat-template",
            "over_seq_len": "Raise --seq-len",
        }.get(record.kind, "Repair it")

    def _watch_lowest(self, hashes: npt.NDArray[np.uint64]) -> None:
        """Remember which train documents would be held out first, if no other is."""
        if self.heldout.documents or not len(hashes):
            return
        lowest = int(hashes.min())
        if lowest < self.lowest:
            self.lowest, self.lowest_documents = lowest, []
        if lowest == self.lowest:
            first = self.train.documents
            self.lowest_documents += [first + int(index) for index in np.flatnonzero(hashes == np.uint64(lowest))]

    def _finish(self) -> None:
        if self.train.documents + self.heldout.documents == 0:
            raise DataError(self._nothing_found())
        if self.train.documents == 0:
            do = "Lower --heldout-fraction."
            raise DataError(problem(str(self.options.out), "", "every document would be held out", do=do))
        self.entries = {"train": self.train.finish(), "heldout": self.heldout.finish()}
        others = self.train.documents - len(self.lowest_documents)
        if self.heldout.documents == 0 and self.options.heldout_fraction > 0 and others > 0:
            self._hold_out_lowest()

    def _hold_out_lowest(self) -> None:
        """Write the splits again with the document of the lowest hash held out: a small corpus needs one too."""
        (self.folder / "train").rename(self.folder / "undivided")
        entry, vocab_size = self.entries["train"], self.tokenizer.vocab_size
        whole = Split(self.folder / "undivided", entry, self.dtype, self.shard_tokens, vocab_size)
        for name in ("train", "heldout"):
            _remove_files(self.folder / name)
        self._begin()
        chosen = set(self.lowest_documents)
        for document in range(whole.num_documents):
            bounds = int(whole.offsets[document]), int(whole.offsets[document + 1])
            tokens = whole.read(*bounds)
            num_bytes = whole.document_bytes[document : document + 1].astype(np.int64)
            writer = self.heldout if document in chosen else self.train
            answers = whole.read_answers(*bounds) if self.marked else None
            writer.append(tokens, np.array([len(tokens)], dtype=np.int64), num_bytes, answers)
        self.entries = {"train": self.train.finish(), "heldout": self.heldout.finish()}
        _remove_files(self.folder / "undivided")

    def _nothing_found(self) -> str:
        """Say why a corpus of files has no document."""
        reasons = [f"{count} {kind}" for kind, count in sorted(self.bad_counts.items())]
        reasons += [f"left out: {listed_suffixes(self.corpus.left_out)}"] if self.corpus.left_out else []
        where = ", ".join(map(repr, self.options.sources))
        first = f"The first: {self.bad_examples[0]}" if self.bad_examples else "Give files with text in them."
        return problem(where, "", f"no document in {len(self.corpus.files)} files", "; ".join(reasons), first)


def _dtype(options: PrepareOptions, tokenizer: Tokenizer) -> str:
    smallest = smallest_dtype(tokenizer.vocab_size)
    if options.dtype == "auto":
        return smallest
    most = 1 << 8 * DTYPES[options.dtype].itemsize
    if tokenizer.vocab_size > most:
        what = f"must hold the {tokenizer.vocab_size} tokens of {tokenizer.path.name}"
        raise DataError(problem("dtype", options.dtype, what, f"it holds {most}", f"Use {smallest}."))
    return options.dtype


def _sync(path: Path) -> FileEntry:
    """Write a copied file again, through to the disk, and return its entry."""
    data = path.read_bytes()
    path.unlink()
    return write_whole(path, data)


def _remove_files(folder: Path) -> None:
    if folder.is_dir():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
