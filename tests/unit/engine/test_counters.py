"""Reading a logged step: of one run as ever, of several members each by name."""

import math

import torch

from configs.schema import ParallelConfig
from engine.counters import Counters, Reading, read_step, sick_members
from engine.metrics import MemberStep
from engine.step import StepResult
from parallel.mesh import build_layout
from tests.ranks import ranks

NAMES = ["a", "b", "c"]


def result(loss_sum: list[float], num_tokens: list[int], norm: list[float], skipped: list[float]) -> StepResult:
    return StepResult(torch.tensor(loss_sum), torch.tensor(num_tokens), torch.tensor(norm), torch.tensor(skipped))


@ranks(1)
def test_members_are_read_apart_and_means_are_of_those_that_had_targets() -> None:
    layout = build_layout(ParallelConfig(dp_shard=1), torch.device("cpu"))
    counters = Counters.starting_at([100, 200, 300], torch.device("cpu"))
    step = result([20.0, 0.0, 40.0], [10, 0, 10], [1.0, 0.0, 3.0], [0.0, 1.0, 0.0])
    counters.add(step)
    read = read_step(step, counters, [0.1, 0.2, 0.3], layout)
    assert read.steps[2] == MemberStep(loss=4.0, grad_norm=3.0, lr=0.3, num_tokens=310)
    assert [step.num_tokens for step in read.steps] == [110, 200, 310]
    assert (read.loss, read.grad_norm) == (3.0, 2.0) and math.isclose(read.lr, 0.2)
    assert read.empty_steps(NAMES) == ["member 'b': 1 steps"] and read.sick(NAMES) == ""
    assert sick_members(counters, NAMES) == ""
    step = result([20.0, 30.0, math.nan], [10, 10, 10], [math.inf, 1.0, math.nan], [1.0, 0.0, 1.0])
    counters.add(step)
    read = read_step(step, counters, [0.1, 0.2, 0.3], layout)
    assert read.sick(NAMES) == "member 'a': loss 2.0, grad_norm inf; member 'c': loss nan, grad_norm nan"
    late = "a gradient since the last logged step"
    assert sick_members(counters, NAMES) == f"member 'a': {late}; member 'c': {late}"


@ranks(1)
def test_a_run_without_members_has_no_names() -> None:
    layout = build_layout(ParallelConfig(dp_shard=1), torch.device("cpu"))
    counters = Counters.starting_at(7, torch.device("cpu"))
    step = StepResult(torch.tensor(6.0), torch.tensor(3), torch.tensor(math.nan), torch.tensor(1.0))
    counters.add(step)
    read = read_step(step, counters, [0.1], layout)
    assert (read.loss, read.lr, read.steps[0].num_tokens) == (2.0, 0.1, 10)
    assert read.sick([]) == "loss 2.0, grad_norm nan"
    assert sick_members(counters, []) == "a gradient since the last logged step"


def test_without_any_target_the_loss_is_zero() -> None:
    step = MemberStep(loss=0.0, grad_norm=0.0, lr=0.1, num_tokens=0)
    read = Reading([step, step], counts=[0.0, 0.0], non_finite=[0.0, 0.0], empty=[1.0, 2.0])
    assert (read.loss, read.grad_norm) == (0.0, 0.0)
    assert read.empty_steps(["a", "b"]) == ["member 'a': 1 steps", "member 'b': 2 steps"]
