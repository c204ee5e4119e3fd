"""Batches of examples, virtual tokens and places, against the store read by hand."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import DataError
from configs.schema import DataConfig, StoreConfig
from engine.data.batches import IGNORE, Batch, Batches
from engine.data.options import PrepareOptions
from engine.data.prepare import prepare
from engine.data.store import TokenStore
from tests.unit.data.conftest import make_texts

SEQ_LEN, VIRTUAL = 260, 3
WHOLE = {"packing": "best_fit", "document_mask": True, "document_positions": True}
ALONE = {"packing": "none"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    records = [{"prompt": text[: 9 + n % 9], "completion": text[9 + n % 9 :]} for n, text in enumerate(make_texts(90))]
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    options = PrepareOptions(
        sources=(str(folder / "a.jsonl"),),
        out=folder / "store",
        tokenizer=tokenizer_file,
        workers=1,
        heldout_fraction=0.2,
    )
    return prepare(options).path


def config_of(path: Path, **changes: Any) -> DataConfig:
    stores = (StoreConfig(path=str(path)),)
    return DataConfig(**({"stores": stores, "seq_len": SEQ_LEN, "global_batch_size": 12} | changes))


def examples_of(path: Path, split: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(tokens, targets) of each example, cut from the store by hand."""
    opened = TokenStore.open(path).split(split)
    found = []
    for begin, end in itertools.pairwise(opened.offsets.tolist()):
        tokens, marks = opened.read(begin, end).tolist(), opened.read_answers(begin, end).tolist()
        targets = [token if mark else IGNORE for token, mark in zip(tokens[1:], marks[1:], strict=True)]
        found.append((tuple(tokens), (*targets, IGNORE)))
    return found


