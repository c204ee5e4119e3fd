"""The learning rate against transformers' schedules, and its exact values where they matter."""

from collections.abc import Callable

import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import optimization as hf

from configs.schema import LrConfig
from engine.lr import lr_at

PEAK = 3e-4
STEPS = 50


def transformers_rates(make: Callable[[torch.optim.Optimizer], LRScheduler], steps: int) -> list[float]:
    """The rates of steps 1..steps of a transformers schedule; its step 0 has rate 0 under a warmup."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    schedule = make(optimizer)
    rates = []
    for _ in range(steps):
        optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    return rates


@pytest.mark.parametrize("warmup", [1, 7, 49])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_equals_the_transformers_schedule_one_step_later(schedule: str, warmup: int) -> None:
    decay = min(10, STEPS - warmup)
    min_ratio = 0.1 if schedule == "cosine" else 0.0
    make: dict[str, Callable[[torch.optim.Optimizer], LRScheduler]] = {
        "cosine": lambda o: hf.get_cosine_with_min_lr_schedule_with_warmup(o, warmup, STEPS, min_lr_rate=min_ratio),
        "linear": lambda o: hf.get_linear_schedule_with_warmup(o, warmup, STEPS),
        "constant": lambda o: hf.get_constant_schedule_with_warmup(o, warmup),
        "wsd": lambda o: hf.get_wsd_schedule(
            o, warmup, decay, num_stable_steps=STEPS - warmup - decay, decay_type="linear", min_lr_ratio=min_ratio
        ),
    }
    config = LrConfig(schedule=schedule, warmup_steps=warmup, decay_steps=decay, min_ratio=min_ratio)  # pyright: ignore
    ours = [lr_at(step, config, PEAK, STEPS) for step in range(STEPS)]
    assert ours == pytest.approx(transformers_rates(make[schedule], STEPS), rel=1e-12, abs=1e-19)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("min_ratio", [0.0, 0.1, 0.37, 1.0])
def test_first_top_and_last_step_are_exact(schedule: str, min_ratio: float) -> None:
    config = LrConfig(schedule=schedule, warmup_steps=8, decay_steps=5, min_ratio=min_ratio)  # pyright: ignore
    assert lr_at(0, config, PEAK, STEPS) == PEAK / 8
    assert lr_at(7, config, PEAK, STEPS) == PEAK
    assert lr_at(STEPS - 1, config, PEAK, STEPS) == PEAK * min_ratio
    if min_ratio < 1:
        assert lr_at(STEPS - 2, config, PEAK, STEPS) > PEAK * min_ratio


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_without_warmup_the_first_step_has_the_peak(schedule: str) -> None:
    config = LrConfig(schedule=schedule, decay_steps=3)  # pyright: ignore
    assert lr_at(0, config, PEAK, 10) == PEAK


def test_constant_stays_at_the_peak() -> None:
    config = LrConfig(schedule="constant", warmup_steps=2)
    assert [lr_at(step, config, PEAK, 5) for step in range(5)] == [PEAK / 2, PEAK, PEAK, PEAK, PEAK]


def test_wsd_decays_over_the_last_steps_only() -> None:
    config = LrConfig(schedule="wsd", warmup_steps=2, decay_steps=4, min_ratio=0.0)
    rates = [lr_at(step, config, 1.0, 10) for step in range(10)]
    assert rates == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]


def test_wsd_without_decay_steps_is_constant_after_warmup() -> None:
    config = LrConfig(schedule="wsd", warmup_steps=2)
    assert [lr_at(step, config, PEAK, 5) for step in range(2, 5)] == [PEAK] * 3


def test_one_step_run_uses_the_peak() -> None:
    assert lr_at(0, LrConfig(schedule="cosine"), PEAK, 1) == PEAK


def test_steps_past_the_end_keep_the_last_rate() -> None:
    config = LrConfig(schedule="cosine", warmup_steps=3, min_ratio=0.1)
    assert lr_at(80, config, PEAK, STEPS) == lr_at(STEPS - 1, config, PEAK, STEPS) == PEAK * 0.1
