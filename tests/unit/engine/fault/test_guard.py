"""The guard on scripted and random sequences against a plain reading of its rule; its memory there and back."""

import json
import math
import random
from dataclasses import replace
from statistics import median

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from configs.faults import FaultConfig
from engine.fault.guard import FLOOR, RECENT, Guard

Values = list[tuple[float, float, int]]
"""(loss, gradient norm, targets) of each step."""


def a_guard(members: int = 0, **fault: float) -> Guard:
    return Guard(FaultConfig(**fault), members, torch.device("cpu"))  # pyright: ignore[reportArgumentType]


def judge(guard: Guard, loss: float, norm: float, num_tokens: int = 10) -> bool:
    """Judge one step of a run of one."""
    count = torch.tensor(num_tokens)
    loss_sum = torch.tensor(loss * num_tokens, dtype=torch.float64)
    skipped = guard.judge(loss_sum, torch.tensor(norm, dtype=torch.float64), count, loss_sum.isfinite())
    assert skipped.shape == () and skipped.dtype == torch.float32
    return bool(skipped)


def expected(values: Values, limit: int, threshold: float, window: int) -> list[bool]:
    """Which steps are not applied, by the rule as the documentation says it."""
    losses: list[float] = []
    norms: list[float] = []
    streak, found = 0, []
    for loss, norm, count in values:
        bad = not (math.isfinite(loss) and math.isfinite(norm))
        if threshold and 2 * len(losses[-window:]) >= window:
            for value, seen in ((loss, losses[-window:]), (norm, norms[-window:])):
                middle = median(seen)
                deviation = max(1.4826 * median(abs(one - middle) for one in seen), FLOOR * abs(middle))
                bad = bad or (deviation > 0 and value > middle + threshold * deviation)
        if streak > limit or not count:
            found.append(True)
            continue
        streak = streak + 1 if bad else 0
        found.append(bad)
        if not bad:
            losses.append(loss)
            norms.append(norm)
    return found


def drawn(seed: int, length: int) -> Values:
    """Losses that fall slowly, with noise, spikes, numbers that are none, and steps without a target."""
    draw = random.Random(seed)
    values: Values = []
    for step in range(length):
        loss, norm = 5.0 / (1 + step / 50) + draw.gauss(0, 0.05), 1.0 + abs(draw.gauss(0, 0.2))
        fate = draw.random()
        if fate < 0.05:
            loss = draw.choice([math.nan, math.inf, 4 * loss, 100 * loss])
        elif fate < 0.1:
            norm = draw.choice([math.nan, math.inf, -math.inf, 3 * norm, 1e6])
        values.append((loss, norm, 0 if fate > 0.95 else 16))
    return values


@pytest.mark.parametrize("threshold", [0.0, 4.0, 20.0])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_decisions_are_those_of_the_rule(seed: int, threshold: float) -> None:
    values = drawn(seed, 120)
    guard = a_guard(skip_limit=2, spike_threshold=threshold, spike_window=16)
    truth = expected(values, 2, threshold, 16)
    assert [judge(guard, *value) for value in values] == truth
    assert 4 < sum(truth) < 120


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_skipped_and_said_once(odd: float) -> None:
    guard = a_guard()
    assert [judge(guard, 2.0, 1.0), judge(guard, odd, 1.0), judge(guard, 2.0, odd)] == [False, True, True]
    first, second = guard.read()
    assert (first.step, second.step, first.kind) == (2, 3, "non_finite")
    assert (repr(first.loss), first.grad_norm, repr(second.grad_norm)) == (repr(odd), 1.0, repr(odd))
    assert (first.rank, second.rank) == (0, None), "whose gradient it was, nobody knows"
    assert guard.read() == [] and guard.trips == [] and guard.first_bad == 2
    assert not judge(guard, 2.0, 1.0)
    assert guard.read() == [] and guard.first_bad is None


