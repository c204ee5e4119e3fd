"""Order, mix and packing hold for any sizes, weights and seeds: bijections, exact shares, nothing lost."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.data.mix import MAX_BLOCK, Mix, apportion
from engine.data.order import permute
from engine.data.pack import one_each, pack

keys = st.tuples(st.integers(0, 2**63), st.integers(0, 100), st.integers(0, 1000))
weights = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


@given(st.integers(1, 5000), keys)
def test_the_order_is_a_bijection(size: int, key: tuple[int, ...]) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


@given(st.integers(1, 2**61), keys, st.data())
def test_one_element_and_many_agree_at_any_size(size: int, key: tuple[int, ...], data: st.DataObject) -> None:
    index = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=8, unique=True))
    many = permute(index, size, key)
    assert len(set(many.tolist())) == len(index)
    assert all(0 <= place < size for place in many)
    assert [int(permute(one, size, key)[0]) for one in index] == many.tolist()


@given(st.integers(1, 300), keys, st.integers(0, 2**62))
def test_numbers_may_be_mixed_in_one_call(size: int, key: tuple[int, ...], number: int) -> None:
    index, numbers = np.repeat(np.arange(size), 2), np.tile([number, number + 1], size)
    mixed = permute(index, size, key, numbers)
    assert np.array_equal(mixed[::2], permute(np.arange(size), size, key, number))
    assert np.array_equal(mixed[1::2], permute(np.arange(size), size, key, number + 1))


def test_every_key_and_number_is_another_order() -> None:
    orders = {tuple(permute(np.arange(50), 50, (seed, 0), epoch).tolist()) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


def test_the_order_never_changes() -> None:
    # A checkpoint made years ago must go on with the same tokens.
    assert permute(np.arange(10), 10, (0, 0), 0).tolist() == [5, 6, 7, 9, 0, 2, 8, 4, 3, 1]
    assert permute([0, 10**12], 10**12 + 1, (1, 2), 3).tolist() == [73420567034, 244849273571]


def test_the_order_is_spread_evenly() -> None:
    # Where 20 neighbours go, over 400 orders of 100: chi-square of 100 cells, mean 99, standard deviation 14.
    places = np.concatenate([permute(np.arange(40, 60), 100, (0,), number) for number in range(400)])
    expected = len(places) / 100
    chi_square = ((np.bincount(places, minlength=100) - expected) ** 2 / expected).sum()
    assert chi_square < 99 + 5 * 14
    first = permute(np.arange(10_000), 10_000, (7,))
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.05


@given(weights, st.integers(0, 2**32), st.integers(1, 5))
def test_each_store_has_its_share_of_every_block(given_weights: list[float], seed: int, block: int) -> None:
    mix = Mix.from_weights(given_weights, seed)
    size = sum(mix.counts)
    assert size <= MAX_BLOCK
    exact = np.array(given_weights) / sum(given_weights) * size
    assert all(
        abs(count - share) < 1 or (count == 1 and share < 1) or size == MAX_BLOCK
        for count, share in zip(mix.counts, exact, strict=True)
    )
    store, _ = mix.locate(np.arange(block * size, (block + 1) * size))
    assert np.bincount(store, minlength=len(mix.counts)).tolist() == list(mix.counts)


@given(weights, st.integers(0, 2**32))
def test_the_samples_of_a_store_are_numbered_without_a_gap(given_weights: list[float], seed: int) -> None:
    mix = Mix.from_weights(given_weights, seed)
    store, number = mix.locate(np.arange(3 * sum(mix.counts)))
    for index, count in enumerate(mix.counts):
        assert np.array_equal(np.sort(number[store == index]), np.arange(3 * count))


@given(weights, st.integers(0, 2**32), st.integers(0, 10**15))
def test_a_sample_is_found_alone_as_among_others(given_weights: list[float], seed: int, first: int) -> None:
    mix = Mix.from_weights(given_weights, seed)
    together = np.stack(mix.locate(np.arange(first, first + 20)))
    alone = np.concatenate([np.stack(mix.locate(first + offset)) for offset in range(20)], axis=1)
    assert np.array_equal(together, alone)


def test_weights_that_a_short_block_can_meet_exactly() -> None:
    cases = {(7.0, 3.0): (7, 3), (1.0,): (1,), (0.5, 0.25, 0.25): (2, 1, 1), (0.1, 0.2): (1, 2)}
    assert {given_weights: Mix.from_weights(given_weights, 0).counts for given_weights in cases} == cases


@given(st.lists(st.floats(0.001, 10), min_size=1, max_size=8), st.integers(0, 500))
def test_apportioning_gives_away_everything_and_nobody_is_off_by_one(shares: list[float], total: int) -> None:
    counts = apportion(np.array(shares), total)
    exact = np.array(shares) / sum(shares) * total
    assert sum(counts) == total
    assert np.all(np.abs(np.array(counts) - exact) < 1 + 1e-6)


lengths_of_documents = st.lists(st.integers(2, 60), min_size=1, max_size=200)


def plan_of(lengths: list[int], seq_len: int) -> tuple[list[list[tuple[int, int]]], float]:
    offsets = np.cumsum([0, *lengths]).astype(np.uint64)
    plan = pack(offsets, seq_len)
    rows = [
        list(zip(plan.start[a:b].tolist(), plan.length[a:b].tolist(), strict=True))
        for a, b in zip(plan.first[:-1], plan.first[1:], strict=True)
    ]
    return rows, plan.utilisation(seq_len)


@given(lengths_of_documents, st.integers(2, 40))
def test_packing_keeps_every_token_and_cuts_only_what_does_not_fit(lengths: list[int], seq_len: int) -> None:
    rows, _ = plan_of(lengths, seq_len)
    assert all(rows) and all(sum(length for _, length in row) <= seq_len for row in rows)
    pieces = sorted(piece for row in rows for piece in row)
    expected = []
    begin = 0
    for length in lengths:
        # The last token has nothing to predict: alone in a piece it would be a wasted place.
        cuts = [(begin + at, min(seq_len, length - at)) for at in range(0, length, seq_len)]
        expected += cuts[:-1] if len(cuts) > 1 and cuts[-1][1] == 1 else cuts
        begin += length
    assert pieces == expected


@given(lengths_of_documents, st.integers(6, 40), st.integers(0, 4))
def test_room_before_each_document_is_kept(lengths: list[int], seq_len: int, before: int) -> None:
    offsets = np.cumsum([0, *lengths]).astype(np.uint64)
    packed, alone = pack(offsets, seq_len, before), one_each(offsets, seq_len, before)
    plain = pack(offsets, seq_len - before)
    for plan in (packed, alone):
        pieces = sorted(zip(plan.start.tolist(), plan.length.tolist(), strict=True))
        assert pieces == sorted(zip(plain.start.tolist(), plain.length.tolist(), strict=True))
        used = np.add.reduceat(plan.length + before, plan.first[:-1])
        assert (used <= seq_len).all() and plan.first[-1] == len(plan.start)
    assert (np.diff(alone.first) == 1).all()
    assert packed.num_sequences <= alone.num_sequences


def plain_best_fit_decreasing(lengths: list[int], seq_len: int) -> int:
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(seq_len - length)
    return len(rooms)


@given(lengths_of_documents, st.integers(60, 150))
def test_packing_needs_as_many_sequences_as_the_textbook_algorithm(lengths: list[int], seq_len: int) -> None:
    rows, utilisation = plan_of(lengths, seq_len)
    assert len(rows) == plain_best_fit_decreasing(lengths, seq_len)
    assert utilisation == sum(lengths) / (len(rows) * seq_len)


def test_packing_of_many_documents_wastes_almost_nothing() -> None:
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(5, 1, 20_000).astype(np.int64), 2, None)
    rows, utilisation = plan_of(lengths.tolist(), 1024)
    assert utilisation > 0.999
    assert rows == plan_of(lengths.tolist(), 1024)[0]


def test_packing_of_nothing() -> None:
    plan = pack(np.zeros(1, dtype=np.uint64), 8)
    assert plan.num_sequences == 0
