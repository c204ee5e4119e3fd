"""The loader against the plain thing: documents encoded, joined and cut by hand."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import DataError
from configs.schema import DataConfig, StoreConfig
from engine.data.batches import IGNORE, Batch, Batches
from engine.data.prepare import Prepared
from engine.data.store import TokenStore
from engine.data.tokenizer import Tokenizer

Make = Callable[..., Prepared]
SEQ_LEN = 48


def config_of(*stores: tuple[Path, float], **changes: Any) -> DataConfig:
    given_stores = tuple(StoreConfig(path=str(path), weight=weight) for path, weight in stores)
    return DataConfig(**({"stores": given_stores, "seq_len": SEQ_LEN, "global_batch_size": 12} | changes))


@pytest.fixture
def store(make_store: Make, texts: list[str]) -> Path:
    return make_store(texts, heldout_fraction=0.2).path


def stream_of(path: Path, split: Any) -> list[list[int]]:
    """The documents of a split as lists of tokens."""
    opened = TokenStore.open(path).split(split)
    bounds = opened.offsets.tolist()
    return [opened.read(begin, end).tolist() for begin, end in itertools.pairwise(bounds)]


def rows_of(batches: list[Batch]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [
        (tuple(tokens), tuple(targets))
        for batch in batches
        for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True)
    ]


def steps_of(batches: Batches, steps: int) -> list[Batch]:
    return [batch for step in range(steps) for batch in batches.microbatches(step, 0, 1)]


def test_an_epoch_holds_every_sequence_of_the_joined_documents_once(store: Path) -> None:
    batches = Batches(config_of((store, 1.0), global_batch_size=1), 0, "train")
    joined = list(itertools.chain(*stream_of(store, "train")))
    count = (len(joined) - 1) // SEQ_LEN
    cut = [joined[index * SEQ_LEN : (index + 1) * SEQ_LEN + 1] for index in range(count)]
    expected = sorted((tuple(tokens[:-1]), tuple(tokens[1:])) for tokens in cut)
    first, second = (rows_of(steps_of(batches, 2 * count))[part * count :][:count] for part in range(2))
    assert sorted(first) == sorted(second) == expected
    assert first != expected and first != second


def test_types_and_shapes(store: Path) -> None:
    (batch,) = Batches(config_of((store, 1.0)), 0, "train").microbatches(0, 0, 1)
    assert batch.tokens.shape == batch.targets.shape == (12, SEQ_LEN)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.positions is None and batch.documents is None
    assert batch.to("cpu").num_bytes == batch.num_bytes


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_global_batch_is_the_same_on_any_number_of_ranks(
    store: Path, make_store: Make, texts: list[str], packing: str, masked: bool
) -> None:
    other = make_store(texts[::-1], name="other").path
    changes = {"packing": packing, "document_mask": masked, "document_positions": masked}
    config = config_of((store, 0.7), (other, 0.3), **changes)
    for step in (0, 1, 1000):
        whole = Batches(config, 3, "train").microbatches(step, 0, 1)
        for num_ranks, micro in ((2, 3), (3, 4), (4, 1), (12, 1)):
            per_rank = [Batches(config, 3, "train").microbatches(step, r, num_ranks, micro) for r in range(num_ranks)]
            assert {len(parts) for parts in per_rank} == {12 // num_ranks // micro}
            parts = list(itertools.chain(*per_rank))
            assert rows_of(parts) == rows_of(whole)
            assert sum(part.num_bytes for part in parts) == whole[0].num_bytes


def test_the_seed_and_the_step_choose_the_tokens(store: Path) -> None:
    config = config_of((store, 1.0))
    hashes = {Batches(config, seed, "train").token_hash(step) for seed in range(3) for step in range(3)}
    assert len(hashes) == 9
    assert Batches(config, 1, "train").token_hash(2) == Batches(config, 1, "train").token_hash(2)


def test_stores_are_mixed_by_weight(make_store: Make, texts: list[str]) -> None:
    one, two = make_store(texts[:60], name="one").path, make_store([t.upper() for t in texts], name="two").path
    batches = Batches(config_of((one, 3.0), (two, 1.0), global_batch_size=8), 0, "train")
    rows_of_one = set(rows_of(steps_of(Batches(config_of((one, 1.0)), 0, "train"), 20)))
    for step in range(5):
        rows = rows_of(batches.microbatches(step, 0, 1))
        assert sum(row in rows_of_one for row in rows) == 6


def test_without_a_mask_the_next_document_is_predicted(store: Path) -> None:
    batches = Batches(config_of((store, 1.0), document_positions=True), 0, "train")
    (batch,) = batches.microbatches(0, 0, 1)
    assert (batch.targets != IGNORE).all()
    assert batch.documents is None and batch.positions is not None
    begun = batch.tokens[:, :-1] == batches.eos_id
    assert torch.equal(batch.positions[:, 1:] == 0, begun)


def test_with_a_mask_documents_are_told_apart_and_ends_predict_nothing(store: Path) -> None:
    config = config_of((store, 1.0), document_mask=True, document_positions=True)
    batches = Batches(config, 0, "train")
    (batch,) = batches.microbatches(0, 0, 1)
    assert batch.documents is not None and batch.positions is not None
    is_end = batch.tokens == batches.eos_id
    assert torch.equal(batch.targets == IGNORE, is_end)
    assert torch.equal(batch.documents[:, 1:], is_end[:, :-1].cumsum(dim=1))
    assert (batch.documents[:, 0] == 0).all()
    inside = batch.documents[:, 1:] == batch.documents[:, :-1]
    assert torch.equal(batch.positions[:, 1:], torch.where(inside, batch.positions[:, :-1] + 1, 0))
    assert is_end.any()


def test_best_fit_keeps_documents_whole_and_predicts_every_token_but_the_first(store: Path) -> None:
    config = config_of((store, 1.0), packing="best_fit", document_mask=True, document_positions=True)
    batches = Batches(config, 0, "train")
    count = batches.num_sequences[0]
    documents = stream_of(store, "train")
    assert max(map(len, documents)) > SEQ_LEN
    seen: list[tuple[int, ...]] = []
    targets = 0
    for batch in steps_of(Batches(replace(config, global_batch_size=1), 0, "train"), count):
        assert batch.documents is not None and batch.positions is not None
        tokens, target, owner = batch.tokens[0], batch.targets[0], batch.documents[0]
        targets += int((target != IGNORE).sum())
        for document in owner.unique():
            at = torch.nonzero(owner == document).flatten()
            assert torch.equal(batch.positions[0, at], torch.arange(len(at)))
            assert torch.equal(target[at[:-1]], tokens[at[1:]]) or (target[at] == IGNORE).all()
            if (target[at] != IGNORE).any():
                seen.append(tuple(tokens[at].tolist()))
    assert targets == sum(len(document) - 1 for document in documents)
    whole = sorted(tuple(document) for document in documents if len(document) <= SEQ_LEN)
    assert [piece for piece in sorted(seen) if piece in set(whole)] == whole


def bits_denominator(path: Path, split: Any, tokenizer: Tokenizer, masked: bool) -> int:
    """Bytes of everything that is a target over a whole split: all text, less what no token predicts."""
    documents = stream_of(path, split)
    whole = sum(len(tokenizer.decode(ids).encode()) for ids in documents)
    unpredicted = documents if masked else documents[:1]
    return whole - sum(len(tokenizer.decode(ids[:1]).encode()) for ids in unpredicted)


@pytest.mark.parametrize("masked", [False, True])
def test_bytes_of_the_heldout_targets_are_exact(store: Path, tokenizer_file: Path, masked: bool) -> None:
    batches = Batches(config_of((store, 1.0), document_mask=masked), 0, "heldout")
    counted = sum(batch.num_bytes for batch in batches.heldout_microbatches(0, 1, 5))
    # ASCII only where a document begins, so that a first token decodes to its own bytes.
    assert counted == bits_denominator(store, "heldout", Tokenizer(tokenizer_file), masked)


def test_bytes_of_best_fit_are_exact(store: Path, tokenizer_file: Path) -> None:
    batches = Batches(config_of((store, 1.0), packing="best_fit"), 0, "heldout")
    counted = sum(batch.num_bytes for batch in batches.heldout_microbatches(0, 1, 5))
    assert counted == bits_denominator(store, "heldout", Tokenizer(tokenizer_file), True)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_the_space_that_a_tokenizer_adds_is_no_byte_of_the_text(
    make_store: Make, tmp_path: Path, bos: bool, packing: str
) -> None:
    path = llama_like_tokenizer(tmp_path)
    texts = [f"{'ab' * size} a{'b' * number}" for number, size in enumerate(range(1, 20))]
    made = make_store(texts, tokenizer=path, bos=bos, heldout_fraction=0.4)
    assert made.manifest.tokenizer.prefix_bytes == 1
    assert made.manifest.preparation["inexact_documents"] == 0
    config = config_of((made.path, 1.0), packing=packing, seq_len=7)
    counted = sum(b.num_bytes for b in Batches(config, 0, "heldout").heldout_microbatches(0, 1, 2))
    heldout = TokenStore.open(made.path).split("heldout")
    # The first token of a document is the added space itself: no byte of the text is lost with it.
    assert counted == heldout.num_bytes


def llama_like_tokenizer(folder: Path) -> Path:
    """Puts a space before a text, as Llama 2's does, and never joins it with a letter."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    vocab = {"\u2581": 0, "a": 1, "b": 2, "</s>": 3, "<s>": 4}
    made = tokenizers.Tokenizer(models.BPE(vocab, []))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")  # pyright: ignore[reportAttributeAccessIssue]
    made.decoder = decoders.Metaspace(prepend_scheme="first")  # pyright: ignore[reportAttributeAccessIssue]
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


