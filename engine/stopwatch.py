"""The time between two logged steps, and what of it belongs to the steps themselves."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """What happened between two logged steps."""

    steps: int
    num_tokens: int
    wall_s: float
    excluded_s: float
    checkpoint_stall_s: float
    data_wait_s: float

    @property
    def step_s(self) -> float:
        """Seconds that belong to the steps themselves."""
        return max(self.wall_s - self.excluded_s - self.checkpoint_stall_s, 1e-9)


class Throughput:
    """A stopwatch over steps, with separate sums for waiting, for checkpoints and for what is no step at all."""

    def __init__(self, step: int, num_tokens: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """Start at `step` steps done and `num_tokens` target tokens seen."""
        self._clock = clock
        self._step, self._num_tokens = step, num_tokens
        self._began = self._made = clock()
        self._stalled_s = 0.0
        self._data_wait_s = self._excluded_s = self._checkpoint_stall_s = 0.0

    def add_data_wait(self, seconds: float) -> None:
        """Count seconds that a step spent waiting for its batch."""
        self._data_wait_s += seconds

    def data_wait_per_step(self, step: int) -> float:
        """Mean seconds a step has waited for its batch since the last lap, at `step` steps done."""
        return self._data_wait_s / max(step - self._step, 1)

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the block as waiting for a batch."""
        began = self._clock()
        try:
            yield
        finally:
            self._data_wait_s += self._clock() - began

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Leave the block out of step time and throughput."""
        began = self._clock()
        try:
            yield
        finally:
            self._excluded_s += self._clock() - began

    @contextmanager
    def checkpointing(self) -> Iterator[None]:
        """Count the block as a checkpoint's stall, outside of step time and throughput."""
        began = self._clock()
        try:
            yield
        finally:
            stall_s = self._clock() - began
            self._checkpoint_stall_s += stall_s
            self._stalled_s += stall_s

    def productive_s(self) -> float:
        """Seconds since it was made that steps and evaluations took: all but checkpoints' stalls."""
        return self._clock() - self._made - self._stalled_s

    def lap(self, step: int, num_tokens: int) -> Interval:
        """Return what happened since the last lap and start the next one."""
        assert step > self._step, f"a lap at step {step} needs at least one step since step {self._step}"
        now = self._clock()
        interval = Interval(
            steps=step - self._step,
            num_tokens=num_tokens - self._num_tokens,
            wall_s=now - self._began,
            excluded_s=self._excluded_s,
            checkpoint_stall_s=self._checkpoint_stall_s,
            data_wait_s=self._data_wait_s,
        )
        self._step, self._num_tokens, self._began = step, num_tokens, now
        self._data_wait_s = self._excluded_s = self._checkpoint_stall_s = 0.0
        return interval
