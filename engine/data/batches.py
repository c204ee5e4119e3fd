"""The batch of a step: a pure function of (config, seed, step), whatever the number of ranks.

The global batch of step k (counted from 0) is samples k * G .. (k + 1) * G - 1 of the run; rank r of n takes the r-th
of n equal slices, cut into microbatches. So there is no loader state: a run that resumes on another layout goes on with
the same tokens. Held-out batches are the same sequences on any number of ranks, and no randomness is in them.

Under objective `sft` the targets are the answers of examples, which are never cut and never see each other; a store
with which that can't be is refused.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from configs.errors import DataError, problem
from configs.schema import DataConfig
from engine.data.mix import Mix, apportion
from engine.data.order import permute
from engine.data.sequences import IGNORE, Rows, Sequences
from engine.data.store import TokenStore

__all__ = ["IGNORE", "Batch", "Batches"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Some sequences; all tensors are (batch, seq) int64."""

    tokens: Tensor
    targets: Tensor
    """The token that follows, or IGNORE."""
    positions: Tensor | None
    """Place within the document; None where it is the place within the sequence."""
    documents: Tensor | None
    """Attention stays within one number, which rises from 0 along a row; None where it doesn't care."""
    num_bytes: int
    """UTF-8 bytes of the text of all targets: exact, for bits per byte. An end-of-text token stands for none."""
    places: Tensor | None = None
    """The position's number in the run: sample * seq_len + place in the sequence; only where it was asked for."""
    virtual: Tensor | None = None
    """Number of the virtual token there, or -1; None where there are none."""
    members: int = 0
    """Adapters whose batches these are, one after the other with as many sequences each; 0: all is of one batch."""
    bytes_of_members: tuple[int, ...] = ()
    """num_bytes of each member."""

    def num_targets(self) -> Tensor:
        """Count the targets, or those of each member (members); int64."""
        counted = self.targets != IGNORE
        return counted.view(self.members, -1).sum(dim=1) if self.members else counted.sum()

    def check(self, vocab_size: int) -> None:
        """Raise DataError for a token that the embedding has no row of; on a device it would be an index error."""
        low, high = int(self.tokens.min()), int(max(self.tokens.max(), self.targets.max()))
        if low < 0 or high >= vocab_size:
            expected, why = f"must be from 0 to {vocab_size - 1}", "it was altered on the way from the store"
            do = "The same command reads it again; look at this host's memory where that happens twice."
            raise DataError(problem("token", low if low < 0 else high, expected, why, do))

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on a device."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            # Pinned: a copy from other memory would wait for all that the device was told before it.
            host = tensor.pin_memory() if torch.device(device).type == "cuda" else tensor
            return host.to(device, non_blocking=True)

        return self._changed(moved, moved(self.documents))

    def part(self, held: Tensor, *, counts_bytes: bool) -> "Batch":
        """Return the positions `held` of every sequence, with their positions said; documents stay whole.

        Of the ranks that share the sequences exactly one counts the bytes, which are known of whole batches only.
        """

        def chosen(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[:, held]

        part = self._changed(chosen, self.documents)
        if not counts_bytes:
            part = replace(part, num_bytes=0, bytes_of_members=(0,) * self.members)
        positions = held.expand(self.tokens.shape[0], -1) if self.positions is None else part.positions
        return replace(part, positions=positions)

    def _changed(self, change: Callable[[Tensor | None], Tensor | None], documents: Tensor | None) -> "Batch":
        """Change every tensor but the documents."""
        tokens, targets = change(self.tokens), change(self.targets)
        assert tokens is not None and targets is not None, "what is there stays there"
        positions, places, virtual = change(self.positions), change(self.places), change(self.virtual)
        return replace(
            self,
            tokens=tokens,
            targets=targets,
            positions=positions,
            documents=documents,
            places=places,
            virtual=virtual,
        )


class Batches:
    """The batches of a run, cut from its token stores."""

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        split: Literal["train", "heldout"],
        *,
        objective: Literal["next_token", "sft"] = "next_token",
        num_virtual_tokens: int = 0,
        with_places: bool = False,
    ) -> None:
        """Open the stores; raises DataError when one is missing, damaged, too small, or of another tokenizer.

        `num_virtual_tokens` are laid before each document or sequence, and `with_places` says of each position of the
        training batches which one of the run it is. Objective sft wants stores of examples that fit into a sequence.
        """
        _check_laying(config, objective, num_virtual_tokens)
        self._config, self._seed, self._split = config, seed, split
        self._objective, self._virtual, self._with_places = objective, num_virtual_tokens, with_places
        self.stores = [TokenStore.open(store.path) for store in config.stores]
        check_same_tokenizer(self.stores)
        first = self.stores[0]
        self.fingerprints = [store.fingerprint for store in self.stores]
        self.tokenizer_hash = first.tokenizer.sha256
        self.tokenizer_folder = first.tokenizer_folder
        self.vocab_size = max(store.tokenizer.vocab_size for store in self.stores)
        self.eos_id = first.tokenizer.eos_id
        self._mix = Mix.from_weights([store.weight for store in config.stores], seed)
        sft = objective == "sft"
        self._sequences = [
            Sequences(store, split, config, answers_only=sft, num_virtual_tokens=num_virtual_tokens)
            for store in self.stores
        ]
        self._check_lengths()
        if sft:
            for store, sequences in zip(self.stores, self._sequences, strict=True):
                _check_examples(store, sequences, config.seq_len, num_virtual_tokens)

    @property
    def num_sequences(self) -> list[int]:
        """Count the sequences of each store's split."""
        return [sequences.num_sequences for sequences in self._sequences]

    @property
    def fingerprint(self) -> str:
        """Hash all that the token stream is a function of, the step aside."""
        config = self._config
        content = {
            "stores": self.fingerprints,
            "mix": self._mix.counts,
            "seq_len": config.seq_len,
            "global_batch_size": config.global_batch_size,
            "packing": config.packing,
            "document_mask": config.document_mask,
            "document_positions": config.document_positions,
            "seed": self._seed,
            "split": self._split,
        }
        if self._objective != "next_token":
            content["objective"] = self._objective
        if self._virtual:
            content["virtual"] = self._virtual
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def microbatches(self, step: int, rank: int, num_ranks: int, micro_batch_size: int = 0) -> list[Batch]:
        """Return a rank's share of the batch of a step (from 0), in microbatches; 0 makes one of the whole share."""
        assert 0 <= rank < num_ranks and step >= 0, f"step {step}, rank {rank} of {num_ranks}"
        share = self._share(num_ranks)
        size = micro_batch_size or share
        if share % size:
            where, what = "data.micro_batch_size", f"must divide a rank's {share} sequences of a step"
            raise DataError(problem(where, size, what))
        start = step * self._config.global_batch_size + rank * share
        chosen = self._locate(np.arange(start, start + share, dtype=np.int64))
        return [
            self._batch(chosen[begin : begin + size], first_sample=start + begin if self._with_places else None)
            for begin in range(0, share, size)
        ]

    def heldout_microbatches(
        self, rank: int, num_ranks: int, micro_batch_size: int = 0, max_sequences: int = 0
    ) -> Iterator[Batch]:
        """Yield a rank's held-out batches: as many, and of one shape, on every rank; 0 max_sequences reads all.

        Stores share `max_sequences` by weight, as far as they have so many; each gives sequences evenly spaced over its
        held-out documents. Sequence i goes to rank i % num_ranks; what is missing at the end is rows without a target.
        """
        assert self._split == "heldout", "training documents are no held-out ones"
        chosen = self._heldout_sequences(max_sequences)
        share = -(-len(chosen) // num_ranks)
        size = min(micro_batch_size or share, share)
        mine = chosen[rank::num_ranks]
        for begin in range(0, share, size):
            yield self._batch(mine[begin : begin + size], rows=size)

    def token_hash(self, step: int) -> str:
        """Hash the tokens and targets of a step's global batch."""
        digest = hashlib.sha256()
        for batch in self.microbatches(step, 0, 1):
            digest.update(batch.tokens.numpy().tobytes())
            digest.update(batch.targets.numpy().tobytes())
        return digest.hexdigest()

    def _share(self, num_ranks: int) -> int:
        size = self._config.global_batch_size
        if size % num_ranks:
            why = "each takes an equal slice of every step"
            do = f"Use {size // num_ranks * num_ranks + num_ranks}."
            raise DataError(problem("data.global_batch_size", size, f"must divide by {num_ranks} ranks", why, do))
        return size // num_ranks

    def _locate(self, samples: np.ndarray) -> list[tuple[int, int]]:
        """(store, sequence of the store) of samples of the run."""
        stores, numbers = self._mix.locate(samples)
        sequence = np.empty_like(numbers)
        for store in np.unique(stores):
            count = self._sequences[store].num_sequences
            of_store = stores == store
            epoch, within = np.divmod(numbers[of_store], count)
            sequence[of_store] = permute(within, count, (self._seed, int(store)), epoch)
        return list(zip(stores.tolist(), sequence.tolist(), strict=True))

    def _heldout_sequences(self, max_sequences: int) -> list[tuple[int, int]]:
        counts = self.num_sequences
        wanted = counts
        if max_sequences and max_sequences < sum(counts):
            wanted = _shares(np.array([store.weight for store in self._config.stores]), counts, max_sequences)
        return [
            (store, index * count // want)
            for store, (count, want) in enumerate(zip(counts, wanted, strict=True))
            for index in range(want)
        ]

    def _batch(self, chosen: list[tuple[int, int]], rows: int = 0, first_sample: int | None = None) -> Batch:
        seq_len = self._config.seq_len
        laid = Rows.padding(rows or len(chosen), seq_len, self.eos_id)
        for row, (store, sequence) in enumerate(chosen):
            self._sequences[store].lay(sequence, laid, row)
        places = None
        if first_sample is not None:
            first = torch.arange(first_sample, first_sample + len(laid.tokens), dtype=torch.int64)[:, None]
            places = first * seq_len + torch.arange(seq_len, dtype=torch.int64)
        return Batch(
            tokens=torch.from_numpy(laid.tokens),
            targets=torch.from_numpy(laid.targets),
            positions=torch.from_numpy(laid.positions) if self._config.document_positions else None,
            documents=torch.from_numpy(laid.documents) if self._config.document_mask else None,
            num_bytes=laid.num_bytes,
            places=places,
            virtual=torch.from_numpy(laid.virtual) if self._virtual else None,
        )

    def _check_lengths(self) -> None:
        seq_len = self._config.seq_len
        if self._split == "heldout":
            if sum(self.num_sequences) == 0:
                do = "Prepare it again with --heldout-fraction above 0, or set --eval.every_steps 0."
                names = ", ".join(str(store.path) for store in self.stores)
                raise DataError(problem(names, "", "has no held-out documents", do=do))
            return
        for store, count in zip(self.stores, self.num_sequences, strict=True):
            if count == 0:
                tokens = store.split("train").num_tokens
                what = f"has {tokens} tokens to train on, too few for one sequence of {seq_len}"
                most = tokens - 1 + self._virtual
                do = f"Add text, or use --data.seq_len {most} or less." if tokens > 1 else "Add text."
                raise DataError(problem(str(store.path), "", what, do=do))


def _check_laying(config: DataConfig, objective: str, num_virtual_tokens: int) -> None:
    """Hold what a config has been refused for, had it said otherwise (configs/check.py)."""
    if not config.stores:
        raise DataError(problem("data.stores", "", "at least one token store is needed"))
    assert num_virtual_tokens < config.seq_len, "virtual tokens stand in the sequence"
    cuts_documents = config.packing == "concat"
    assert not (num_virtual_tokens and config.document_mask and cuts_documents), "the rest of a cut one would have none"
    if objective == "sft":
        assert not cuts_documents, "concat cuts examples wherever a sequence ends"
        assert config.document_mask or config.packing == "none", "packed examples would see each other"


def _check_examples(store: TokenStore, sequences: Sequences, seq_len: int, num_virtual_tokens: int) -> None:
    """Refuse a store without marks, without a target, or with examples that don't fit."""
    where = str(store.path)
    if not store.has_answers:
        why = "objective.kind = 'sft' learns answers only"
        do = "Prepare it from examples, or with --format text to learn all of it, or use --objective.kind next_token."
        raise DataError(problem(where, "", "doesn't say which tokens are answers", why, do))
    if sequences.split.num_documents and not sequences.split.has_targets:
        raise DataError(problem(where, "", "marks no token as an answer", "there is nothing to learn from it"))
    if too_long := sequences.num_too_long:
        room = seq_len - num_virtual_tokens
        taken = f", of which {num_virtual_tokens} are virtual tokens'" if num_virtual_tokens else ""
        what = f"{too_long} of {sequences.split.num_documents} examples are longer than a sequence of {seq_len}{taken}"
        do = (
            f"Use --data.seq_len {sequences.longest + num_virtual_tokens} where model.max_seq_len permits it, or "
            f"prepare the store again with --seq-len {room} --on-long-example skip (or truncate)."
        )
        raise DataError(problem(where, "", what, f"the longest has {sequences.longest} tokens", do))


def _shares(weights: np.ndarray, counts: list[int], total: int) -> list[int]:
    """Split `total` by weight, but give no store more than it has: what it can't take goes to the others."""
    wanted = [0] * len(counts)
    open_stores = [store for store, count in enumerate(counts) if count]
    while (left := total - sum(wanted)) and open_stores:
        extra = apportion(weights[open_stores], left)
        for store, more in zip(open_stores, extra, strict=True):
            wanted[store] = min(counts[store], wanted[store] + more)
        open_stores = [store for store in open_stores if wanted[store] < counts[store]]
    return wanted


def check_same_tokenizer(stores: list[TokenStore]) -> None:
    """Raise DataError where a store was made with another tokenizer than the first."""
    first = stores[0]
    for store in stores[1:]:
        same = store.tokenizer.sha256 == first.tokenizer.sha256 and store.tokenizer.eos_id == first.tokenizer.eos_id
        if not same:
            what = f"was made with another tokenizer than {first.path}"
            why = f"{store.tokenizer.sha256[:12]}.. is not {first.tokenizer.sha256[:12]}.."
            do = f"Prepare it with --tokenizer {first.tokenizer_folder}."
            raise DataError(problem(str(store.path), "", what, why, do))
