"""Which rank is slower than those that do the same work, and in what: computing, or waiting for its data.

The sentinel's thread looks at the main thread every few milliseconds. Where that waits for other ranks, the time is
communication: all spend it on the slowest, so it accuses nobody. The rest of a step is the rank's own time, and a rank
whose own time is longer than that of its peers again and again is named. Stages of a pipeline have work of their own,
so peers are the ranks of one stage. On GPUs the main thread runs ahead of the device: there a slow host and slow data
are found, but not a slow device.
"""

import socket
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from configs.faults import FaultConfig
from engine.fault.heartbeat import Heart
from engine.fault.record import Fault, FaultLog
from engine.fault.stacks import passes_on, waits_for_ranks
from engine.ranks import gather_json

SAMPLE_S = 0.01
MIN_SAMPLES = 200
"""Samples of each rank before it is judged: chance moves the ratio of two ranks by a tenth."""
MIN_SHARE = 0.1
"""Of a step: what a rank must lose beside its peers to be worth a word."""
LONGEST_SAMPLE_S = 1.0
"""What the thread slept through beyond that belongs to no phase."""


@dataclass(frozen=True, slots=True)
class OwnTime:
    """How a rank spent its steps since it was last judged, seconds a step."""

    compute_s: float
    data_s: float
    communication_s: float

    @property
    def own_s(self) -> float:
        """What the others wait for."""
        return self.compute_s + self.data_s


class Stragglers:
    """Samples this rank, and compares it with its peers at logged steps."""

    def __init__(
        self, fault: FaultConfig, stage: int, group: dist.ProcessGroup | None, heart: Heart, log: FaultLog
    ) -> None:
        """Compare in `group`, with the ranks of the same pipeline stage; collective. The caller's thread is sampled."""
        self._fault, self._stage, self._group, self._heart, self._log = fault, stage, group, heart, log
        self._hosts = gather_json(socket.gethostname(), group) if group is not None else []
        self._thread = threading.get_ident()
        self._sums = [0.0, 0.0, 0.0]  # compute, data, communication
        self._samples = 0
        self._last_step: int | None = None
        self._sampled = time.monotonic()
        self._in_a_row = [0] * len(self._hosts)

    def sample(self) -> None:
        """Look at what the main thread is doing; the sentinel's thread calls it every SAMPLE_S."""
        now = time.monotonic()
        passed, self._sampled = min(now - self._sampled, LONGEST_SAMPLE_S), now
        phase = self._heart.phase
        if phase not in ("data", "step"):
            return
        kind = 1
        if phase == "step":
            frame = sys._current_frames().get(self._thread)
            while frame is not None and passes_on(frame.f_code.co_filename):
                frame = frame.f_back
            if frame is None:
                return
            kind = 2 if waits_for_ranks(frame.f_code.co_filename, frame.f_lineno or 0) else 0
        self._sums[kind] += passed
        self._samples += 1

    def after_logged_step(self, step: int) -> None:
        """Compare the ranks, once each has enough samples; collective, and the same decision on every rank."""
        if self._group is None:
            return
        begun, steps = self._last_step is not None, step - (self._last_step or 0)
        sums = [total / max(steps, 1) for total in self._sums]
        mine = torch.tensor([float(self._stage), float(self._samples), *sums], dtype=torch.float64)
        boxes = [torch.empty_like(mine) for _ in self._hosts]
        if begun:
            dist.all_gather(boxes, mine, group=self._group)
            every = [box.tolist() for box in boxes]
            if min(samples for _, samples, *_ in every) < MIN_SAMPLES:
                return
            self._judge(step, [int(values[0]) for values in every], [OwnTime(*values[2:]) for values in every])
        # What came before the first logged step of a start was compiling and warming up.
        self._sums, self._samples, self._last_step = [0.0, 0.0, 0.0], 0, step

    def _judge(self, step: int, stages: Sequence[int], times: Sequence[OwnTime]) -> None:
        """Count for how long each rank has been slow, and name it once."""
        for rank, time_of in enumerate(times):
            peers = [one for one, stage in zip(times, stages, strict=True) if stage == stages[rank]]
            slow = slowness(time_of, peers, self._fault.straggler_factor)
            self._in_a_row[rank] = self._in_a_row[rank] + 1 if slow else 0
            if slow and self._in_a_row[rank] == self._fault.straggler_windows and self._log.rank == 0:
                self._log.take(
                    Fault(
                        kind="straggler",
                        what=f"takes {slow.ratio:.1f} times as long as the median of its peers, in {slow.part}",
                        did="The run goes on, at its pace",
                        do="Look at that host: other programs, clock, temperature, disk",
                        rank=rank,
                        host=self._hosts[rank],
                        step=step,
                        attempt=self._log.attempt,
                        more={"ratio": slow.ratio, "part": slow.part, **asdict(time_of)},
                    )
                )


@dataclass(frozen=True, slots=True)
class Slowness:
    """How much slower a rank is than its peers, and in what."""

    ratio: float
    part: str


def slowness(rank: OwnTime, peers: Sequence[OwnTime], factor: float) -> Slowness | None:
    """Compare a rank's own time with the median of its peers, itself among them; of two peers that is the faster."""
    median_s = statistics.median_low(peer.own_s for peer in peers)
    excess_s = rank.own_s - median_s
    if excess_s <= (factor - 1) * median_s or excess_s < MIN_SHARE * (rank.own_s + rank.communication_s):
        return None
    data_s = rank.data_s - statistics.median_low(peer.data_s for peer in peers)
    return Slowness(rank.own_s / max(median_s, 1e-9), "data" if data_s > excess_s / 2 else "compute")