# ----------------------------------------------------------------------------------------------------------- held out


def test_held_out_covers_every_token_but_the_first(store: Path) -> None:
    batches = Batches(config_of((store, 1.0)), 0, "heldout")
    joined = list(itertools.chain(*stream_of(store, "heldout")))
    rows = rows_of(list(batches.heldout_microbatches(0, 1, 4)))
    targets = [target for _, targets in rows for target in targets if target != IGNORE]
    assert targets == joined[1:]
    assert len(joined) % SEQ_LEN != 1  # so the last sequence was padded


@pytest.mark.parametrize("max_sequences", [0, 5, 7])
def test_held_out_is_the_same_set_on_any_number_of_ranks(
    store: Path, make_store: Make, texts: list[str], max_sequences: int
) -> None:
    other = make_store(texts[::-1], name="other", heldout_fraction=0.1).path
    config = config_of((store, 0.7), (other, 0.3))
    one = list(Batches(config, 0, "heldout").heldout_microbatches(0, 1, 2, max_sequences))
    expected = sorted(row for row in rows_of(one) if set(row[1]) != {IGNORE})
    assert max_sequences == 0 or len(expected) == max_sequences
    for num_ranks, micro in ((2, 2), (3, 1), (4, 3), (16, 2)):
        ranks = [
            list(Batches(config, seed, "heldout").heldout_microbatches(seed, num_ranks, micro, max_sequences))
            for seed in range(num_ranks)
        ]
        assert len({len(parts) for parts in ranks}) == 1
        assert len({part.tokens.shape for parts in ranks for part in parts}) == 1
        parts = list(itertools.chain(*ranks))
        assert sorted(row for row in rows_of(parts) if set(row[1]) != {IGNORE}) == expected
        assert sum(part.num_bytes for part in parts) == sum(batch.num_bytes for batch in one)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(max_sequences=st.integers(1, 60))
