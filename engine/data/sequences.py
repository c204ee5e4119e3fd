"""The split of one store, cut into sequences: sequence j -> tokens, targets, positions, documents.

concat   documents end to end, cut every seq_len tokens; sequence j is tokens j * seq_len .. (j + 1) * seq_len, the last
         of which is a target only. A tail that doesn't fill a sequence is left out of training, and padded when held
         out: every held-out token but the first is measured.
best_fit whole documents side by side (pack.py); what stays free is padded.
none     one document a sequence, padded.

The target of a document's last token would be the first token of an unrelated one. Under concat without a document mask
it counts, as the model can see that the text ended; with the mask, and where documents are whole, it is ignored. Of
examples, the tokens that are no answer's are no targets.

Virtual tokens, which adapters fill with what they learned, stand before each document where attention keeps documents
apart, else before each sequence. They take their places from the text: a sequence stays seq_len long.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from configs.errors import DataError
from configs.schema import DataConfig
from engine.data.pack import Packing, one_each, pack
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
    virtual: Ints
    num_bytes: int = 0
    """UTF-8 bytes of the text of all targets."""

    @classmethod
    def padding(cls, rows: int, seq_len: int, eos_id: int) -> "Rows":
        """Make rows without any target."""
        shape = (rows, seq_len)
        positions = np.broadcast_to(np.arange(seq_len, dtype=np.int64), shape).copy()
        tokens, targets, documents, virtual = (np.full(shape, fill, dtype=np.int64) for fill in (eos_id, IGNORE, 0, -1))
        return cls(tokens, targets, positions, documents, virtual)


class Sequences:
    """All sequences of one split of one store."""

    def __init__(
        self, store: TokenStore, split: SplitName, config: DataConfig, *, answers_only: bool, num_virtual_tokens: int
    ) -> None:
        """Count the sequences, and pack the documents where the config says so."""
        self.split = store.split(split)
        self._masked, self._answers_only = config.document_mask, answers_only
        self._token_bytes = store.token_bytes().astype(np.int64)
        self._prefix_bytes = store.tokenizer.prefix_bytes
        self._bos = int(store.tokenizer.bos_id is not None)
        self._needs_documents = config.document_mask or config.document_positions
        self._virtual = num_virtual_tokens
        self._room = config.seq_len - num_virtual_tokens
        self._packing: Packing | None = None
        if config.packing != "concat" or self._needs_documents:
            self.split.check_bounds()
        pairs = max(0, self.split.num_tokens - 1)
        if config.packing == "concat":
            self.num_sequences = -(-pairs // self._room) if split == "heldout" else pairs // self._room
        else:
            each = num_virtual_tokens if config.document_mask else 0
            room = config.seq_len if config.document_mask else self._room
            of = one_each if config.packing == "none" else pack
            self._packing = of(self.split.offsets, room, each)
            self.num_sequences = self._packing.num_sequences

    @property
    def num_too_long(self) -> int:
        """Count the documents that don't fit into a sequence whole."""
        return int((np.diff(self.split.offsets) > np.uint64(self._room)).sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int(np.diff(self.split.offsets).max(initial=np.uint64(0)))

    def lay(self, sequence: int, rows: Rows, row: int) -> None:
        """Write a sequence into a row of padding; raises DataError, naming it, for what its file can't mean."""
        assert 0 <= sequence < self.num_sequences, f"sequence {sequence} of {self.num_sequences}"
        try:
            if self._packing is None:
                self._lay_concat(sequence, rows, row)
            else:
                self._lay_packed(self._packing, sequence, rows, row)
        except DataError as error:
            raise DataError(f"sequence {sequence}: {error}") from None
        targets = rows.targets[row]
        rows.num_bytes += int(self._token_bytes[targets[targets != IGNORE]].sum())

    def _lay_concat(self, sequence: int, rows: Rows, row: int) -> None:
        start, first = sequence * self._room, self._virtual
        tokens = self.split.read(start, min(start + self._room + 1, self.split.num_tokens))
        size = len(tokens) - 1
        rows.virtual[row, :first] = np.arange(first)
        rows.tokens[row, first : first + size] = tokens[:-1]
        rows.targets[row, first : first + size] = tokens[1:]
        if self._needs_documents:
            assert first == 0, "virtual tokens stand before whole documents, which concat cuts"
            starts = self._document_starts(start, start + size) - start
            if self._masked:
                rows.targets[row, starts - 1] = IGNORE
            bounds = [0, *starts[starts < size].tolist(), size, rows.tokens.shape[1]]
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
            before = self._virtual if self._masked or piece == 0 else 0
            size, num_targets = stop - start, stop - start - whole
            rows.virtual[row, at : at + before] = np.arange(before)
            rows.documents[row, at : at + before + size] = piece
            rows.positions[row, at : at + before + size] = np.arange(before + size)
            at += before
            tokens = self.split.read(start, start + num_targets + 1)
            rows.tokens[row, at : at + size] = tokens[:size]
            rows.targets[row, at : at + num_targets] = self._targets(tokens[1:], start + 1)
            rows.num_bytes -= self._added_bytes(start, num_targets)
            at += size
        rows.documents[row, at:] = len(starts)
        rows.positions[row, at:] = np.arange(rows.tokens.shape[1] - at)

    def _targets(self, tokens: npt.NDArray[np.generic], start: int) -> Ints:
        """Targets out of the tokens from `start` on: all of them, or those of answers."""
        targets = tokens.astype(np.int64)
        if self._answers_only:
            targets[~self.split.read_answers(start, start + len(tokens))] = IGNORE
        return targets

    def _document_starts(self, after: int, until: int) -> Ints:
        """First tokens of the documents that begin within (after, until]."""
        first, last = self._begun(after), self._begun(until)
        return self.split.offsets[first:last].astype(np.int64)

    def _added_bytes(self, start: int, num_targets: int) -> int:
        """Bytes of the space that the tokenizer itself put before a document, where its first token is a target."""
        if self._prefix_bytes == 0:
            return 0
        after, until = start - self._bos, start + num_targets - self._bos
        begun = self._begun(until) - self._begun(after)
        if begun and self._answers_only:  # documents are whole: the one that begins here
            begun = int(self.split.read_answers(start + self._bos, start + self._bos + 1)[0])
        return self._prefix_bytes * begun

    def _begun(self, token: int) -> int:
        """Count the documents that begin at or before a token."""
        if token < 0:
            return 0
        # A key of another type would have the whole map converted and copied.
        return int(np.searchsorted(self.split.offsets, np.uint64(token), side="right"))
