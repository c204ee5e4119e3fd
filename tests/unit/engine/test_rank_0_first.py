"""Rank 0 may work for longer than the others' collectives have time, and they wait for it all the same."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from engine.ranks import rank_0_first
from tests.ranks import RanksFailed, run_ranks

LIMIT_S, WORK_S = 1, 2.5


def work() -> None:
    threading.Event().wait(WORK_S)  # what is tested is that time passes


def wait_by(way: str) -> int:
    """Return how often this rank said that it is still there."""
    beats: list[None] = []
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=LIMIT_S), dist.group.WORLD)
    if way == "barrier":
        if dist.get_rank() == 0:
            work()
        dist.barrier()
    else:
        rank_0_first(work, LIMIT_S / 4, lambda: beats.append(None))
        dist.barrier()
    return len(beats)


def test_the_others_wait_for_longer_than_their_time_out_and_beat() -> None:
    first, *others = run_ranks(3, wait_by, "rank_0_first")
    assert first == 0
    assert all(count > WORK_S / LIMIT_S for count in others)
    with pytest.raises(RanksFailed, match=r"(?i)timed out"):  # else it would prove nothing
        run_ranks(2, wait_by, "barrier")


def fail_at_work() -> None:
    def fail() -> None:
        raise ValueError("no room")

    rank_0_first(fail, LIMIT_S, lambda: None)


def test_what_goes_wrong_on_rank_0_ends_all() -> None:
    with pytest.raises(RanksFailed, match="no room"):
        run_ranks(2, fail_at_work)
