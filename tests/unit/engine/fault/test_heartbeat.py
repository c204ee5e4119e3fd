"""How long a rank may be silent: learned from its steps, patient with what is done for the first time."""

import os
import subprocess
import sys

from configs.faults import FaultConfig
from engine.fault.heartbeat import SIZE, Beat, Heart, Pulse
from tests.runs import until

FAULT = FaultConfig(first_step_timeout_s=1000, step_timeout_s=300, hang_min_s=10.0, hang_factor=5.0)


class Rank:
    """A heart with hands on its clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.heart = Heart(FAULT, clock=lambda: self.now)

    def step(self, number: int, seconds: float, *more: tuple[str, float]) -> None:
        """Take a step of a second for its data and so many seconds, and do more after it."""
        for phase, takes in (("data", 1.0), ("step", seconds), *more):
            self.heart.beat(number, phase)  # pyright: ignore[reportArgumentType]
            self.now += takes

    def allowed(self, number: int, phase: str) -> float:
        self.heart.beat(number, phase)  # pyright: ignore[reportArgumentType]
        return self.heart.pulse.read().allowed_s


def test_what_is_done_for_the_first_time_may_take_long() -> None:
    rank = Rank()
    assert rank.heart.pulse.read().allowed_s == float("inf")
    assert [rank.allowed(0, "build") for _ in range(3)] == [1000.0] * 3
    assert [rank.allowed(1, phase) for phase in ("data", "step", "record")] == [1000.0] * 3
    assert [rank.allowed(2, phase) for phase in ("data", "step", "evaluate", "evaluate")] == [
        10.0,
        10.0,
        1000.0,
        1000.0,
    ]
    assert rank.allowed(3, "data") == 10.0
    assert rank.allowed(3, "evaluate") == 10.0
    assert [rank.allowed(3, phase) for phase in ("checkpoint", "end")] == [1000.0] * 2


def test_patience_is_a_multiple_of_the_median_step_within_bounds() -> None:
    rank = Rank()
    rank.step(1, 900.0)
    for number in range(2, 9):
        rank.step(number, 3.0)
    assert rank.allowed(9, "data") == 5.0 * 4.0
    for number in range(9, 60):
        rank.step(number, 0.5)
    assert rank.allowed(60, "data") == 10.0
    for number in range(60, 120):
        rank.step(number, 90.0)
    assert rank.allowed(120, "data") == 300.0


def test_evaluations_and_saves_are_no_part_of_a_step() -> None:
    rank = Rank()
    for number in range(1, 40):
        rank.step(number, 3.0, ("record", 1.0), ("evaluate", 200.0), ("evaluate", 300.0), ("checkpoint", 400.0))
    assert rank.allowed(40, "data") == 5.0 * 5.0


def test_another_process_reads_the_beats_and_asks() -> None:
    """Through a second mapping of the same memory."""
    file = os.memfd_create("beats")
    os.ftruncate(file, SIZE)
    heart, seen = Heart(FAULT, file, clock=lambda: 7.0), Pulse(os.dup(file))
    heart.beat(12, "record")
    assert seen.read() == Beat(step=12, phase="record", at=7.0, allowed_s=1000.0, gone=False)
    seen.ask()
    assert heart.pulse.open_question() == 1
    heart.pulse.answer(1)
    assert seen.open_question() == 0
    heart.leave()
    assert seen.read().gone


def test_a_beat_counts_when_it_is_whole() -> None:
    """Somebody looks while it is being written."""
    file = os.memfd_create("beats")
    os.ftruncate(file, SIZE)
    pulse, seen, found = Pulse(file), Pulse(file), []

    class Looked:
        def __float__(self) -> float:
            found.append(seen.read())
            return 60.0

    pulse.write(5, "checkpoint", 100.0, 1800.0)
    pulse.write(6, "data", 300.0, Looked())  # pyright: ignore[reportArgumentType]
    assert found == [Beat(step=5, phase="checkpoint", at=100.0, allowed_s=1800.0, gone=False)]
    assert seen.read() == Beat(step=6, phase="data", at=300.0, allowed_s=60.0, gone=False)


def test_a_reader_sees_no_halves_of_two_beats() -> None:
    """Beside a process that beats as fast as it can."""
    file = os.memfd_create("beats")
    os.ftruncate(file, SIZE)
    seen = Pulse(file)
    code = f"""
from engine.fault.heartbeat import Pulse
pulse, number = Pulse({file}), 0
while True:
    number += 1
    pulse.write(number, "step", number, number)
"""
    with subprocess.Popen([sys.executable, "-c", code], pass_fds=[file]) as writer:
        try:
            while seen.read().step == 0:
                assert writer.poll() is None
            beats = [seen.read() for _ in range(4_000)]
            until(lambda: [beats.append(seen.read()), beats[-1].step != beats[0].step][1])
        finally:
            writer.kill()
    assert len({beat.step for beat in beats}) > 1
    assert [beat for beat in beats if not beat.step == beat.at == beat.allowed_s] == []


def test_who_is_silent_for_longer_than_allowed_is_overdue() -> None:
    rank = Rank()
    rank.now += 1e9
    assert not rank.heart.is_overdue(), "a start takes as long as it takes"
    rank.heart.beat(0, "build")
    rank.now += 999.0
    assert not rank.heart.is_overdue()
    rank.now += 2.0
    assert rank.heart.is_overdue()
