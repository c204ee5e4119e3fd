"""The thread beside a rank's training: small work at fixed intervals that no step should wait for."""

import threading
import time
from collections.abc import Callable


class Sentinel:
    """Calls functions at their own intervals in one thread until closed; they must be quick and must not raise."""

    def __init__(self) -> None:
        """Make the thread; it starts with `start`."""
        self._duties: list[tuple[float, Callable[[], object]]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sentinel", daemon=True)

    def every(self, seconds: float, duty: Callable[[], object]) -> None:
        """Call `duty` every so many seconds; before `start` only."""
        self._duties.append((seconds, duty))

    def start(self) -> None:
        """Begin."""
        if self._duties:
            self._thread.start()

    def close(self) -> None:
        """End after the call under way."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        due = [time.monotonic() + seconds for seconds, _ in self._duties]
        while not self._done.wait(max(0.0, min(due) - time.monotonic())):
            for index, (seconds, duty) in enumerate(self._duties):
                if time.monotonic() >= due[index]:
                    duty()
                    due[index] = time.monotonic() + seconds
