"""One split of a token store, written front to back.

Shards, document bounds and byte counts go to the disk as they come, hashed on the way, so that memory stays flat
however large the corpus is. What the files mean is said in store.py.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.data.store import ANSWERS, DOCUMENT_BYTES, DTYPES, OFFSETS, SplitEntry, shard_name
from engine.files import FileEntry

SHARD_BYTES = 1 << 30


class SplitWriter:
    """Writes the documents of a split into a new folder."""

    def __init__(self, folder: Path, dtype: str, shard_tokens: int, *, with_answers: bool = False) -> None:
        """Begin; the folder must not exist. `with_answers` also writes which tokens are an answer's."""
        folder.mkdir()
        self._folder, self._dtype, self._shard_tokens = folder, DTYPES[dtype], shard_tokens
        self._offsets = _HashedFile(folder / OFFSETS)
        self._bytes = _HashedFile(folder / DOCUMENT_BYTES)
        self._answers = _HashedFile(folder / ANSWERS) if with_answers else None
        self._shard: _HashedFile | None = None
        self._entries: dict[str, FileEntry] = {}
        self.documents = self.tokens = self.num_bytes = 0
        self._offsets.write(np.zeros(1, dtype="<u8"))

    def append(
        self,
        tokens: npt.NDArray[Any],
        lengths: npt.NDArray[np.int64],
        num_bytes: npt.NDArray[np.int64],
        answers: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Add documents: their tokens and marks end to end, and the tokens and bytes of each (documents)."""
        assert len(tokens) == int(lengths.sum()), "every token belongs to a document"
        assert (answers is None) == (self._answers is None), "marks are for all documents or for none"
        if self._answers is not None and answers is not None:
            assert len(answers) == len(tokens), "every token is marked or not"
            self._answers.write(answers.astype("u1"))
        ends = self.tokens + np.cumsum(lengths)
        self._offsets.write(ends.astype("<u8"))
        self._bytes.write(num_bytes.astype("<u4"))
        self._append_tokens(tokens)
        self.documents += len(lengths)
        self.num_bytes += int(num_bytes.sum())

    def finish(self) -> SplitEntry:
        """Force everything to the disk and return what the manifest says of it."""
        self._end_shard()
        self._entries[OFFSETS] = self._offsets.finish()
        self._entries[DOCUMENT_BYTES] = self._bytes.finish()
        if self._answers is not None:
            self._entries[ANSWERS] = self._answers.finish()
        return SplitEntry(self.documents, self.tokens, self.num_bytes, self._entries)

    def close(self) -> None:
        """Let go of the files, finished or not."""
        for file in (self._offsets, self._bytes, self._answers, self._shard):
            if file is not None:
                file.close()

    def _append_tokens(self, tokens: npt.NDArray[Any]) -> None:
        while len(tokens):
            if self._shard is None:
                self._shard = _HashedFile(self._folder / shard_name(self.tokens // self._shard_tokens))
            room = self._shard_tokens - self.tokens % self._shard_tokens
            piece, tokens = tokens[:room], tokens[room:]
            self._shard.write(piece.astype(self._dtype, copy=False))
            self.tokens += len(piece)
            if len(piece) == room:
                self._end_shard()

    def _end_shard(self) -> None:
        if self._shard is not None:
            self._entries[self._shard.path.name] = self._shard.finish()
            self._shard = None


class _HashedFile:
    """A new file that knows its own size and sha256."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "xb")  # noqa: SIM115 - closed by finish or close
        self._hash, self._size = hashlib.sha256(), 0

    def write(self, values: npt.NDArray[Any]) -> None:
        data = np.ascontiguousarray(values).data.cast("B") if values.size else b""
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)

    def finish(self) -> FileEntry:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return FileEntry(self._size, self._hash.hexdigest())

    def close(self) -> None:
        self._file.close()