def test_a_step_without_targets_is_skipped_and_not_bad() -> None:
    guard = a_guard(skip_limit=1)
    assert judge(guard, math.nan, 1.0) and judge(guard, 0.0, 0.0, num_tokens=0) and judge(guard, 0.0, 0.0, num_tokens=0)
    assert [one.step for one in guard.read()] == [1] and not guard.trips
    assert judge(guard, math.nan, 1.0), "and it doesn't end the row of bad ones"
    guard.read()
    assert [(trip.first, trip.last.step) for trip in guard.trips] == [(1, 4)]


def test_more_bad_steps_in_a_row_than_the_limit_stop_all_updates_until_a_checkpoint_is_loaded() -> None:
    guard = a_guard(skip_limit=3)
    start = guard.state()
    for _ in range(3):
        assert not judge(guard, 2.0, 1.0)
        assert all(judge(guard, math.nan, 1.0) for _ in range(3)), "three are skipped"
    assert judge(guard, math.nan, 1.0)
    assert all(judge(guard, 2.0, 1.0) for _ in range(5)), "whenever the host looks, nothing was applied"
    told = guard.read()
    assert len(told) == RECENT and told[-1].step == 13
    assert told[0].forgotten == 10 - RECENT and all(not one.forgotten for one in told[1:])
    for _ in range(2):
        assert [(trip.first, trip.last.step) for trip in guard.trips] == [(10, 13)], "not forgotten by the next look"
        assert guard.read() == []
    guard.load(json.loads(json.dumps(start)), 0)
    assert not guard.trips and not judge(guard, 2.0, 1.0)


def test_a_limit_of_zero_trips_at_the_first_bad_step() -> None:
    guard = a_guard(skip_limit=0)
    assert not judge(guard, 2.0, 1.0) and judge(guard, 2.0, math.inf) and judge(guard, 2.0, 1.0)
    assert [one.step for one in guard.read()] == [2]
    assert [(trip.first, trip.last.step) for trip in guard.trips] == [(2, 2)]


def test_a_window_says_nothing_before_it_is_half_full() -> None:
    guard = a_guard(spike_threshold=5.0, spike_window=8)
    assert [judge(guard, loss, 1.0) for loss in (2.0, 2.1, 50.0, 2.0)] == [False] * 4
    assert judge(guard, 60.0, 1.0) and not judge(guard, 2.2, 1.0)
    assert [one.kind for one in guard.read()] == ["spike"]


def test_a_flat_window_is_no_hair_trigger_and_a_window_of_zeros_says_nothing() -> None:
    guard = a_guard(spike_threshold=5.0, spike_window=8)
    assert not any(judge(guard, 2.0, 0.0) for _ in range(8))
    assert not judge(guard, 2.0 * (1 + 5.0 * FLOOR) * 0.999, 1e-3)
    assert judge(guard, 2.0 * (1 + 5.0 * FLOOR) * 1.001, 0.0)
    assert not judge(guard, 0.1, 0.0), "below the median is never a spike"


def test_only_what_was_applied_enters_the_window() -> None:
    guard = a_guard(spike_threshold=5.0, spike_window=8, skip_limit=100)
    for step in range(8):
        judge(guard, 2.0 + 0.01 * step, 1.0)
    full = guard.state()
    for loss, count in ((9.0, 10), (math.nan, 10), (1.0, 0)):
        assert judge(guard, loss, 1.0, count)
    assert {name: guard.state()[name] for name in ("losses", "grad_norms")} == {
        name: full[name] for name in ("losses", "grad_norms")
    }
    judge(guard, 2.03, 1.0)
    assert guard.state()["losses"][0] == [*full["losses"][0][1:], 2.03 * 10 / 10]


