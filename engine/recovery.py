"""What a run does about bad steps: it says which ones were skipped, and goes back when there are too many in a row.

The guard (engine/fault/guard.py) has decided on the device; here the host acts on what it read, the same on every rank.
A run goes back to the newest checkpoint from before the bad steps, leaves out the batches that they learned from, and
goes on; what was saved among them is deleted first, so that a run that is killed in between does the same again.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict

from configs.errors import NonFiniteError, problem
from engine.checkpoint.manifest import list_steps, step_folder
from engine.counters import whose
from engine.fault.guard import Skipped
from engine.fault.record import Fault
from engine.run import Run


def tell_skipped(run: Run, skipped: Sequence[Skipped]) -> None:
    """Say and record each; rank 0 does, and all ranks know the same."""
    if run.layout.rank > 0 or not skipped:
        return
    saved = list_steps(run.folder.checkpoints)
    size = run.config.data.global_batch_size
    for one in skipped:
        batch = run.care.rollbacks.batch_of(one.step)
        before = next((step for step in saved if step < one.step), None)
        unsaid = f" ({one.forgotten} more were skipped before it)" if one.forgotten else ""
        run.care.log.take(
            Fault(
                kind=one.kind,
                what=_values(run, one) + unsaid,
                did="The update was not applied",
                rank=one.rank,
                step=one.step,
                attempt=run.care.log.attempt,
                more={
                    "loss": _number(one.loss),
                    "grad_norm": _number(one.grad_norm),
                    "member": _member(run, one),
                    "batch": batch,
                    "sequences": [batch * size, (batch + 1) * size - 1],
                    "checkpoint": step_folder(before) if before is not None else "",
                },
            )
        )


def go_back(run: Run) -> None:
    """Return to the newest checkpoint from before the bad steps; NonFiniteError where that is not to be. Collective."""
    care, fault, trips = run.care, run.config.fault, run.care.guard.trips
    first, last = min(trip.first for trip in trips), max(trip.last.step for trip in trips)
    care.heart.beat(run.step, "checkpoint")
    if run.config.adapter.members:
        raise _ended(run, "a run of several members doesn't go back, for the others would lose steps")
    if not fault.rollback_limit:
        raise _ended(run, "fault.rollback_limit = 0")
    found = run.checkpointer.find_latest(before=first)
    if found is None:
        raise _ended(run, f"no checkpoint is from before step {first}")
    if care.rollbacks.in_a_row(found.step) >= fault.rollback_limit:
        raise _ended(run, f"gone back fault.rollback_limit = {fault.rollback_limit} times in a row already")
    run.checkpointer.discard_after(found.step)
    bad = care.rollbacks.batch_of(first)
    one = care.rollbacks.add(found.step, first, last)
    run.checkpointer.ranks.lead(care.rollbacks.write)
    if run.layout.rank == 0:
        care.log.take(
            Fault(
                kind="roll_back",
                what=f"{_steps(first, last)} bad, and fault.skip_limit = {fault.skip_limit}",
                did=f"Went back to {found.path.name}, and on without the data of batches {bad} to {one.batch - 1}",
                step=last,
                attempt=care.log.attempt,
                more={**asdict(one), "refused": found.refused},
            )
        )
    run.rewind(found)


def compare_replicas(run: Run) -> None:
    """Compare what several ranks hold; ReplicaError, on all of them, where it isn't the same. Collective."""
    care = run.care
    if care.replicas.checked_step == run.step:
        return
    drifts = care.replicas.compare(run.model, run.optimizer, run.step)
    if not drifts:
        return
    first = drifts[0]
    error = first.error(run.step, care.replicas.checked_step, len(drifts) - 1)
    if run.layout.rank == 0:
        more = {"drifted": [asdict(one) for one in drifts], "checked_step": care.replicas.checked_step}
        alone = len(first.ranks) == 1
        care.log.take(
            Fault(
                kind="replica_drift",
                what=str(error),
                did="The run ended; nothing was saved of it",
                rank=first.ranks[0] if alone else None,
                host=first.hosts[0] if alone else "",
                step=run.step,
                attempt=care.log.attempt,
                more=more,
            ),
            said=False,
        )
    raise error


def _ended(run: Run, why: str) -> NonFiniteError:
    """Record that the run ends, and make the error that says so."""
    trips, fault = run.care.guard.trips, run.config.fault
    first = min(trip.first for trip in trips)
    last = max((trip.last for trip in trips), key=lambda one: one.step)
    what = f"{_steps(first, last.step)}: " + "; ".join(_values(run, trip.last) for trip in trips)
    if run.layout.rank == 0:
        attempt, did = run.care.log.attempt, f"The run ended: {why}"
        run.care.log.take(Fault(kind=last.kind, what=what, did=did, step=last.step, attempt=attempt), said=False)
    spike = f"must lie within {fault.spike_threshold:g} robust deviations above the median of the last good steps"
    do = (
        "The same command would come to the same step: lower optim.lr or lengthen lr.warmup_steps under another "
        "--run.name, or look at the data of these steps."
    )
    why = f"no update of theirs was applied; {why}"
    return NonFiniteError(problem(what, "", "must be finite" if last.kind == "non_finite" else spike, why, do))


def _steps(first: int, last: int) -> str:
    return f"step {first}" if first == last else f"steps {first} to {last}"


def _values(run: Run, one: Skipped) -> str:
    return f"{whose(_member(run, one))}loss {one.loss}, grad_norm {one.grad_norm}"


def _member(run: Run, one: Skipped) -> str:
    members = run.config.adapter.members
    return members[one.member].name if members else ""


def _number(value: float) -> float | str:
    """JSON has no word for what is not finite."""
    return value if math.isfinite(value) else str(value)
