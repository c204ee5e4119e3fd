"""Rank 0 may work for longer than the others' collectives have time, and they wait for it all the same."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from engine.ranks import rank_0_first
from tests.ranks import RanksFailed, run_ranks

LIMIT_S, WORK_S = 3, 4.5


def work() -> None:
    threading.Event().wait(WORK_S)  # what is tested is that time passes


def wait(overdue: bool) -> int:
    """Return how often this rank said that it is still there."""
    beats: list[None] = []
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=LIMIT_S), dist.group.WORLD)
    rank_0_first(work, LIMIT_S / 8, lambda: beats.append(None), lambda: overdue)
    dist.barrier()
    return len(beats)


def test_the_others_wait_for_longer_than_their_time_out_and_beat() -> None:
    first, *others = run_ranks(3, wait, False)
    assert first == 0
    assert all(count > WORK_S / LIMIT_S for count in others)


def test_nobody_waits_for_a_rank_0_that_is_stuck() -> None:
    with pytest.raises(RanksFailed, match=r"(?i)timed out"):
        run_ranks(2, wait, True)


def fail_at_work() -> None:
    def fail() -> None:
        raise ValueError("no room")

    rank_0_first(fail, LIMIT_S, lambda: None, bool)


def test_what_goes_wrong_on_rank_0_ends_all() -> None:
    with pytest.raises(RanksFailed, match="no room"):
        run_ranks(2, fail_at_work)