def test_members_are_judged_apart() -> None:
    guard = a_guard(2, skip_limit=1, spike_threshold=5.0, spike_window=8)
    alone = [a_guard(skip_limit=1, spike_threshold=5.0, spike_window=8) for _ in range(2)]
    columns = [drawn(seed, 60) for seed in (4, 5)]
    for row in zip(*columns, strict=True):
        losses, norms, counts = (torch.tensor(one) for one in zip(*row, strict=True))
        sums = losses.double() * counts
        skipped = guard.judge(sums, norms, counts, sums.isfinite())
        truth = [one.judge(sums[i], norms[i], counts[i], sums[i].isfinite()).item() for i, one in enumerate(alone)]
        assert skipped.tolist() == truth
    both = [json.dumps(guard.state()[name]) for name in ("streak", "first", "skipped", "losses", "grad_norms")]
    each = [
        json.dumps([one.state()[name][0] for one in alone])
        for name in ("streak", "first", "skipped", "losses", "grad_norms")
    ]
    assert both == each
    told = guard.read()
    for index, one in enumerate(alone):
        of_one = [repr(replace(skip, member=0)) for skip in told if skip.member == index]
        assert of_one == [repr(skip) for skip in one.read()] and of_one
        trips = [(trip.first, trip.last.step) for trip in guard.trips if trip.last.member == index]
        assert trips == [(trip.first, trip.last.step) for trip in one.trips]


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("cut", [1, 7, 30, 53])
def test_decisions_after_a_round_trip_are_those_of_the_undisturbed_run(cut: int, threshold: float) -> None:
    values = drawn(11, 80)
    whole, parts = (a_guard(skip_limit=3, spike_threshold=threshold, spike_window=16) for _ in range(2))
    for value in values[:cut]:
        assert judge(whole, *value) == judge(parts, *value)
    whole.read()
    text = json.dumps(parts.state(), allow_nan=False)
    parts = a_guard(skip_limit=3, spike_threshold=threshold, spike_window=16)
    parts.load(json.loads(text), cut)
    assert json.dumps(parts.state()) == text
    for value in values[cut:]:
        assert judge(whole, *value) == judge(parts, *value)
    assert json.dumps(parts.state()) == json.dumps(whole.state())
    # What was skipped before the checkpoint was told then.
    told = [repr(replace(one, forgotten=0)) for one in parts.read()]
    assert told == [repr(replace(one, forgotten=0)) for one in whole.read()]


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_no_judgement_waits_for_the_device(threshold: float) -> None:
    """Fake tensors have no values: whatever reads one raises."""
    with FakeTensorMode():
        guard = a_guard(3, spike_threshold=threshold, spike_window=8)
        values = torch.ones(3, dtype=torch.float64)
        skipped = guard.judge(values, values.float(), torch.ones(3, dtype=torch.int64), values.isfinite())
        assert skipped.shape == (3,)
        with pytest.raises(DataDependentOutputException):
            guard.read()


def test_a_checkpoint_without_a_memory_starts_anew() -> None:
    guard = a_guard(spike_threshold=5.0, spike_window=8)
    for _ in range(3):
        judge(guard, math.nan, 1.0)
    guard.load({}, 40)
    assert guard.state() == a_guard(spike_threshold=5.0, spike_window=8).state()
    assert judge(guard, math.nan, 1.0) and guard.read()[0].step == 41


def test_another_window_and_a_lower_limit_take_what_they_can_of_the_memory() -> None:
    guard = a_guard(spike_threshold=5.0, spike_window=16, skip_limit=3)
    for step in range(16):
        judge(guard, 2.0 + step, 1.0)
    for _ in range(3):
        judge(guard, math.nan, 1.0)
    state = guard.state()
    smaller = a_guard(spike_threshold=5.0, spike_window=8, skip_limit=1)
    smaller.load(state, 19)
    assert smaller.state()["losses"][0] == state["losses"][0][-8:] and smaller.read() == [] and not smaller.trips
    assert judge(smaller, math.nan, 1.0)
    smaller.read()
    assert [(trip.first, trip.last.step) for trip in smaller.trips] == [(17, 20)], "one more is too many now"
