"""The batches of several adapters: each member's rows are the batches of its single run, and padding counts nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.adapters import MemberConfig
from configs.errors import DataError
from configs.schema import DataConfig, StoreConfig
from engine.data.batches import IGNORE, Batch, Batches
from engine.data.members import MemberBatches
from engine.data.prepare import Prepared
from engine.data.store import TokenStore

Make = Callable[..., Prepared]
Stores = tuple[Path, Path]
SEQ_LEN = 24


@pytest.fixture
def stores(make_store: Make, texts: list[str]) -> Stores:
    one = make_store(texts[:80], name="one", heldout_fraction=0.1).path
    two = make_store([text.upper() for text in texts[80:]], name="two", heldout_fraction=0.4).path
    return one, two


def config_of(stores: Stores, **changes: Any) -> DataConfig:
    given = tuple(StoreConfig(path=str(path), weight=weight) for path, weight in zip(stores, (1.0, 2.0), strict=True))
    return DataConfig(**({"stores": given, "seq_len": SEQ_LEN, "global_batch_size": 4} | changes))


def members_of(stores: Stores) -> tuple[MemberConfig, ...]:
    one, two = (str(path) for path in stores)
    return (
        MemberConfig(name="a", stores=(f"{one}/",)),
        MemberConfig(name="b", seed=5),
        MemberConfig(name="c", stores=(two,), seed=6),
    )


def single_runs(config: DataConfig, seed: int, split: Any, **arguments: Any) -> list[Batches]:
    first, second = ((store,) for store in config.stores)
    each = ((first, seed), (config.stores, 5), (second, 6))
    return [Batches(replace(config, stores=chosen), own, split, **arguments) for chosen, own in each]


def tensors_of(batch: Batch) -> list[torch.Tensor | None]:
    return [batch.tokens, batch.targets, batch.positions, batch.documents, batch.places]


@pytest.mark.parametrize("documents", [False, True])
def test_each_member_reads_what_its_single_run_reads(stores: Stores, documents: bool) -> None:
    config = config_of(stores, document_mask=documents, document_positions=documents)
    together = MemberBatches(config, members_of(stores), 3, split="train", with_places=True)
    alone = single_runs(config, 3, "train", with_places=True)
    for step, rank in ((0, 0), (7, 1)):
        mine = together.microbatches(step, rank, 2, 1)
        theirs = [one.microbatches(step, rank, 2, 1) for one in alone]
        assert len(mine) == 2
        for batch, singles in zip(mine, zip(*theirs, strict=True), strict=True):
            assert batch.members == 3 and batch.bytes_of_members == tuple(single.num_bytes for single in singles)
            for at, tensor in enumerate(tensors_of(batch)):
                parts = [tensors_of(single)[at] for single in singles]
                assert tensor is None if parts[0] is None else torch.equal(tensor, torch.cat(parts)), at  # pyright: ignore


@pytest.mark.parametrize(("ranks", "micro", "most"), [(1, 0, 0), (2, 3, 0), (2, 2, 5)])
def test_held_out_sequences_are_each_members_own_and_batches_of_one_shape(
    stores: Stores, ranks: int, micro: int, most: int
) -> None:
    config = config_of(stores, document_mask=True, document_positions=True)
    together = MemberBatches(config, members_of(stores), 3, split="heldout")
    mine = [list(together.heldout_microbatches(rank, ranks, micro, most)) for rank in range(ranks)]
    assert len({len(batches) for batches in mine}) == 1
    assert len({batch.tokens.shape for batches in mine for batch in batches}) == 1
    for index, single in enumerate(single_runs(config, 3, "heldout")):
        theirs = [list(single.heldout_microbatches(rank, ranks, micro, most)) for rank in range(ranks)]
        assert rows_of(mine, index) == rows_of(theirs, None)
        counted = sum(batch.bytes_of_members[index] for batches in mine for batch in batches)
        assert counted == sum(batch.num_bytes for batches in theirs for batch in batches)


def rows_of(ranks: list[list[Batch]], member: int | None) -> list[Any]:
    """The rows that have a target, of one member."""
    rows = []
    for batch in (batch for batches in ranks for batch in batches):
        share = slice(None)
        if member is not None:
            size = len(batch.tokens) // batch.members
            share = slice(member * size, (member + 1) * size)
        of_row = zip(*(tensor[share].tolist() for tensor in tensors_of(batch) if tensor is not None), strict=True)
        rows += [row for row in of_row if set(row[1]) != {IGNORE}]
    return rows


def test_targets_are_counted_for_each_member_and_bytes_go_to_one_rank_of_cp(stores: Stores) -> None:
    together = MemberBatches(config_of(stores), members_of(stores), 3, split="train")
    (batch,) = together.microbatches(0, 0, 1)
    batch.targets[4:8, 3:] = IGNORE
    assert batch.num_targets().tolist() == [4 * SEQ_LEN, 12, 4 * SEQ_LEN]
    parts = [batch.part(torch.arange(first, SEQ_LEN, 2), counts_bytes=first == 0) for first in (0, 1)]
    assert parts[0].bytes_of_members == batch.bytes_of_members and parts[1].bytes_of_members == (0, 0, 0)
    assert batch.num_bytes == sum(batch.bytes_of_members) == parts[0].num_bytes and parts[1].num_bytes == 0
    assert [part.members for part in parts] == [3, 3] and parts[0].to("cpu").members == 3
    (single,) = Batches(config_of(stores), 3, "train").microbatches(0, 0, 1)
    assert single.members == 0 and single.num_targets().shape == ()


def test_identity_is_that_of_all_stores_in_the_configs_order(stores: Stores) -> None:
    members = members_of(stores)[::-1]
    together = MemberBatches(config_of(stores), members, 3, split="train")
    assert together.fingerprints == [TokenStore.open(path).fingerprint for path in stores]
    plain = Batches(config_of(stores), 3, "train")
    assert (together.tokenizer_hash, together.vocab_size) == (plain.tokenizer_hash, plain.vocab_size)


def test_members_with_stores_of_different_tokenizers_are_refused(
    stores: Stores, make_store: Make, texts: list[str]
) -> None:
    other = make_store(texts, name="other", train_tokenizer=300).path
    members = (MemberConfig(name="a", stores=(str(stores[0]),)), MemberConfig(name="b", stores=(str(other),)))
    with pytest.raises(DataError, match=f"{other}: was made with another tokenizer than {stores[0]}"):
        MemberBatches(config_of((stores[0], other)), members, 0, split="train")
