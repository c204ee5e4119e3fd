"""What ranks tell each other on the CPU: JSON, over a gloo group of its own where a checkpoint is saved beside a step.

Its group is apart from the run's, so that a save in the background never meets a collective of the step. Messages are
JSON and not pickles. What only rank 0 does, it does in `lead`, so that its failure is the same CheckpointError on every
rank: without that, one rank would raise and the others would wait for it. Without a process group one rank talks to
itself.
"""

import datetime
import json
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from configs.errors import CheckpointError, RunError

T = TypeVar("T")
LOST_RANK = "another rank is gone or silent"


class Ranks:
    """This rank, the number of ranks and their group; making one is collective over all ranks of the run."""

    def __init__(self, timeout_s: float) -> None:
        """Create the group when torch.distributed is initialised."""
        self.group: Any = None
        self.index, self.size = 0, 1
        if dist.is_available() and dist.is_initialized():
            limit = datetime.timedelta(seconds=timeout_s)
            self.group = dist.new_group(backend="gloo", timeout=limit)
            self.index, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        else:  # DCP says so at every save and load
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

    def close(self) -> None:
        """Destroy the group."""
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)
        self.group = None

    def exchange(self, value: Any) -> list[Any]:
        """Return the JSON-able values of all ranks, in rank order."""
        return [value] if self.group is None else gather_json(value, self.group)

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's JSON-able value."""
        if self.group is None:
            return value
        data = _pack(value) if self.index == 0 else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([data.numel()])
        dist.broadcast(size, group_src=0, group=self.group)
        if self.index != 0:
            data = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, group_src=0, group=self.group)
        return _unpack(data)

    def lead(self, work: Callable[[], T]) -> T:
        """Do `work` on rank 0 and return its JSON-able result; raise a CheckpointError on all ranks when it failed."""
        result, error = None, ""
        if self.index == 0:
            try:
                result = work()
            except (Exception, CheckpointException) as failure:
                error = describe(failure)
        answer = self.broadcast({"error": error, "result": result})
        if answer["error"]:
            raise CheckpointError(answer["error"])
        return answer["result"]


def rank_0_first(
    work: Callable[[], object], every_s: float, beat: Callable[[], object], is_overdue: Callable[[], bool]
) -> None:
    """Do `work` on rank 0, however long it takes, while the other ranks wait; collective over the run's ranks.

    Rank 0 lets them know every so many seconds that it is still there, which is less than their group's time-out, and
    they call `beat` each time. Once rank 0 `is_overdue` it tells them nothing more, and they run into that time-out.
    What `work` raises ends this rank, and the others find that it is gone.
    """
    if dist.get_world_size() == 1:
        work()
        return
    if dist.get_rank() > 0:
        going = torch.ones(1)
        while going:
            dist.broadcast(going, src=0)
            beat()
        return
    done = threading.Event()

    def tell() -> None:
        with suppress(RuntimeError):  # a rank is gone, as the last word below finds out
            while not done.wait(every_s) and not is_overdue():
                dist.broadcast(torch.ones(1), src=0)

    thread = threading.Thread(target=tell, name="rank-0-first", daemon=True)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    dist.broadcast(torch.zeros(1), src=0)


def gather_json(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Return the JSON-able values of the ranks of a group, in rank order; None is the group of all ranks."""
    data, size = _pack(value), dist.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(sizes, torch.tensor([data.numel()]), group=group)
    longest = max(int(size) for size in sizes)
    padded = torch.cat([data, data.new_zeros(longest - data.numel())])
    boxes = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(boxes, padded, group=group)
    return [_unpack(box[: int(size)]) for box, size in zip(boxes, sizes, strict=True)]


def describe(error: BaseException) -> str:
    """Return the text of an error for a user; of DCP's collected errors the first rank's that failed."""
    if isinstance(error, CheckpointException):
        rank, cause = min(error.failures.items())
        inner = cause[0] if isinstance(cause, tuple) else cause
        return f"rank {rank}: {describe(inner)}"
    if isinstance(error, RunError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename or 'file system'}: {error.strerror} (errno {error.errno})"
    if isinstance(error, RuntimeError) and "/gloo/" in str(error):
        return f"{LOST_RANK} ({str(error).partition('] ')[2].partition('. ')[0]})"
    return f"{type(error).__name__}: {error}"


def _pack(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _unpack(data: torch.Tensor) -> Any:
    return json.loads(data.numpy().tobytes())
