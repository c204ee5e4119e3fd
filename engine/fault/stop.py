"""One way to stop: signals, a stop file and a time limit become a number, which engine/fault/agreement.py agrees on.

A rank that is asked to stop only notes it. Imported before torch is, so that no signal comes too early.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_FILE, TIME_LIMIT = 1, 2
"""Codes of the reasons that are no signals; a signal's code is SIGNALS_FROM and its number."""
SIGNALS_FROM = 100
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
INTERRUPT = SIGNALS_FROM + signal.SIGINT


def reason_text(code: int) -> str:
    """Name a reason as a user would."""
    if code >= SIGNALS_FROM:
        return signal.Signals(code - SIGNALS_FROM).name
    return {STOP_FILE: "the stop file", TIME_LIMIT: "fault.time_limit_s"}[code]


class StopRequests:
    """What this rank was asked; a signal handler or another thread may note a request at any time."""

    def __init__(self) -> None:
        """Start without a request."""
        self.code = 0
        self.interrupted = False
        """Ctrl-C ended something by KeyboardInterrupt; who catches every exception, as DCP does, hides it."""
        self._training = False
        self._asked_kindly = False

    def note(self, code: int) -> None:
        """Take a request; the largest stays, so that repeated signals change nothing."""
        self.code = max(self.code, code)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Note signals in this block. One that is ignored, as in the background of a script, stays ignored."""
        before = {signum: signal.getsignal(signum) for signum in (*SIGNALS, signal.SIGINT)}
        for signum in SIGNALS:
            signal.signal(signum, self._on_signal)
        if before[signal.SIGINT] is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._on_interrupt)
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Let the first Ctrl-C in this block be a request like the others; elsewhere there is nothing to save."""
        self._training = True
        try:
            yield
        finally:
            self._training = False

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.note(SIGNALS_FROM + signum)

    def _on_interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self._training and not self._asked_kindly:
            self._asked_kindly = True
            self.note(INTERRUPT)
            return
        self.interrupted = True
        raise KeyboardInterrupt
