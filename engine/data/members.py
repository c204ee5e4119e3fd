"""The batches of several adapters that are trained at once: those of each, one below the other.

Each member reads its own stores by its own seed, as it would alone, so its rows of a step are the batch of its single
run. All members have equal shares of every batch: what one of them lacks of the others' held-out sequences is padding
without a target.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from configs.adapters import MemberConfig
from configs.schema import DataConfig
from engine.data.batches import Batch, Batches, check_same_tokenizer
from engine.data.sequences import IGNORE

TENSORS = ("tokens", "targets", "positions", "documents", "places", "virtual")


class MemberBatches:
    """What a run needs of Batches, for all members at once."""

    def __init__(self, config: DataConfig, members: Sequence[MemberConfig], seed: int, **arguments: Any) -> None:
        """Open the stores of every member; `arguments` are those of Batches, `seed` is of members without their own."""
        self._members = [
            Batches(data_of(config, member), seed if member.seed < 0 else member.seed, **arguments)
            for member in members
        ]
        opened = {os.path.normpath(store.path): store for one in self._members for store in one.stores}
        stores = [opened[os.path.normpath(store.path)] for store in config.stores]
        check_same_tokenizer(stores)
        self.stores = stores
        self.fingerprints = [store.fingerprint for store in stores]
        first = self._members[0]
        self.tokenizer_hash, self.tokenizer_folder = first.tokenizer_hash, first.tokenizer_folder
        self.vocab_size = max(one.vocab_size for one in self._members)
        self._eos_id = first.eos_id

    def microbatches(self, step: int, rank: int, num_ranks: int, micro_batch_size: int = 0) -> list[Batch]:
        """Return a rank's share of the batches of a step (from 0); `micro_batch_size` is of each member."""
        each = [one.microbatches(step, rank, num_ranks, micro_batch_size) for one in self._members]
        return [joined(parts) for parts in zip(*each, strict=True)]

    def heldout_microbatches(
        self, rank: int, num_ranks: int, micro_batch_size: int = 0, max_sequences: int = 0
    ) -> Iterator[Batch]:
        """Yield a rank's held-out batches: as many, and of one shape, on every rank; `max_sequences` of each member."""
        each = [one.heldout_microbatches(rank, num_ranks, micro_batch_size, max_sequences) for one in self._members]
        rows = 0
        for parts in zip_longest(*each):
            given = [part for part in parts if part is not None]
            rows = rows or max(len(part.tokens) for part in given)  # the first ones are the largest
            yield joined([self._filled_up(part, rows, like=given[0]) for part in parts])

    def _filled_up(self, part: Batch | None, rows: int, like: Batch) -> Batch:
        """Add rows of padding to a batch, or make one of them."""
        missing = rows if part is None else rows - len(part.tokens)
        if not missing:
            assert part is not None, "a batch of no rows"
            return part
        shape = (missing, like.tokens.shape[1])
        places = torch.arange(shape[1]).expand(shape)
        padding = Batch(
            tokens=torch.full(shape, self._eos_id),
            targets=torch.full(shape, IGNORE),
            positions=None if like.positions is None else places,
            documents=None if like.documents is None else torch.zeros(shape, dtype=torch.int64),
            num_bytes=0,
        )
        return padding if part is None else _below(part, padding)


def data_of(config: DataConfig, member: MemberConfig) -> DataConfig:
    """Return the data section of a member's single run."""
    wanted = {os.path.normpath(path) for path in member.stores}
    stores = tuple(store for store in config.stores if not wanted or os.path.normpath(store.path) in wanted)
    return replace(config, stores=stores)


def joined(parts: Sequence[Batch]) -> Batch:
    """Put batches of one shape below each other, one of each member."""
    assert len({part.tokens.shape for part in parts}) == 1, "members have equal shares of a batch"
    bytes_of_members = tuple(part.num_bytes for part in parts)
    num_bytes = sum(bytes_of_members)
    return replace(_below(*parts), num_bytes=num_bytes, members=len(parts), bytes_of_members=bytes_of_members)


def _below(first: Batch, *others: Batch) -> Batch:
    """Put the sequences of batches below each other; the numbers are the first one's."""

    def together(name: str) -> Tensor | None:
        above = getattr(first, name)
        return None if above is None else torch.cat([above, *(getattr(other, name) for other in others)])

    return replace(first, **{name: together(name) for name in TENSORS})
