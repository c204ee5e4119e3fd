"""The split of one store, cut into sequences: sequence j -> tokens, targets, positions, documents.

concat   documents end to end, cut every seq_len tokens; sequence j is tokens j * seq_len .. (j + 1) * seq_len, the last
         of which is a target only. A tail that doesn't fill a sequence is left out of training, and padded when held
         out: every held-out token but the first is measured.
best_fit whole documents side by side (pack.py); what stays free is padded.

The target of a document's last token would be the first token of an unrelated one. Under concat without a document mask
it counts, as the model can see that the text ended; with the mask, and under best_fit, it is ignored.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from configs.schema import DataConfig
from engine.data.pack import Packing, pack
from engine.data.store import SplitName, TokenStore

IGNORE = -100
"""A position without a target."""

Ints = npt.NDArray[np.int64]


@dataclass(slots=True)
class Rows:
    """Sequences while they are laid out; all arrays are (rows, seq_len)."""

    tokens: Ints
    targets: Ints
    positions: Ints
    documents: Ints
    num_bytes: int = 0
    """UTF-8 bytes of the text of all targets."""

    @classmethod
    def padding(cls, rows: int, seq_len: int, eos_id: int) -> "Rows":
        """Make rows without any target."""
        shape = (rows, seq_len)
        positions = np.broadcast_to(np.arange(seq_len, dtype=np.int64), shape).copy()
        zeros = np.zeros(shape, dtype=np.int64)
        return cls(np.full(shape, eos_id, dtype=np.int64), np.full(shape, IGNORE, dtype=np.int64), positions, zeros)


class Sequences:
    """All sequences of one split of one store."""

    def __init__(self, store: TokenStore, split: SplitName, config: DataConfig) -> None:
        """Count the sequences, and pack the documents where the config says so."""
        self.split = store.split(split)
        self._seq_len, self._masked = config.seq_len, config.document_mask
        self._token_bytes = store.token_bytes().astype(np.int64)
        self._prefix_bytes = store.tokenizer.prefix_bytes
        self._bos = int(store.tokenizer.bos_id is not None)
        self._needs_documents = config.document_mask or config.document_positions
        self._packing: Packing | None = None
        pairs = max(0, self.split.num_tokens - 1)
        if config.packing == "best_fit":
            self._packing = pack(self.split.offsets, config.seq_len)
            self.num_sequences = self._packing.num_sequences
        else:
            self.num_sequences = -(-pairs // config.seq_len) if split == "heldout" else pairs // config.seq_len

    def lay(self, sequence: int, rows: Rows, row: int) -> None:
        """Write a sequence into a row of padding."""
        assert 0 <= sequence < self.num_sequences, f"sequence {sequence} of {self.num_sequences}"
        if self._packing is None:
            self._lay_concat(sequence, rows, row)
        else:
            self._lay_packed(self._packing, sequence, rows, row)
        targets = rows.targets[row]
        rows.num_bytes += int(self._token_bytes[targets[targets != IGNORE]].sum())

    def _lay_concat(self, sequence: int, rows: Rows, row: int) -> None:
        start = sequence * self._seq_len
        tokens = self.split.read(start, min(start + self._seq_len + 1, self.split.num_tokens))
        size = len(tokens) - 1
        rows.tokens[row, :size] = tokens[:-1]
        rows.targets[row, :size] = tokens[1:]
        if self._needs_documents:
            starts = self._document_starts(start, start + size) - start
            if self._masked:
                rows.targets[row, starts - 1] = IGNORE
            bounds = [0, *starts[starts < size].tolist(), size, self._seq_len]
            for document, (begin, end) in enumerate(pairwise(bounds)):
                rows.documents[row, begin:end] = document
                rows.positions[row, begin:end] = np.arange(end - begin)
        if self._bos or not self._masked:
            rows.num_bytes -= self._added_bytes(start, size)

    def _lay_packed(self, packing: Packing, sequence: int, rows: Rows, row: int) -> None:
        pieces = slice(int(packing.first[sequence]), int(packing.first[sequence + 1]))
        starts, lengths = packing.start[pieces], packing.length[pieces]
        stops = starts + lengths
        offsets = self.split.offsets
        is_end = offsets[np.searchsorted(offsets, stops.astype(np.uint64))] == stops.astype(np.uint64)
        at = 0
        for piece, (start, stop, whole) in enumerate(
            zip(starts.tolist(), stops.tolist(), is_end.tolist(), strict=True)
        ):
            tokens = self.split.read(start, stop + (not whole))
            size, num_targets = stop - start, len(tokens) - 1
            rows.tokens[row, at : at + size] = tokens[:size]
            rows.targets[row, at : at + num_targets] = tokens[1:]
            rows.documents[row, at : at + size] = piece
            rows.positions[row, at : at + size] = np.arange(size)
            rows.num_bytes -= self._added_bytes(start, num_targets)
            at += size
        rows.documents[row, at:] = len(starts)
        rows.positions[row, at:] = np.arange(self._seq_len - at)

    def _document_starts(self, after: int, until: int) -> Ints:
        """First tokens of the documents that begin within (after, until]."""
        first, last = self._begun(after), self._begun(until)
        return self.split.offsets[first:last].astype(np.int64)

    def _added_bytes(self, start: int, num_targets: int) -> int:
        """Bytes of the space that the tokenizer itself put before a document, where its first token is a target."""
        if self._prefix_bytes == 0:
            return 0
        after, until = start - self._bos, start + num_targets - self._bos
        return self._prefix_bytes * (self._begun(until) - self._begun(after))

    def _begun(self, token: int) -> int:
        """Count the documents that begin at or before a token."""
        if token < 0:
            return 0
        # A key of another type would have the whole map converted and copied.
        return int(np.searchsorted(self.split.offsets, np.uint64(token), side="right"))