def examples_in(batch: Batch, virtual: int = 0) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(tokens, targets) of each document of a batch with any target, virtual tokens left out."""
    found = []
    for row in range(len(batch.tokens)):
        owners = torch.zeros(SEQ_LEN) if batch.documents is None else batch.documents[row]
        for owner in owners.unique():
            at = torch.nonzero(owners == owner).flatten()[virtual:]
            tokens, targets = batch.tokens[row, at], batch.targets[row, at]
            if (targets != IGNORE).any():
                if batch.documents is None:  # padding belongs to nobody
                    last = int(torch.nonzero(targets != IGNORE).max()) + 2
                    tokens, targets = tokens[:last], targets[:last]
                found.append((tuple(tokens.tolist()), tuple(targets.tolist())))
    return found


@pytest.mark.parametrize("virtual", [0, VIRTUAL])
@pytest.mark.parametrize("laying", [WHOLE, ALONE], ids=["best_fit", "none"])
def test_an_epoch_holds_every_example_whole_with_its_answers(store: Path, laying: dict[str, Any], virtual: int) -> None:
    config = config_of(store, **laying, global_batch_size=1)
    batches = Batches(config, 0, "train", objective="sft", num_virtual_tokens=virtual)
    count = batches.num_sequences[0]
    found = [one for step in range(count) for one in examples_in(batches.microbatches(step, 0, 1)[0], virtual)]
    expected = examples_of(store, "train")
    assert sorted(found) == sorted(expected)
    assert (count == len(expected)) == (laying is ALONE)
    eos = batches.eos_id
    assert all(targets[-2] == eos for _, targets in found), "an answer without its end"


@pytest.mark.parametrize("laying", [WHOLE, ALONE], ids=["best_fit", "none"])
def test_held_out_examples_too(store: Path, laying: dict[str, Any]) -> None:
    config = config_of(store, **laying)
    batches = Batches(config, 0, "heldout", objective="sft", num_virtual_tokens=VIRTUAL)
    found = [one for batch in batches.heldout_microbatches(0, 1, 3) for one in examples_in(batch, VIRTUAL)]
    assert sorted(found) == sorted(examples_of(store, "heldout"))
    per_rank = [list(batches.heldout_microbatches(rank, 4, 2)) for rank in range(4)]
    assert len({len(parts) for parts in per_rank}) == 1
    again = [one for parts in per_rank for batch in parts for one in examples_in(batch, VIRTUAL)]
    assert sorted(again) == sorted(found)


def test_bytes_are_those_of_the_answers(store: Path) -> None:
    sizes = TokenStore.open(store).token_bytes().astype(int)
    for laying in (WHOLE, ALONE):
        batches = Batches(config_of(store, **laying), 0, "heldout", objective="sft")
        counted = sum(int(np.sum(batch.num_bytes)) for batch in batches.heldout_microbatches(0, 1, 4))
        targets = [token for _, targets in examples_of(store, "heldout") for token in targets if token != IGNORE]
        assert counted == sizes[targets].sum() > 0


def test_next_token_over_examples_learns_all_of_them(store: Path) -> None:
    (batch,) = Batches(config_of(store), 0, "train").microbatches(0, 0, 1)
    assert (batch.targets != IGNORE).all()
    batches = Batches(config_of(store, **WHOLE, global_batch_size=1), 0, "train")
    counts = [int((batches.microbatches(step, 0, 1)[0].targets != IGNORE).sum()) for step in range(batches.num_sequences[0])]  # fmt: skip  # noqa: E501
    assert sum(counts) == sum(len(tokens) - 1 for tokens, _ in examples_of(store, "train"))


@pytest.mark.parametrize("laying", [WHOLE, ALONE], ids=["best_fit", "none"])
def test_the_batch_is_the_same_on_any_number_of_ranks(store: Path, laying: dict[str, Any]) -> None:
    def batches() -> Batches:
        return Batches(
            config_of(store, **laying), 5, "train", objective="sft", num_virtual_tokens=VIRTUAL, with_places=True
        )

    names = ("tokens", "targets", "positions", "documents", "places", "virtual")
    for step in (0, 1, 77):
        (whole,) = batches().microbatches(step, 0, 1)
        for num_ranks, micro in ((2, 3), (3, 2), (12, 1)):
            parts = [part for rank in range(num_ranks) for part in batches().microbatches(step, rank, num_ranks, micro)]
            for name in names:
                joined = [getattr(part, name) for part in parts]
                if getattr(whole, name) is None:
                    assert set(joined) == {None}
                else:
                    assert torch.equal(torch.cat(joined), getattr(whole, name)), name


# ------------------------------------------------------------------------------------------- virtual tokens and places


def runs_of(virtual: torch.Tensor) -> list[int]:
    """Where a run of virtual tokens begins; every run must count from 0."""
    starts = torch.nonzero(virtual == 0).flatten().tolist()
    for start in starts:
        assert virtual[start : start + VIRTUAL].tolist() == list(range(VIRTUAL))
    assert int((virtual >= 0).sum()) == VIRTUAL * len(starts)
    return starts


def test_virtual_tokens_stand_before_each_document(store: Path) -> None:
    for objective in ("sft", "next_token"):
        config = config_of(store, **WHOLE)
        batches = Batches(config, 0, "train", objective=objective, num_virtual_tokens=VIRTUAL)
        (batch,) = batches.microbatches(0, 0, 1)
        assert batch.virtual is not None and batch.documents is not None and batch.positions is not None
        assert (batch.tokens[batch.virtual >= 0] == batches.eos_id).all()
        assert (batch.targets[batch.virtual >= 0] == IGNORE).all()
        assert torch.equal(batch.positions[batch.virtual >= 0], batch.virtual[batch.virtual >= 0])
        for row in range(len(batch.tokens)):
            documents = batch.documents[row]
            first = [int(torch.nonzero(documents == owner).min()) for owner in documents.unique()]
            is_padding = (batch.targets[row, first[-1] :] == IGNORE).all()
            assert runs_of(batch.virtual[row]) == (first[:-1] if is_padding else first)
            inside = documents[1:] == documents[:-1]
            grown = torch.where(inside, batch.positions[row, :-1] + 1, 0)
            assert torch.equal(batch.positions[row, 1:], grown)


@pytest.mark.parametrize("packing", ["concat", "best_fit", "none"])
def test_or_before_each_sequence_without_a_mask(store: Path, packing: str) -> None:
    batches = Batches(config_of(store, packing=packing), 0, "train", num_virtual_tokens=VIRTUAL)
    (batch,) = batches.microbatches(0, 0, 1)
    assert batch.virtual is not None and batch.tokens.shape == (12, SEQ_LEN)
    assert torch.equal(batch.virtual[:, :VIRTUAL], torch.arange(VIRTUAL).expand(12, -1))
    assert (batch.virtual[:, VIRTUAL:] == -1).all()
    assert (batch.targets[:, :VIRTUAL] == IGNORE).all()
    plain = Batches(config_of(store, packing=packing, seq_len=SEQ_LEN - VIRTUAL), 0, "train")
    (rest,) = plain.microbatches(0, 0, 1)
    assert torch.equal(batch.tokens[:, VIRTUAL:], rest.tokens)
    assert torch.equal(batch.targets[:, VIRTUAL:], rest.targets)
    assert batch.num_bytes == rest.num_bytes


def test_places_number_every_position_of_the_run(store: Path) -> None:
    batches = Batches(config_of(store, **WHOLE), 0, "train", with_places=True)
    parts = [part for step in (0, 1) for part in batches.microbatches(step, 0, 1, 4)]
    places = torch.cat([part.places for part in parts if part.places is not None])
    assert torch.equal(places.flatten(), torch.arange(2 * 12 * SEQ_LEN))
    (whole,) = batches.microbatches(3, 1, 2)
    assert whole.places is not None and int(whole.places[0, 0]) == (3 * 12 + 6) * SEQ_LEN


def test_nothing_is_added_where_it_was_not_asked_for(store: Path) -> None:
    batches = Batches(config_of(store), 0, "train")
    (batch,) = batches.microbatches(0, 0, 1)
    assert batch.places is None and batch.virtual is None
    asked = Batches(config_of(store), 0, "heldout", with_places=True)
    assert next(asked.heldout_microbatches(0, 1)).places is None
    same = Batches(config_of(store), 0, "train", with_places=True)
    other = Batches(config_of(store), 0, "train", num_virtual_tokens=VIRTUAL)
    assert batches.fingerprint == same.fingerprint != other.fingerprint


def test_a_part_of_the_positions_and_another_device_keep_both(store: Path) -> None:
    batches = Batches(config_of(store, **WHOLE), 0, "train", num_virtual_tokens=VIRTUAL, with_places=True)
    (batch,) = batches.microbatches(0, 0, 1)
    held = torch.tensor([0, 1, 2, 200, 201])
    part = batch.part(held, counts_bytes=False).to("cpu")
    assert batch.places is not None and part.places is not None
    assert batch.virtual is not None and part.virtual is not None
    assert torch.equal(part.places, batch.places[:, held])
    assert torch.equal(part.virtual, batch.virtual[:, held])
    assert part.documents is batch.documents or torch.equal(part.documents, batch.documents)  # pyright: ignore[reportArgumentType]


# ------------------------------------------------------------------------------------------------------------ refusals


def refusal(config: DataConfig, **given: Any) -> str:
    with pytest.raises(DataError) as caught:
        Batches(config, 0, "train", **given)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "given", "what"),
    [
        ({}, {"objective": "sft"}, "concat cuts examples wherever a sequence ends"),
        ({"packing": "best_fit"}, {"objective": "sft"}, "packed examples would see each other"),
        ({"document_mask": True}, {"num_virtual_tokens": 2}, "the rest of a cut one would have none"),
        ({"seq_len": 5}, {"num_virtual_tokens": 5}, "virtual tokens stand in the sequence"),
    ],
)
def test_layings_that_cut_or_mix_examples_never_come_this_far(
    store: Path, changes: dict[str, Any], given: dict[str, Any], what: str
) -> None:
    with pytest.raises(AssertionError, match=what):
        Batches(config_of(store, **changes), 0, "train", **given)


def test_examples_that_do_not_fit_are_counted_and_refused(store: Path) -> None:
    sizes = [len(tokens) for tokens, _ in examples_of(store, "train")]
    expected = (
        f"{store}: {sum(size > 57 for size in sizes)} of {len(sizes)} examples are longer than a sequence of 60, of "
        f"which 3 are virtual tokens' (the longest has {max(sizes)} tokens). Use --data.seq_len {max(sizes) + 3} where "
        "model.max_seq_len permits it, or prepare the store again with --seq-len 57 --on-long-example skip (or "
        "truncate)."
    )
    config = config_of(store, **WHOLE, seq_len=60)
    assert refusal(config, objective="sft", num_virtual_tokens=3) == expected
    fitting = replace(config, seq_len=max(sizes) + 3)
    Batches(fitting, 0, "train", objective="sft", num_virtual_tokens=3)
    Batches(config, 0, "train", num_virtual_tokens=3)  # all of an example may be cut where all of it is learned


def test_a_store_without_marks_is_refused(make_store: Any, texts: list[str]) -> None:
    path = make_store(texts).path
    assert refusal(config_of(path, **WHOLE), objective="sft") == (
        f"{path}: doesn't say which tokens are answers (objective.kind = 'sft' learns answers only). Prepare it from "
        "examples, or with --format text to learn all of it, or use --objective.kind next_token."
    )


def test_a_store_without_any_target_is_refused(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "copy")
    marks = tmp_path / "copy" / "train" / "answers.bin"
    marks.write_bytes(bytes(marks.stat().st_size))
    assert refusal(config_of(tmp_path / "copy", **WHOLE), objective="sft") == (
        f"{tmp_path}/copy: marks no token as an answer (there is nothing to learn from it)."
    )
