"""Reading a logged step: of one run as ever, of several members each by name."""

import math

import torch

from configs.faults import FaultConfig
from engine.counters import Counters, Reading, read_step
from engine.fault.guard import Guard
from engine.metrics import MemberStep
from engine.step import StepResult

NAMES = ["a", "b", "c"]


def result(loss_sum: list[float], num_tokens: list[int], norm: list[float]) -> StepResult:
    skipped = torch.zeros(len(loss_sum))
    return StepResult(torch.tensor(loss_sum), torch.tensor(num_tokens), torch.tensor(norm), skipped)


def judge(guard: Guard, step: StepResult) -> None:
    guard.judge(step.loss_sum, step.grad_norm, step.num_tokens, step.loss_sum.isfinite())


def test_members_are_read_apart_and_means_are_of_those_that_had_targets() -> None:
    counters = Counters.starting_at([100, 200, 300], torch.device("cpu"))
    guard = Guard(FaultConfig(), 3, torch.device("cpu"))
    step = result([20.0, 0.0, 40.0], [10, 0, 10], [1.0, 0.0, 3.0])
    counters.add(step)
    judge(guard, step)
    read = read_step(step, counters, [0.1, 0.2, 0.3], guard)
    assert read.steps[2] == MemberStep(loss=4.0, grad_norm=3.0, lr=0.3, num_tokens=310)
    assert [step.num_tokens for step in read.steps] == [110, 200, 310]
    assert (read.loss, read.grad_norm) == (3.0, 2.0) and math.isclose(read.lr, 0.2)
    assert read.empty_steps(NAMES) == ["member 'b': 1 steps"] and read.skipped == []
    step = result([20.0, 30.0, math.nan], [10, 10, 10], [math.inf, 1.0, math.nan])
    counters.add(step)
    judge(guard, step)
    read = read_step(step, counters, [0.1, 0.2, 0.3], guard)
    assert [(one.member, one.step, one.loss, one.grad_norm) for one in read.skipped[:1]] == [(0, 2, 2.0, math.inf)]
    assert read.skipped[1].member == 2 and math.isnan(read.skipped[1].loss)
    assert read_step(step, counters, [0.1, 0.2, 0.3], guard).skipped == [], "told once"


def test_a_run_without_members_has_no_names() -> None:
    counters = Counters.starting_at(7, torch.device("cpu"))
    guard = Guard(FaultConfig(), 0, torch.device("cpu"))
    step = StepResult(torch.tensor(6.0), torch.tensor(3), torch.tensor(math.nan), torch.tensor(1.0))
    counters.add(step)
    judge(guard, step)
    read = read_step(step, counters, [0.1], guard)
    assert (read.loss, read.lr, read.steps[0].num_tokens) == (2.0, 0.1, 10)
    assert [one.loss for one in read.skipped] == [2.0] and read.skipped[0].kind == "non_finite"


def test_without_any_target_the_loss_is_zero() -> None:
    step = MemberStep(loss=0.0, grad_norm=0.0, lr=0.1, num_tokens=0)
    read = Reading([step, step], counts=[0.0, 0.0], empty=[1.0, 2.0], skipped=[])
    assert (read.loss, read.grad_norm) == (0.0, 0.0)
    assert read.empty_steps(["a", "b"]) == ["member 'a': 1 steps", "member 'b': 2 steps"]
