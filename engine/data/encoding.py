"""Raw records -> token ids and marks, in worker processes, handed back in the order of the corpus.

One process reads, the workers decode, parse, hash and tokenize, and the caller writes. Chunks are given out and taken
back in order with a bounded number under way: the result is the same for any number of workers, and memory stays flat.
Records are texts, each a document; or, where the corpus holds any example, examples, whose answers are marked.
"""

import functools
import hashlib
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from configs.errors import DataError, problem
from engine.data.answers import AnswerEncoder, find_template
from engine.data.chat import ChatTemplate
from engine.data.examples import Fields, to_example
from engine.data.records import BadRecord, RawRecord, read_records, to_text
from engine.data.sources import Corpus
from engine.data.store import DTYPES
from engine.data.tokenizer import Tokenizer

CHUNK_BYTES = 1 << 20
_BYTES_PER_WORKER = 4 << 20  # a smaller corpus is done before another process has started
_CHUNKS_PER_WORKER = 3


@dataclass(frozen=True, slots=True)
class Encoder:
    """All that a worker must know."""

    tokenizer: Path
    """Folder of a store: with its settings and chat template."""
    fields: Fields
    dtype: str
    bos: bool = False
    marked: bool = False
    """Records are examples."""
    as_chat: bool = False
    seq_len: int = 0
    """Most tokens of an example; 0 for any number."""
    truncate: bool = False
    """A longer one is cut instead of being a bad record."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """The documents of a chunk of records, in order."""

    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int64]
    """(documents) tokens of each, with the end-of-text token."""
    num_bytes: npt.NDArray[np.int64]
    """(documents) UTF-8 bytes of each."""
    hashes: npt.NDArray[np.uint64]
    """(documents) of the text."""
    answers: npt.NDArray[np.bool_] | None
    """(tokens) those of answers; None where records are texts."""
    bad: tuple[tuple[int, BadRecord], ...]
    """Bad records, each with the number of documents that come before it in this chunk."""
    cut: tuple[tuple[int, BadRecord], ...]
    """Examples that were too long and are shorter now, likewise."""
    inexact: int
    """Documents whose tokens don't stand for exactly their bytes."""
    disk_bytes: int
    """Bytes of the corpus on the disk that this chunk came from."""


