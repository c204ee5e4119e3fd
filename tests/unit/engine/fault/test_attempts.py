"""The history of a run's starts: what is lost, what is productive, and when starting again leads nowhere."""

import time
from pathlib import Path

import pytest

from configs.errors import RunError
from engine.fault.attempts import Attempts, Start
from engine.fault.record import read_lines


def start(restart_count: int = 0, ago_s: float = 0.0) -> Start:
    return Start(began=time.monotonic() - ago_s, restart_count=restart_count)


def test_a_killed_start_is_closed_by_the_next_and_its_lost_steps_are_counted(tmp_path: Path) -> None:
    first = Attempts(tmp_path, start())
    assert first.begin(0, 0.0) == 0
    first.advance(17, 3.5)
    first.write_progress()  # and killed

    second = Attempts(tmp_path, start(ago_s=2.0))
    assert second.begin(10, 2.0) == 7
    second.advance(20, 4.0)
    second.end("done")

    third = Attempts(tmp_path, start())
    assert (third.number, third.begin(20, 4.0)) == (3, 0)
    lines = [(line["event"], line["attempt"], line.get("reason")) for line in read_lines(tmp_path / "attempts.jsonl")]
    assert lines == [
        ("start", 1, None), ("end", 1, "killed"), ("start", 2, None), ("end", 2, "done"), ("start", 3, None)
    ]  # fmt: skip


def test_goodput_is_productive_time_over_the_time_of_all_starts(tmp_path: Path) -> None:
    first = Attempts(tmp_path, start(ago_s=60.0))
    first.begin(0, 0.0)
    first.advance(30, 50.0)
    first.end("SIGTERM")
    second = Attempts(tmp_path, start(ago_s=40.0))
    second.begin(20, 30.0)  # twenty productive seconds were lost
    second.advance(50, 65.0)
    assert second.goodput() == pytest.approx(65.0 / 100.0, rel=0.1)


def history(folder: Path, *starts: tuple[int, int]) -> None:
    """Leave killed starts behind: from which step, and the restart count."""
    for from_step, restart_count in starts:
        Attempts(folder, start(restart_count)).begin(from_step, 0.0)


@pytest.mark.parametrize(
    ("starts", "restart_count", "refused"),
    [
        (((40, 0), (40, 1), (40, 2)), 3, True),
        (((40, 0), (40, 1)), 2, False),
        (((40, 0), (40, 1), (40, 2)), 0, False),  # by hand: somebody has looked
        (((40, 0), (40, 1), (40, 2), (40, 0)), 1, False),  # counted from the last start by hand
        (((20, 0), (40, 1), (40, 2)), 3, False),
        (((20, 0), (40, 1), (40, 2), (40, 3)), 4, True),
    ],
)
def test_automatic_restarts_without_progress_end(
    tmp_path: Path, starts: tuple[tuple[int, int], ...], restart_count: int, refused: bool
) -> None:
    history(tmp_path, *starts)
    attempts = Attempts(tmp_path, start(restart_count))
    attempts.refuse_fruitless(40, 0)
    if not refused:
        attempts.refuse_fruitless(40, 3)
        return
    with pytest.raises(RunError) as caught:
        attempts.refuse_fruitless(40, 3)
    assert str(caught.value) == (
        f"{tmp_path}: no progress since step 40, not started again (the last 3 starts all began there and saved "
        f"nothing newer; {tmp_path / 'attempts.jsonl'} has the history). Mend the cause, then start the run by hand."
    )


def test_a_torn_history_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    history(tmp_path, (0, 0))
    with (tmp_path / "attempts.jsonl").open("a") as file:
        file.write('{"event": "en')
        file.write("\n" + "[" * 200_000 + "\n")
    for text in ('{"attempt": ', '{"attempt": 1, "step": 1e999, "wall_s": 1, "productive_s": 1}'):
        (tmp_path / "progress.json").write_text(text)
        assert Attempts(tmp_path, start()).last is None
    assert Attempts(tmp_path, start()).begin(0, 0.0) == 0
    assert [line["attempt"] for line in read_lines(tmp_path / "attempts.jsonl")] == [1, 2]


def test_what_a_killed_start_had_logged_counts_although_its_progress_is_older(tmp_path: Path) -> None:
    """Progress is written every second only."""
    first = Attempts(tmp_path, start())
    first.begin(0, 0.0)
    first.advance(5, 1.0)
    first.write_progress()
    lines = [f'{{"kind": "step", "step": {step}, "loss": 1.0}}\n' for step in range(1, 15)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"kind": "st')
    assert Attempts(tmp_path, start()).begin(10, 1.0) == 4
    ended = [line["step"] for line in read_lines(tmp_path / "attempts.jsonl") if line["event"] == "end"]
    assert ended == [14]


def test_lines_that_somebody_has_spoilt_are_left_out(tmp_path: Path) -> None:
    history(tmp_path, (0, 0))
    with (tmp_path / "attempts.jsonl").open("a") as file:
        file.write('{}\n{"event": "start"}\n{"event": "end", "attempt": 1, "step": 3}\n')
    (tmp_path / "progress.json").write_text('{"attempt": 1, "step": "x", "wall_s": 1, "productive_s": 1}')
    assert Attempts(tmp_path, start()).begin(0, 0.0) == 0
