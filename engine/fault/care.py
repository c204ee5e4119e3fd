"""What a run is looked after with, made once and handed to the loop as one thing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from configs.errors import CheckpointError, RunError
from configs.schema import Config
from engine.fault.agreement import StopAgreement
from engine.fault.attempts import Attempts, Start
from engine.fault.guard import Guard
from engine.fault.heartbeat import ANSWER_S, Heart
from engine.fault.inject import Injector
from engine.fault.record import Fault, FaultLog
from engine.fault.replicas import Replicas
from engine.fault.rollback import RollBacks
from engine.fault.sentinel import Sentinel
from engine.fault.stop import STOP_FILE, StopRequests
from engine.fault.stragglers import SAMPLE_S, Stragglers
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
    stragglers: Stragglers
    guard: Guard
    rollbacks: RollBacks
    replicas: Replicas
    injector: Injector

    @contextmanager
    def until_built(self) -> Iterator[None]:
        """Have what ends the run before its first step in the records, by rank 0."""
        try:
            yield
        except BaseException as error:
            if self.attempts is not None:
                if isinstance(error, RunError) and not self.log.taken:
                    self.log.own("refused", str(error).rstrip("."), "The run did not start", said=False)
                if self.attempts.begun:
                    self.attempts.end(f"error: {error}")
            raise

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must know, as JSON; waits for the device."""
        return {"guard": self.guard.state(), "rollbacks": self.rollbacks.state()}

    def load(self, meta: dict[str, Any], step: int) -> None:
        """Take up what the checkpoint of a step knows; one from before there was a guard knows nothing of it."""
        self.guard.load(meta.get("guard", {}), step)
        self.replicas.checked_step = step

    def save_failed(self, step: int, error: CheckpointError, in_a_row: int, ends_run: bool) -> None:
        """Tell of a save that failed, on rank 0; all ranks learn of it."""
        if self.log.rank == 0:
            did = "The run ends" if ends_run else f"Tried again at the next due step ({in_a_row} failed in a row)"
            do = "Make room, or mend the disk; the same command continues the run."
            more = {"in_a_row": in_a_row}
            self.log.take(
                Fault(
                    kind="save_failed", what=str(error), did=did, do=do, step=step, attempt=self.log.attempt, more=more
                )
            )

    def close(self) -> None:
        """End what runs beside the training."""
        self.agreement.close()
        self.sentinel.close()
        if self.group is not None:
            dist.destroy_process_group(self.group)


def take_care(
    config: Config,
    layout: Layout,
    folder: RunFolder,
    start: Start,
    requests: StopRequests,
    tell: Callable[[str], None],
    heart: Heart,
) -> Care:
    """Make all of it; collective over the ranks. `tell` tells the user of a fault, on every rank."""
    fault = config.fault
    group: Any = dist.new_group(backend="gloo") if layout.world_size > 1 else None
    attempts = Attempts(folder.path, start) if layout.rank == 0 else None
    sentinel = Sentinel()
    if attempts is not None:
        sentinel.every(1.0, lambda: folder.stop.is_file() and requests.note(STOP_FILE))
        sentinel.every(1.0, attempts.write_progress)
    number = torch.tensor([attempts.number if attempts is not None else 0])
    if group is not None:
        dist.broadcast(number, group_src=0, group=group)
    log = FaultLog(folder.faults, layout.rank, tell, int(number), start.redact)
    stragglers = Stragglers(fault, layout.index("pp"), group, heart, log)
    if group is not None:
        sentinel.every(SAMPLE_S, stragglers.sample)
    sentinel.every(ANSWER_S, heart.answer_if_asked)
    sentinel.every(1.0, lambda: _see_to_watchdog(heart, log))
    ends_at = start.began + fault.time_limit_s if fault.time_limit_s else None
    return Care(
        start=start,
        requests=requests,
        group=group,
        agreement=StopAgreement(requests, group, ends_at),
        attempts=attempts,
        log=log,
        sentinel=sentinel,
        heart=heart,
        stragglers=stragglers,
        guard=Guard(fault, len(config.adapter.members), layout.device),
        rollbacks=RollBacks(folder.rollbacks),
        replicas=Replicas(group),
        injector=Injector(config, layout, folder),
    )


def _see_to_watchdog(heart: Heart, log: FaultLog) -> None:
    did = heart.revive_watchdog()
    if did:
        log.own("watchdog_lost", "the watchdog's process is gone, and its ranks are not", did)