def test_held_out_sequences_are_as_many_as_asked_and_never_twice(two_heldout: Batches, max_sequences: int) -> None:
    rows = rows_of(list(two_heldout.heldout_microbatches(0, 1, 1, max_sequences)))
    assert len(rows) == len(set(rows)) == min(max_sequences, sum(two_heldout.num_sequences))


@pytest.fixture
def two_heldout(make_store: Make, texts: list[str]) -> Batches:
    one = make_store(texts[:100], name="one", heldout_fraction=0.3).path
    two = make_store([text.upper() for text in texts[100:]], name="two", heldout_fraction=0.3).path
    return Batches(config_of((one, 1.0), (two, 1.0)), 0, "heldout")


# ------------------------------------------------------------------------------------------------------------ refusals


def test_a_batch_that_does_not_divide_is_refused(store: Path) -> None:
    batches = Batches(config_of((store, 1.0)), 0, "train")
    with pytest.raises(DataError) as caught:
        batches.microbatches(0, 0, 5)
    why = "each takes an equal slice of every step"
    assert str(caught.value) == f"data.global_batch_size = 12: must divide by 5 ranks ({why}). Use 15."
    with pytest.raises(DataError) as caught:
        batches.microbatches(0, 0, 2, 4)
    assert str(caught.value) == "data.micro_batch_size = 4: must divide a rank's 6 sequences of a step."


