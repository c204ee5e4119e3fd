"""Who is behind when a run hangs: what is known of each rank, written as JSON, and the verdict over all of them.

    stacks/BEGAN/rank-00003.txt    every thread of a rank, by faulthandler
    stacks/BEGAN/rank-00003.json   its last collectives, by torch's flight recorder; missing where it didn't answer
    stacks/BEGAN/node-00002.json   what a node's watchdog found, by the first rank of the node
    stacks/BEGAN/verdict.json      written last

Ranks wait for each other, so that all of a hung run are silent; the cause is the one that has come less far.
"""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.fault.heartbeat import PHASES, Beat
from engine.fault.record import Fault
from engine.fault.stacks import describe, main_thread, passes_on, waits_for_ranks

_DOING = {
    "start": "starting",
    "build": "building the run",
    "data": "getting the data of step {}",
    "step": "in step {}",
    "record": "in the record of step {}",
    "evaluate": "in the evaluation after step {}",
    "checkpoint": "in the checkpoint after step {}",
    "end": "leaving after step {}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What is known of one rank of a hung run."""

    rank: int
    host: str
    step: int
    phase: str
    silent_s: float
    allowed_s: float
    stopped: bool
    """By SIGSTOP or a debugger."""
    place: str
    """Where its main thread stands, or has run on to where it was stopped and woken; empty where it didn't answer."""
    waits: bool
    """The main thread waits for other ranks."""
    num_collectives: int
    """Collectives begun, over all groups; -1 where the process didn't answer."""
    last_collective: str

    @property
    def progress(self) -> tuple[int, int, bool, int]:
        """What ranks are compared by: the least is behind."""
        return (self.step, PHASES.index(self.phase), self.waits, self.num_collectives)


@dataclass(frozen=True, slots=True)
class Evidence:
    """A finding with what it was made of."""

    finding: Finding
    stacks: str
    collectives: dict[str, Any]


def examine(
    rank: int, host: str, beat: Beat, silent_s: float, *, stopped: bool, stacks: str, collectives: dict[str, Any]
) -> Evidence:
    """Say what a rank's last beat, stacks and collectives mean."""
    places = main_thread(stacks)
    said = [place for place in places if not passes_on(place.file)]
    recorded = [entry for recorder in collectives.values() for entry in recorder.get("entries", [])]
    last = max(recorded, key=lambda entry: entry["time_created_ns"], default=None)
    name = "" if last is None else f"{last['profiling_name']} number {last['collective_seq_id']}"
    begun = [
        int(group["last_enqueued_collective"])
        for recorder in collectives.values()
        for group in recorder.get("pg_status", {}).values()
    ]
    finding = Finding(
        rank=rank,
        host=host,
        step=beat.step,
        phase=beat.phase,
        silent_s=round(silent_s, 3),
        allowed_s=beat.allowed_s,
        stopped=stopped,
        place=describe(places),
        waits=any(waits_for_ranks(place.file, place.line) for place in said[:1]),
        num_collectives=sum(max(0, count) for count in begun) if collectives else -1,
        last_collective=name and f"{name} ({'done' if last and last['retired'] else 'not done'})",
    )
    return Evidence(finding, stacks, collectives)


def behind(findings: Sequence[Finding]) -> list[Finding]:
    """Return the ranks that are stopped, or else have come less far than others; none where all stand at one point."""
    stopped = [finding for finding in findings if finding.stopped]
    least = min(finding.progress for finding in findings)
    found = stopped or [finding for finding in findings if finding.progress == least]
    return found if stopped or len(found) < len(findings) or len(findings) == 1 else []


def hang_fault(findings: Sequence[Finding], folder: str) -> Fault:
    """Say in one line who is behind and where it stands."""
    late = behind(findings)
    first = late[0] if late else min(findings, key=lambda finding: finding.rank)
    what = f"no step for {first.silent_s:.0f} s, {first.allowed_s:.0f} s are allowed"
    if not late:
        what += f": all ranks stand at the same point, {first.place}, so it may be the network"
    else:
        are = "are" if late[1:] else "is"
        what += f": {ranks_named([one.rank for one in late])} {are} behind, {_state(late, findings)}"
    if first.last_collective:
        what += f"; its last collective: {first.last_collective}"
    return Fault(
        kind="hang",
        what=what,
        did=f"The job was ended; {folder} has the stacks and the last collectives of the ranks",
        do="The same command continues from the last checkpoint. If steps may take so long, raise fault.hang_min_s, "
        "fault.step_timeout_s or fault.first_step_timeout_s",
        rank=first.rank if late else None,
        host=first.host if late else "",
        step=first.step,
        more={"ranks": [one.rank for one in late], "phase": first.phase, "silent_s": first.silent_s,
              "place": first.place, "last_collective": first.last_collective, "folder": folder},
    )  # fmt: skip


def ranks_named(ranks: Sequence[int]) -> str:
    """Name ranks in a sentence: rank 3; ranks 0, 2 and 3."""
    *others, last = sorted(ranks)
    return f"ranks {', '.join(map(str, others))} and {last}" if others else f"rank {last}"


def _state(late: Sequence[Finding], findings: Sequence[Finding]) -> str:
    first, several = late[0], len(late) > 1
    if first.stopped:
        # It was woken for its stacks, and they tell where it was a moment later.
        near = f" near {first.place}" if first.place else ""
        if not several:
            return f"its process is stopped (SIGSTOP, or a debugger){near}"
        return "their processes are stopped (SIGSTOP, or a debugger)" + (near and f", rank {first.rank}{near}")
    if not first.place:
        return "and their processes answer nothing" if several else "and its process answers nothing"
    doing = f"{_DOING[first.phase].format(first.step)} at {first.place}"
    if not first.waits and any(other.waits for other in findings):
        return f"{doing}, while others wait for {'them' if several else 'it'}"
    return doing


def write_evidence(folder: Path, node: int, evidence: Sequence[Evidence]) -> None:
    """Write what a node's watchdog has found; what the disk doesn't take is left out."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        for one in evidence:
            name = f"rank-{one.finding.rank:05d}"
            (folder / f"{name}.txt").write_text(one.stacks)
            if one.collectives:
                (folder / f"{name}.json").write_text(json.dumps(one.collectives) + "\n")
        temporary = folder / f".node-{node:05d}.tmp"
        temporary.write_text(json.dumps([asdict(one.finding) for one in evidence]) + "\n")
        os.replace(temporary, folder / f"node-{node:05d}.json")


def read_findings(folder: Path) -> dict[int, list[Finding]]:
    """Read what the nodes have found so far, by the first rank of each."""
    found = {}
    with suppress(OSError, ValueError, TypeError):
        for path in sorted(folder.glob("node-*.json")):
            found[int(path.stem.removeprefix("node-"))] = [Finding(**one) for one in json.loads(path.read_text())]
    return found