def text_hash(text: str) -> int:
    """Hash a document to 64 bits; its side of the held-out split is a function of this number."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=b"ropewalk-heldout").digest(), "little")


def num_workers(asked: int, corpus_bytes: int) -> int:
    """Return how many worker processes to start; 0 asks for one a core, as far as the corpus is worth it."""
    if asked:
        return asked
    # Not every system can tell which cores are ours.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, corpus_bytes // _BYTES_PER_WORKER))


def encode_corpus(corpus: Corpus, encoder: Encoder, workers: int) -> Generator[Encoded, None, None]:
    """Yield the encoded chunks of a corpus in order; with one worker everything happens in this process."""
    chunks = _chunks(corpus, encoder.fields)
    if workers == 1:
        for chunk in chunks:
            yield encode_chunk(encoder, chunk)
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker)
    try:
        _start_workers(pool, workers)
        pending: deque[Future[Encoded]] = deque()
        for chunk in chunks:
            pending.append(pool.submit(encode_chunk, encoder, chunk))
            if len(pending) >= _CHUNKS_PER_WORKER * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        why = "killed, perhaps for want of memory"
        raise DataError(problem("workers", "", "one of them is gone", why, "Use fewer: --workers 1.")) from None
    finally:
        pool.shutdown(cancel_futures=True)


def encode_chunk(encoder: Encoder, chunk: list[RawRecord]) -> Encoded:
    """Encode the records of a chunk."""
    tools = _tools(encoder)
    documents: list[_Document] = []
    bad: list[tuple[int, BadRecord]] = []
    cut: list[tuple[int, BadRecord]] = []
    for record in chunk:
        found = _encode_example(encoder, tools, record) if encoder.marked else _encode_text(encoder, tools, record)
        if isinstance(found, BadRecord):
            bad.append((len(documents), found))
        elif found is not None:
            if found.cut is not None:
                cut.append((len(documents), found.cut))
            documents.append(found)
    marks = chain.from_iterable(document.marks for document in documents)
    return Encoded(
        tokens=np.fromiter(chain.from_iterable(document.ids for document in documents), dtype=DTYPES[encoder.dtype]),
        lengths=np.array([len(document.ids) for document in documents], dtype=np.int64),
        num_bytes=np.array([document.num_bytes for document in documents], dtype=np.int64),
        hashes=np.array([document.hash for document in documents], dtype=np.uint64),
        answers=np.fromiter(marks, dtype=np.bool_) if encoder.marked else None,
        bad=tuple(bad),
        cut=tuple(cut),
        inexact=sum(document.inexact for document in documents),
        disk_bytes=sum(record.disk_bytes for record in chunk),
    )


class _Document(NamedTuple):
    """A record that became tokens."""

    ids: list[int]
    marks: list[bool]
    num_bytes: int
    hash: int
    inexact: bool
    cut: BadRecord | None = None


class _Tools(NamedTuple):
    """What a worker loads once."""

    tokenizer: Tokenizer
    answers: AnswerEncoder
    token_bytes: npt.NDArray[np.int64]
    prefix_bytes: int

    def size(self, ids: list[int]) -> int:
        """Bytes that tokens stand for, without the space that the tokenizer puts before a text."""
        return int(self.token_bytes[ids].sum()) - self.prefix_bytes


def _encode_text(encoder: Encoder, tools: _Tools, record: RawRecord) -> _Document | BadRecord | None:
    text = to_text(record, encoder.fields.text)
    if not isinstance(text, str):
        return text
    ids = tools.tokenizer.encode(text)
    if not ids:
        return BadRecord("empty", f"{record.file.path}:{record.line}", "no token")
    begin = [tools.tokenizer.bos_id] if encoder.bos and tools.tokenizer.bos_id is not None else []
    ids = [*begin, *ids, tools.tokenizer.eos_id]
    size = len(text.encode())
    return _Document(ids, [], size, text_hash(text), tools.size(ids) != size)


def _encode_example(encoder: Encoder, tools: _Tools, record: RawRecord) -> _Document | BadRecord | None:
    example = to_example(record, encoder.fields)
    if example is None or isinstance(example, BadRecord):
        return example
    where = f"{record.file.path}:{record.line}"
    found = tools.answers.encode(example, where)
    if isinstance(found, BadRecord):
        return found
    ids, marks, size = found
    identity = text_hash(example if isinstance(example, str) else example.identity)
    if not encoder.seq_len or len(ids) <= encoder.seq_len:
        return _Document(ids, marks, size, identity, tools.size(ids) != size)
    long = BadRecord("over_seq_len", where, f"an example of {len(ids)} tokens, more than --seq-len {encoder.seq_len}")
    if not encoder.truncate:
        return long
    ids, marks = ids[: encoder.seq_len], marks[: encoder.seq_len]
    if not any(marks[1:]):
        return BadRecord("no_target", where, f"its answer begins behind --seq-len {encoder.seq_len}")
    return _Document(ids, marks, max(0, tools.size(ids)), identity, False, long)


def _chunks(corpus: Corpus, fields: Fields) -> Iterator[list[RawRecord]]:
    """Group records so that a chunk is worth the way to a worker."""
    chunk: list[RawRecord] = []
    size = 0
    for file in corpus.files:
        for record in read_records(file, fields.text, fields.columns_of(file.format)):
            chunk.append(record)
            size += len(record.data or b"") + 64
            if size >= CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk


@functools.lru_cache(maxsize=1)
def _tools(encoder: Encoder) -> _Tools:
    """Load the tokenizer, and a chat template if there is one, once a process."""
    tokenizer = Tokenizer(encoder.tokenizer)
    source = find_template(tokenizer, None) if encoder.marked else ""
    template = ChatTemplate(source, str(encoder.tokenizer), tokenizer.named_tokens()) if source else None
    answers = AnswerEncoder(tokenizer, template, encoder.bos, encoder.as_chat)
    return _Tools(tokenizer, answers, tokenizer.token_bytes().astype(np.int64), tokenizer.prefix_bytes())


def _start_workers(pool: ProcessPoolExecutor, workers: int) -> None:
    """Start all workers deaf to Ctrl-C from birth: one that is still importing would answer it with a traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for _ in range(workers):  # each starts one, while none is idle
            pool.submit(os.getpid)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and go when the parent is gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    parent = parent_process()
    assert parent is not None, "a worker has a parent"
    connection.wait([parent.sentinel])
    os._exit(1)
