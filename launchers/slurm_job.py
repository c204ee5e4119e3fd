"""What runs inside an allocation: one `SlurmJob` a task, which starts the ranks of its node (or its one rank).

submitit pickles a SlurmJob at submission and calls it in every task. The tasks meet in the job's folder
(launchers/meeting.py), then each starts torchrun with a static rendezvous on the first node. Ranks are restarted by
SLURM as a whole job, never by torchrun on a node that may be the broken one. Signals are for the ranks, which save and
leave; here they are noted, and handed on where SLURM reaches only this process. When the ranks are gone the first task
decides whether the job is queued again (launchers/requeue.py). Resuming is not done here: the same command continues
from the last committed checkpoint. Source of the behaviour of signals: submitit/core/job_environment.py.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import submitit
from submitit.helpers import DelayedSubmission

from configs.errors import RunError
from engine.fault.record import Fault, append_fault
from engine.fault.stop import SIGNALS
from launchers.env import (
    LOOPBACK_ADDRESS,
    RANK_VARIABLES,
    RENDEZVOUS_VARIABLES,
    Launch,
    environment_of,
    port_of,
    threads_per_rank,
    usable_cores,
)
from launchers.meeting import Presence
from launchers.requeue import Ending, History, Limits, Standing, Verdict, ask_slurm, judge, names

STOP_LIMIT_S = 30
BEAT_S = 1.0
"""How often a task shows that it is there, and sees what it was signalled."""
HAND_ON_S = 5.0
"""How often a signal is handed on: a rank that is just starting has not heard the first."""
SHUTDOWN_LIMIT_S = "10"
"""Seconds that torchrun gives the ranks of its node to end once one of them has failed; they can't save any more."""


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """A run, ready to start in any task of an allocation."""

    script: str
    """Python script of a rank; launchers/train.py."""
    arguments: tuple[str, ...]
    """Its arguments: config and overrides."""
    ranks_per_node: int
    """Ranks on each node."""
    tasks_per: Literal["node", "gpu"]
    """node: a task starts torchrun, which starts the node's ranks. gpu: a task starts one rank."""
    folder: str
    """Working folder; relative paths in the config mean what they meant at submission."""
    run_folder: str
    """The run's own folder, where its attempts and checkpoints are."""
    limits: Limits
    """When the job is not queued again."""
    meeting_limit_s: float
    """How long the nodes wait for each other."""
    local: bool = False
    """Under submitit's local executor, which reads the code that the task returns; SLURM reads that of the process."""

    def __call__(self) -> int:
        """Start the ranks, wait for them and give (or, under SLURM, exit with) the job's code."""
        job, began = submitit.JobEnvironment(), time.monotonic()
        signals: list[tuple[int, float]] = []
        for signum in {*SIGNALS, job._usr_sig()}:
            signal.signal(signum, lambda signum, frame: signals.append((signum, time.monotonic() - began)))
        signal.signal(signal.SIGCONT, signal.SIG_IGN)  # SLURM sends it before each of the others
        history = History(Path(self.run_folder), job.paths.folder)
        restarts = int(os.environ.get("SLURM_RESTART_COUNT") or history.num_requeues())
        attempt, began_at = history.last_attempt() + 1, history.newest_step()
        presence = Presence(job.paths.folder / f"rendezvous-{restarts}", job.hostnames, job.node)
        try:
            command, variables, place = self.start_of(job, restarts, presence)
        except RunError as error:
            print(f"error: {error}", flush=True)
            self._record(job, "rendezvous", str(error), "the job failed", attempt)
            return self._leave(1)
        print(f"attempt {attempt}: {_where(job, restarts)}, {place}", flush=True)
        stale = (*RANK_VARIABLES, *RENDEZVOUS_VARIABLES)
        environment = {name: value for name, value in os.environ.items() if name not in stale} | variables
        child = subprocess.Popen(command, cwd=self.folder, env=environment, preexec_fn=_ignore_stops)
        code = self._wait(child, signals, presence)
        # Who was told to end is no witness: SLURM knows already what happened.
        lost = presence.silent() if code and not signals else []
        # On one's own machine SIGTERM is no preemption: somebody wants it to end.
        stops = [moment for signum, moment in signals if not self.local or signum != signal.SIGTERM]
        ending = Ending(attempt, began_at, stops[0] if stops else None, ", ".join(lost))
        verdict = self._verdict(job, history, restarts, code, ending, presence.decides(lost))
        heard = f", {names([signum for signum, _ in signals])}" if signals else ""
        took = f"after {time.monotonic() - began:.1f} s: exit code {code}{heard}"
        print(f"attempt {attempt} ended {took}, saved step {history.newest_step()}; {verdict.text()}", flush=True)
        presence.leave()
        if verdict.requeue:
            return self._queue_again(job, history, verdict, began_at)
        return self._leave(verdict.code)

    def checkpoint(self) -> DelayedSubmission:
        """Give submitit what to queue again, should it be signalled before `__call__` listens."""
        return DelayedSubmission(self)

    def start_of(
        self, job: submitit.JobEnvironment, restarts: int, presence: Presence
    ) -> tuple[list[str], dict[str, str], str]:
        """Meet the other nodes; give this task's command, the variables that it needs, and where the ranks meet."""
        # A host's own name need not resolve; between processes of one node nobody has to ask.
        address = job.hostnames[0] if job.num_nodes > 1 else LOOPBACK_ADDRESS
        speaks = job.local_rank == 0
        port = presence.meet(port_of(job.raw_job_id, restarts) if speaks else None, self.meeting_limit_s)
        place = f"rendezvous at {address}:{port}"
        if self.tasks_per == "node":
            # torchrun would set 1, with a banner; the ranks may still choose otherwise by run.threads.
            threads = os.environ.get("OMP_NUM_THREADS", str(threads_per_rank(0, self.ranks_per_node, usable_cores())))
            patience = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN_LIMIT_S)
            variables = {"OMP_NUM_THREADS": threads, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": patience}
            return self.torchrun_command(str(job.num_nodes), str(job.node), address, str(port)), variables, place
        launch = Launch(
            started_by="slurm",
            rank=job.global_rank,
            local_rank=job.local_rank,
            world_size=job.num_tasks,
            local_world_size=self.ranks_per_node,
            master_addr=address,
            master_port=port,
        )
        return self.rank_command(), environment_of(launch, os.environ), place

    def torchrun_command(self, num_nodes: str, node: str, address: str, port: str) -> list[str]:
        """Give the torchrun command of one node; text, because a dry run has names where a job has numbers."""
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nnodes={num_nodes}",
            f"--nproc-per-node={self.ranks_per_node}",
            f"--node-rank={node}",
            f"--master-addr={address}",
            f"--master-port={port}",
            "--max-restarts=0",
            # It would end the ranks on SIGTERM and fail; left out here, the signal stays ignored, and the ranks save.
            "--signals-to-handle=SIGINT",
            self.script,
            *self.arguments,
        ]

    def rank_command(self) -> list[str]:
        """Give the command of one rank."""
        return [sys.executable, "-u", self.script, *self.arguments]

    def _wait(self, child: "subprocess.Popen[bytes]", signals: list[tuple[int, float]], presence: Presence) -> int:
        """Wait for the ranks and give their code; hand on what this process was signalled."""
        handed_on = -HAND_ON_S
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    code = child.wait(BEAT_S)
                    return 128 - code if code < 0 else code
                presence.beat()
                if signals and time.monotonic() >= handed_on + HAND_ON_S:
                    handed_on = time.monotonic()
                    # SIGUSR2 for all of them: a rank that doesn't listen yet ignores it.
                    for pid in [child.pid] if self.tasks_per == "gpu" else _children_of(child.pid):
                        with suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGUSR2)
        finally:
            _stop(child)

    def _verdict(
        self, job: submitit.JobEnvironment, history: History, restarts: int, code: int, ending: Ending, decides: bool
    ) -> Verdict:
        asked = (ending.lost or ending.first_signal_s is not None) and not self.local
        if code and not ending.lost and (job.global_rank or not asked):
            return Verdict(False, code, "a rank failed")
        if not decides:  # its exit code must not have srun end the task that does
            return Verdict(False, 0, "the first task decides what becomes of the job")
        standing = ask_slurm(job.job_id, restarts) if asked else Standing()
        if code and not ending.lost:
            return Verdict(False, code, standing.ending or "a rank failed")
        verdict = judge(history, self.limits, standing, ending)
        if ending.lost:
            did = "the job is queued again" if verdict.requeue else "the job ends"
            self._record(job, "node_lost", f"no sign of life from {ending.lost}", did, ending.attempt)
        if verdict.code:
            self._record(job, "not_requeued", verdict.why, "the job ends", ending.attempt)
        return verdict

    def _queue_again(self, job: submitit.JobEnvironment, history: History, verdict: Verdict, began_at: int) -> int:
        try:
            # Not without writing it down: requeues that nobody counts would have no end.
            history.add_requeue(verdict.why, began_at)
            job._requeue(self.limits.max_requeues - history.num_requeues("time limit"))
        except (OSError, subprocess.SubprocessError) as error:
            print(f"error: can't be queued again: {error}. Submit the same command again.", flush=True)
            return self._leave(1)
        return self._leave(0)

    def _record(self, job: submitit.JobEnvironment, kind: str, what: str, did: str, attempt: int) -> None:
        """Leave a fault with those of the run, where it has a folder already."""
        fault = Fault(kind=kind, what=what, did=did, host=_host(job), attempt=attempt, more={"job": job.job_id})
        append_fault(Path(self.run_folder) / "faults.jsonl", fault)

    def _leave(self, code: int) -> int:
        """End the task: under SLURM by an exit, so that no result of this start is left for the next."""
        if not self.local:
            sys.exit(code)
        return code


def _where(job: submitit.JobEnvironment, restarts: int) -> str:
    nodes = f"{job.num_nodes} nodes {' '.join(job.hostnames)}" if job.num_nodes > 1 else "1 node"
    return f"job {job.job_id}, restart {restarts}, {nodes}, task {job.global_rank} on {_host(job)}"


def _host(job: submitit.JobEnvironment) -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _ignore_stops() -> None:
    """Have torchrun and starting ranks ignore what asks for a stop, which exec inherits; a rank listens once it can."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def _children_of(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _stop(child: "subprocess.Popen[bytes]") -> None:
    """Leave no process behind: torchrun hands SIGINT on to its ranks."""
    if child.poll() is not None:
        return
    child.send_signal(signal.SIGINT)
    try:
        child.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
