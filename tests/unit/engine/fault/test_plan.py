"""engine/fault/plan.py: the list of faults is a function of its arguments, within the run, and spread over it."""

import dataclasses

from configs.check_inject import EFFECTS, KINDS
from configs.faults import LEADER_STAGES, RANDOM_KINDS, InjectConfig
from engine.fault.plan import plan_faults


def test_a_single_fault_is_where_the_config_says() -> None:
    (planned,) = plan_faults(InjectConfig(kind="kill_in_save", rank=1, step=7, stage="between_shards"), 20, 2)
    assert (planned.kind, planned.rank, planned.step, planned.stage) == ("kill_in_save", 1, 7, "between_shards")
    assert plan_faults(InjectConfig(), 20, 2) == []


def test_what_is_left_to_chance_is_drawn_by_the_seed() -> None:
    drawn = [plan_faults(InjectConfig(kind="kill", rank=-1, seed=seed), 20, 4)[0] for seed in range(200)]
    assert {planned.rank for planned in drawn} == {0, 1, 2, 3}
    assert {planned.step for planned in drawn} == set(range(1, 20))  # never the last step
    again = [plan_faults(InjectConfig(kind="kill", rank=-1, seed=seed), 20, 4)[0] for seed in range(200)]
    assert again == drawn


def test_random_draws_as_many_as_asked_of_the_kinds_over_the_whole_run() -> None:
    config = InjectConfig(kind="random", count=400, seed=5)
    plan = plan_faults(config, 100, 4)
    assert plan == plan_faults(config, 100, 4) != plan_faults(InjectConfig(kind="random", count=400, seed=6), 100, 4)
    assert len(plan) == 400
    assert [planned.number for planned in plan] == list(range(400))
    assert {planned.kind for planned in plan} == set(RANDOM_KINDS)
    assert {planned.rank for planned in plan} == {0, 1, 2, 3}
    steps = [planned.step for planned in plan]
    assert (steps, steps[0] >= 1, steps[-1] <= 99) == (sorted(steps), True, True)
    assert all(sum(tenth * 10 < step <= tenth * 10 + 10 for step in steps) >= 15 for tenth in range(10))
    killed = [planned for planned in plan if planned.kind == "kill_in_save"]
    assert all(planned.rank == 0 for planned in killed if planned.stage in LEADER_STAGES)
    some = plan_faults(InjectConfig(kind="random", count=50, kinds=("kill", "sigterm")), 100, 4)
    assert {planned.kind for planned in some} == {"kill", "sigterm"}


def test_every_field_and_every_kind_is_known_to_the_check() -> None:
    assert {field.name for field in dataclasses.fields(InjectConfig)} == {"kind", *EFFECTS}
    assert {kind for kinds in EFFECTS.values() for kind in kinds} == {*KINDS, "random"}
    assert set(RANDOM_KINDS) < set(KINDS)
