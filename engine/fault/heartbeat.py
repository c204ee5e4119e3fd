"""A rank's heartbeat: where it is and until when it must have come further, in memory that another process can read.

The memory is a file without a name (memfd) of 8-byte words, so that nothing is left behind however a rank ends, and a
beat is five stores. A word is written and read whole; a beat is, because it is written beside the one before it and
counts with the last store. Imports no torch: the watchdog's process starts in the time that Python takes. The patience
with a step is learned from the steps before it.
"""

import mmap
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from configs.faults import FaultConfig

Phase = Literal["start", "build", "data", "step", "record", "evaluate", "checkpoint", "end"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""In the order in which a rank passes through them."""
_PATIENT = ("build", "checkpoint", "end")
"""A slow disk is no silent rank."""
_UNWATCHED = ("start",)
"""Preparing a store takes as long as it takes."""
LEARNED_STEPS = 32
ANSWER_S = 0.25
"""How often a rank looks whether the watchdog asks something."""
SIZE = mmap.PAGESIZE
_BEATS, _GONE, _ASKED, _ANSWERED = range(4)
_SLOTS = (4, 8)
"""Where a beat of an even number is, and one of an odd number."""
_STEP, _PHASE, _AT, _ALLOWED = range(4)
"""The words of a beat."""


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank last said."""

    step: int
    phase: Phase
    at: float
    """time.monotonic() of it, which all processes of a host share."""
    allowed_s: float
    """How long the rank may be silent after it."""
    gone: bool
    """The rank has left in order, and what becomes of its process is no fault."""


class Heart:
    """Where this rank is; it says so itself."""

    def __init__(self, fault: FaultConfig, file: int = -1, clock: Callable[[], float] = time.monotonic) -> None:
        """Beat into the file with this descriptor; without one, for this process alone."""
        self._fault, self._clock = fault, clock
        self.pulse = Pulse(file)
        self.step, self.phase = 0, PHASES[0]
        self._known: set[str] = set()
        """Phases that were gone through once: what they compile is compiled."""
        self._laps: deque[float] = deque(maxlen=LEARNED_STEPS)
        self._learned_s = float(fault.step_timeout_s)
        self._lap_began = self._lap_apart = 0.0
        self.beat(0, "start")

    def beat(self, step: int, phase: Phase) -> None:
        """Say that this rank is now in `phase` of a step; microseconds."""
        now = self._clock()
        if self.phase != phase:
            self._known.add(self.phase)
        if self.phase in ("evaluate", "checkpoint"):
            self._lap_apart += now - self.pulse.read().at
        if phase == "data":
            if "step" in self._known:
                self._learn(now - self._lap_began - self._lap_apart)
            self._lap_began, self._lap_apart = now, 0.0
        self.step, self.phase = step, phase
        self.pulse.write(step, phase, now, self._allowed_s(phase))

    def is_overdue(self) -> bool:
        """Tell whether the last beat is older than was allowed; any thread may ask."""
        beat = self.pulse.read()
        return self._clock() - beat.at > beat.allowed_s

    def leave(self) -> None:
        """Say that whatever happens to this process from here on is in order."""
        self.pulse.say_goodbye()

    def answer_if_asked(self) -> None:
        """Answer the watchdog's question; without one, nobody asks."""

    def revive_watchdog(self) -> str:
        """Start the watchdog again where it is gone; return what was done then, else nothing."""
        return ""

    def _learn(self, lap_s: float) -> None:
        fault = self._fault
        self._laps.append(lap_s)
        # On a GPU the loop runs ahead and a logged step waits for a few: far fewer than hang_factor.
        longest = max(fault.hang_min_s, fault.hang_factor * statistics.median(self._laps))
        self._learned_s = min(float(fault.step_timeout_s), longest)

    def _allowed_s(self, phase: Phase) -> float:
        if phase in _UNWATCHED:
            return float("inf")
        if phase in _PATIENT or phase not in self._known:
            return float(self._fault.first_step_timeout_s)
        return self._learned_s


class Pulse:
    """The memory of a heart, in the rank's own process or in the watchdog's."""

    def __init__(self, file: int) -> None:
        """Map the file with this descriptor; -1 is memory of this process."""
        memory = memoryview(mmap.mmap(file, SIZE))
        self._numbers, self._times = memory.cast("q"), memory.cast("d")

    def write(self, step: int, phase: Phase, at: float, allowed_s: float) -> None:
        """Write a beat, beside the last one, which stays whole until this one is."""
        number = self._numbers[_BEATS] + 1
        slot = _SLOTS[number % 2]
        self._times[slot + _AT], self._times[slot + _ALLOWED] = at, allowed_s
        self._numbers[slot + _STEP], self._numbers[slot + _PHASE] = step, PHASES.index(phase)
        self._numbers[_BEATS] = number

    def read(self) -> Beat:
        """Read the last beat; never half of one and half of another."""
        numbers, times = self._numbers, self._times
        while True:
            number = numbers[_BEATS]
            slot = _SLOTS[number % 2]
            step, phase = numbers[slot + _STEP], PHASES[numbers[slot + _PHASE]]
            beat = Beat(step, phase, times[slot + _AT], times[slot + _ALLOWED], bool(numbers[_GONE]))
            if numbers[_BEATS] == number:  # else the next but one may have been written over it
                return beat

    def say_goodbye(self) -> None:
        """Write that the rank leaves in order."""
        self._numbers[_GONE] = 1

    def ask(self) -> None:
        """Put a question to the rank: what has it told the others lately?"""
        self._numbers[_ASKED] += 1

    def open_question(self) -> int:
        """Return the number of the question that has no answer yet, or 0."""
        asked = self._numbers[_ASKED]
        return asked if asked != self._numbers[_ANSWERED] else 0

    def answer(self, question: int) -> None:
        """Write that a question is answered."""
        self._numbers[_ANSWERED] = question
