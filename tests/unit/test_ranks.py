"""The harness of all multi-rank tests: it must fail when a rank fails, hangs, dies or dies late."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks import Rank, RanksFailed, _watch, ranks, run_ranks
from tests.runs import until


@ranks(3)
@pytest.mark.parametrize("factor", [1, 10])
def test_a_parametrised_body_runs_on_every_rank(tmp_path: Path, factor: int) -> None:
    rank = torch.tensor(factor * dist.get_rank())
    (tmp_path / f"{dist.get_rank()}").touch()
    dist.all_reduce(rank)
    assert dist.get_world_size() == 3
    assert rank.item() == 3 * factor
    assert torch.get_num_threads() == 1
    assert len(list(tmp_path.iterdir())) == 3


@ranks(1)
def test_one_rank_is_a_group_too() -> None:
    assert dist.get_world_size() == 1


def _gathered(value: torch.Tensor) -> dict[str, object]:
    value += dist.get_rank()
    total = value.clone()
    dist.all_reduce(total)
    return {"mine": value, "total": total, "rank": dist.get_rank()}


def test_values_come_back_in_rank_order_and_arguments_are_copies() -> None:
    given = torch.zeros(2)
    values = run_ranks(2, _gathered, given)
    assert [value["rank"] for value in values] == [0, 1]
    assert [value["mine"].tolist() for value in values] == [[0, 0], [1, 1]]
    assert values[0]["total"].tolist() == [1, 1]
    assert given.tolist() == [0, 0]


def test_a_value_larger_than_a_pipe_comes_back() -> None:
    values = run_ranks(2, lambda: torch.ones(1_000_000))
    assert [value.sum().item() for value in values] == [1_000_000, 1_000_000]


def _fail_on_one() -> None:
    left, right = dist.get_rank(), 0
    print("before the failure")
    if left == 1:
        assert left == right
    dist.barrier()


def test_the_failing_rank_is_shown_and_the_waiting_one_is_ended() -> None:
    with pytest.raises(RanksFailed) as failure:
        run_ranks(2, _fail_on_one)
    text = str(failure.value)
    assert text.startswith("rank 1 of 2 failed\nTraceback (most recent call last):")
    assert "assert left == right\n" in text
    assert "    left = 1\n    right = 0\n" in text
    assert "rank 1 printed:\nbefore the failure" in text
    assert "tests/ranks.py" not in text.split("rank 1 printed")[0]


def _hang_on_one() -> None:
    if dist.get_rank() == 1:
        threading.Event().wait()
    dist.barrier()


def test_at_the_deadline_every_stack_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    run_ranks(1, int)  # the server is there now
    monkeypatch.setattr("tests.ranks.START_LIMIT_S", 6.0)  # a deadline that is as long is one too
    with pytest.raises(RanksFailed) as failure:
        run_ranks(2, _hang_on_one, timeout_s=6)
    text = str(failure.value)
    assert text.startswith("not done after 6 s\nrank 0 of 2 hangs\n")
    waiting, hanging = text.split("rank 1 of 2 hangs")
    assert "barrier" in waiting and "_hang_on_one" in hanging
    # The collective that waits for its peer is named, and both ranks are seen down to C++ and the system.
    assert re.search(r"rank 0, last and pending collectives:\n(  .*\n)*  gloo gloo:\S+ .*: (started|scheduled)\n", text)
    assert "rank 1, last and pending collectives:\n" in hanging
    assert re.search(r"rank 0, native stacks:\n(.*\n)*.*libtorch", waiting), waiting
    assert re.search(r"rank 1, native stacks:\n(.*\n)*.*_hang_on_one", hanging), hanging


def _die_on_one() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_a_killed_rank_is_named_not_the_one_that_lost_its_peer() -> None:
    with pytest.raises(RanksFailed) as failure:
        run_ranks(2, _die_on_one)
    assert str(failure.value).startswith("rank 1 of 2 was killed by SIGKILL\n")


def _abort_late() -> int:
    if dist.get_rank() == 0:
        threading.Thread(target=_abort_after_main_thread).start()
    return 7


def _abort_after_main_thread() -> None:
    threading.main_thread().join()
    os.abort()


def test_a_rank_that_aborts_after_its_last_line_fails() -> None:
    with pytest.raises(RanksFailed, match=r"^rank 0 of 2 was killed by SIGABRT after it returned"):
        run_ranks(2, _abort_late)


def _leave(folder: Path) -> None:
    (folder / str(dist.get_rank())).touch()
    # Who leaves while another is still joining the group would have it wait for ever.
    until(lambda: len(list(folder.iterdir())) == dist.get_world_size())
    os._exit(0)


def test_a_rank_that_leaves_without_returning_fails(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match=r"ranks \[0, 1\] exited with code 0 before they returned"):
        run_ranks(2, _leave, tmp_path)


def test_pytest_fails_a_decorated_test_with_the_ranks_traceback(tmp_path: Path) -> None:
    source = "from tests.ranks import ranks\n\n@ranks(2)\ndef test_wrong():\n    assert 'seen' == 'expected'\n"
    (tmp_path / "test_inner.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", "test_inner.py"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "of 2 failed" in done.stdout
    assert "assert 'seen' == 'expected'" in done.stdout


class _EndsWhenAsked:
    """A process that is seen alive once and has ended by the next question."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.codes = [None]
        self.sentinel = 7

    @property
    def exitcode(self) -> int | None:
        return self.codes.pop() if self.codes else self.code


@pytest.mark.parametrize(("code", "problem"), [(0, ""), (3, "rank 0 of 1 exited with 3 after it returned")])
def test_a_rank_that_ends_between_two_questions_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, problem: str
) -> None:
    """A wait for nothing would last until the deadline, and be told as a hang."""
    awaited: list[list[object]] = []
    monkeypatch.setattr("tests.ranks.wait", lambda busy, timeout: awaited.append(list(busy)))
    process = _EndsWhenAsked(code)
    rank = Rank(0, process, None, values=[1], started=True, closed=True)  # type: ignore[arg-type]
    assert _watch([rank], 20.0, tmp_path) == problem
    assert awaited == [[process.sentinel]]
