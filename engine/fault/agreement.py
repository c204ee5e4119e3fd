"""All ranks stop after the same step: what each was asked becomes one number that they agree on.

After each step the ranks take the largest request of all, by a reduction in the background that is read one step later:
no step waits for it, and all ranks leave the loop at the same step.
"""

import time

import torch
import torch.distributed as dist

from engine.fault.stop import TIME_LIMIT, StopRequests


class StopAgreement:
    """Finds, after each step, whether any rank was asked to stop; every method is collective."""

    def __init__(self, requests: StopRequests, group: dist.ProcessGroup | None, ends_at: float | None = None) -> None:
        """Agree in `group`, a gloo group of its own; None is a single process. `ends_at` is on time.monotonic()."""
        self._requests, self._group, self._ends_at = requests, group, ends_at
        self._pending: tuple[torch.Tensor, dist.Work] | None = None
        self._code = 0

    def now(self) -> int:
        """Return the code that all ranks agree on, at once; 0 goes on."""
        self._settle()
        self._start()
        return self._settle()

    def after_step(self) -> int:
        """Return what was agreed on as of the step before this one, and start to agree on this one."""
        code = self._settle()
        self._start()
        return code if self._group is not None else self._settle()

    def close(self) -> None:
        """Wait for what is under way."""
        self._settle()

    def _start(self) -> None:
        if self._ends_at is not None and time.monotonic() >= self._ends_at:
            self._requests.note(TIME_LIMIT)
        code = torch.tensor([self._requests.code])
        if self._group is None:
            self._code = int(code)
            return
        work = dist.all_reduce(code, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None, "an asynchronous reduction gives its work"
        self._pending = (code, work)

    def _settle(self) -> int:
        if self._group is None:
            return self._code
        if self._pending is None:
            return 0
        code, work = self._pending
        self._pending = None
        work.wait()
        return int(code)