def test_a_store_of_another_tokenizer_is_refused(store: Path, make_store: Make, texts: list[str]) -> None:
    other = make_store(texts, name="other", train_tokenizer=300).path
    with pytest.raises(DataError) as caught:
        Batches(config_of((store, 1.0), (other, 1.0)), 0, "train")
    mine, theirs = (TokenStore.open(path).tokenizer.sha256[:12] for path in (store, other))
    what = f"was made with another tokenizer than {store} ({theirs}.. is not {mine}..)"
    assert str(caught.value) == f"{other}: {what}. Prepare it with --tokenizer {store}/tokenizer."


def test_a_store_without_held_out_documents_is_refused(make_store: Make, texts: list[str]) -> None:
    path = make_store(texts, heldout_fraction=0.0).path
    with pytest.raises(DataError) as caught:
        Batches(config_of((path, 1.0)), 0, "heldout")
    do = "Prepare it again with --heldout-fraction above 0, or set --eval.every_steps 0."
    assert str(caught.value) == f"{path}: has no held-out documents. {do}"


def test_a_store_that_is_too_small_is_refused(make_store: Make) -> None:
    path = make_store(["short"]).path
    tokens = TokenStore.open(path).split("train").num_tokens
    with pytest.raises(DataError) as caught:
        Batches(config_of((path, 1.0)), 0, "train")
    what = f"has {tokens} tokens to train on, too few for one sequence of {SEQ_LEN}"
    assert str(caught.value) == f"{path}: {what}. Add text, or use --data.seq_len {tokens - 1} or less."
    assert Batches(config_of((path, 1.0), packing="best_fit"), 0, "train").num_sequences == [1]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_weight_that_is_no_share_is_refused(store: Path, weight: float) -> None:
    with pytest.raises(DataError) as caught:
        Batches(config_of((store, weight)), 0, "train")
    do = "Leave out an unused store."
    assert str(caught.value) == f"data.stores.0.weight = {weight}: must be a positive number. {do}"


def test_no_store_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        Batches(config_of(), 0, "train")
    assert str(caught.value) == "data.stores: at least one token store is needed."


def test_identity(store: Path, tokenizer_file: Path) -> None:
    batches = Batches(config_of((store, 1.0)), 0, "train")
    tokenizer = Tokenizer(batches.tokenizer_folder)
    assert batches.tokenizer_hash == tokenizer.sha256 == Tokenizer(tokenizer_file).sha256
    assert (batches.vocab_size, batches.eos_id) == (320, tokenizer.eos_id)
    assert batches.fingerprints == [TokenStore.open(store).fingerprint]
    others = [
        Batches(config_of((store, 1.0)), 1, "train"),
        Batches(config_of((store, 1.0), packing="best_fit"), 0, "train"),
        Batches(config_of((store, 1.0), global_batch_size=6), 0, "train"),
    ]
    assert len({batches.fingerprint, *(other.fingerprint for other in others)}) == 4
