"""Raw records -> token ids, in worker processes, handed back in the order of the corpus.

One process reads, the workers decode, parse, hash and tokenize, and the caller writes. Chunks are given out and taken
back in order with a bounded number under way: the result is the same for any number of workers, and memory stays flat.
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
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.errors import DataError, problem
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
    eos_token: str
    text_field: str
    dtype: str
    bos: bool


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
    bad: tuple[tuple[int, BadRecord], ...]
    """Bad records, each with the number of documents that come before it in this chunk."""
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
    chunks = _chunks(corpus, encoder.text_field)
    if workers == 1:
        for chunk in chunks:
            yield encode_chunk(encoder, chunk)
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker)
    try:
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
    tokenizer, token_bytes, prefix_bytes = _tokenizer(encoder)
    begin = [tokenizer.bos_id] if encoder.bos else []
    documents: list[npt.NDArray[Any]] = []
    sizes: list[int] = []
    hashes: list[int] = []
    bad: list[tuple[int, BadRecord]] = []
    inexact = 0
    for record in chunk:
        text = to_text(record, encoder.text_field)
        if text is None:
            continue
        ids = tokenizer.encode(text) if isinstance(text, str) else []
        if not ids:
            where = f"{record.file.path}:{record.line}"
            bad.append((len(documents), text if isinstance(text, BadRecord) else BadRecord("empty", where, "no token")))
            continue
        assert isinstance(text, str), "a bad record has no ids"
        documents.append(np.array([*begin, *ids, tokenizer.eos_id], dtype=DTYPES[encoder.dtype]))
        sizes.append(len(text.encode()))
        hashes.append(text_hash(text))
        inexact += int(token_bytes[documents[-1]].sum()) - prefix_bytes != sizes[-1]
    return Encoded(
        tokens=np.concatenate(documents) if documents else np.zeros(0, dtype=DTYPES[encoder.dtype]),
        lengths=np.array([len(ids) for ids in documents], dtype=np.int64),
        num_bytes=np.array(sizes, dtype=np.int64),
        hashes=np.array(hashes, dtype=np.uint64),
        bad=tuple(bad),
        inexact=inexact,
        disk_bytes=sum(record.disk_bytes for record in chunk),
    )


def _chunks(corpus: Corpus, text_field: str) -> Iterator[list[RawRecord]]:
    """Group records so that a chunk is worth the way to a worker."""
    chunk: list[RawRecord] = []
    size = 0
    for file in corpus.files:
        for record in read_records(file, text_field):
            chunk.append(record)
            size += len(record.data or b"") + 64
            if size >= CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk


@functools.lru_cache(maxsize=1)
def _tokenizer(encoder: Encoder) -> tuple[Tokenizer, npt.NDArray[np.int64], int]:
    """Load the tokenizer once a process."""
    tokenizer = Tokenizer(encoder.tokenizer, encoder.eos_token)
    return tokenizer, tokenizer.token_bytes().astype(np.int64), tokenizer.prefix_bytes()


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and go when the parent is gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    parent = parent_process()
    assert parent is not None, "a worker has a parent"
    connection.wait([parent.sentinel])
    os._exit(1)
