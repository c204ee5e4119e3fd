"""A rank that is slow is named, with what it is slow in, and the run goes on; ranks of one speed are left in peace."""

import re
from pathlib import Path

import pytest

from engine.fault.record import read_lines
from engine.fault.stragglers import OwnTime, slowness
from tests.runs import Processes, last_step, make_workplace


def test_a_slow_rank_is_named_once(tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path)
    run = workplace / "runs" / "slow"
    straggle = ("--fault.inject.kind", "straggle", "--fault.inject.rank", "1", "--fault.inject.step", "3")
    for_long = ("--fault.inject.steps", "10000", "--fault.inject.seconds", "0.5", "--fault.straggler_windows", "2")
    # Ranks that share busy cores differ by much; this one by more, and the other one can't.
    far = ("--fault.straggler_factor", "1.5", "--run.steps", "10000", "--run.name", "slow")
    with Processes(workplace, 2, *straggle, *for_long, *far) as processes:
        processes.until(lambda: (run / "faults.jsonl").exists())
        named_at = last_step(run)
        processes.until(lambda: last_step(run) >= named_at + 10)  # another window: the run goes on, and says no more
        (fault,) = read_lines(run / "faults.jsonl")
        (said,) = re.findall(r"^straggler: (.*)$", processes.output(), re.M)
    assert (fault["kind"], fault["rank"], fault["more"]["part"]) == ("straggler", 1, "compute")
    assert fault["more"]["compute_s"] > 0.5
    assert re.match(
        r"takes \d+\.\d times as long as the median of its peers, in compute \(rank 1 on \S+, step \d+\)\.", said
    )


def times(own_s: float, data_s: float = 0.0, communication_s: float = 0.0) -> OwnTime:
    return OwnTime(own_s - data_s, data_s, communication_s)


@pytest.mark.parametrize(
    ("of_rank", "peers", "ratio", "part"),
    [
        (times(1.3), [1.0, 1.0, 1.0], 1.3, "compute"),
        (times(1.3, 0.4), [1.0, 1.0, 1.0], 1.3, "data"),
        (times(1.5), [1.0], 1.5, "compute"),  # of two, the faster is the measure
        (times(1.19), [1.0, 1.0], None, ""),
        (times(1.3), [1.0, 1.6, 1.7], None, ""),
        (times(1.0), [1.3], None, ""),
        (times(1.3), [], None, ""),
        (times(0.13, 0.0, 2.0), [0.1], None, ""),  # what it loses is nothing beside the step
    ],
)
def test_a_rank_is_measured_by_the_median_of_its_peers(
    of_rank: OwnTime, peers: list[float], ratio: float | None, part: str
) -> None:
    found = slowness(of_rank, [of_rank, *(times(own_s) for own_s in peers)], 1.2)
    if ratio is None:
        assert found is None
    else:
        assert found is not None and (found.ratio, found.part) == (pytest.approx(ratio), part)
