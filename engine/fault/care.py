"""What a run is looked after with, made once and handed to the loop as one thing."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from configs.schema import Config
from engine.fault.agreement import StopAgreement
from engine.fault.attempts import Attempts, Start
from engine.fault.guard import Guard
from engine.fault.heartbeat import Heart
from engine.fault.inject import Injector
from engine.fault.record import FaultLog
from engine.fault.sentinel import Sentinel
from engine.fault.stop import STOP_FILE, StopRequests
from engine.folder import RunFolder
from parallel.mesh import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Care:
    """The parts of engine/fault that a run keeps."""

    start: Start
    requests: StopRequests
    group: dist.ProcessGroup | None
    """A gloo group of its own, for what ranks tell each other about faults; None in a single process."""
    agreement: StopAgreement
    attempts: Attempts | None
    """On rank 0 only."""
    log: FaultLog
    sentinel: Sentinel
    heart: Heart
    guard: Guard
    injector: Injector

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must know, as JSON; waits for the device."""
        return {"guard": self.guard.state()}

    def load(self, meta: dict[str, Any]) -> None:
        """Take up what a checkpoint knows."""
        self.guard.load(meta["guard"])

    def close(self) -> None:
        """End what runs beside the training."""
        self.agreement.close()
        self.sentinel.close()
        if self.group is not None:
            dist.destroy_process_group(self.group)


def take_care(
    config: Config, layout: Layout, folder: RunFolder, start: Start, requests: StopRequests, say: Callable[[str], None]
) -> Care:
    """Make all of it; collective over the ranks. `say` tells the user something, on every rank."""
    fault = config.fault
    group: Any = dist.new_group(backend="gloo") if layout.world_size > 1 else None
    attempts = Attempts(folder.path, start) if layout.rank == 0 else None
    sentinel = Sentinel()
    if attempts is not None:
        sentinel.every(1.0, lambda: folder.stop.exists() and requests.note(STOP_FILE))
        sentinel.every(1.0, attempts.write_progress)
    log = FaultLog(folder.faults, layout.rank, say, attempts.number if attempts is not None else 0)
    return Care(
        start=start,
        requests=requests,
        group=group,
        agreement=StopAgreement(requests, group, fault.time_limit_s),
        attempts=attempts,
        log=log,
        sentinel=sentinel,
        heart=Heart(),
        guard=Guard(fault, len(config.adapter.members), layout.device),
        injector=Injector(fault.inject),
    )
