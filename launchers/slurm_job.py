"""What runs inside an allocation: one `SlurmJob` a task, which starts the ranks of its node (or its one rank).

submitit pickles a SlurmJob at submission and calls it in every task. It starts torchrun with a static rendezvous: the
nodes' numbers and the first host come from SLURM, the port is derived, so that nothing has to be agreed on at start
and rank 0 is on the first node. Ranks are restarted by SLURM as a whole job, never by torchrun on a node that may be
the broken one. Resuming is not done here: the same command continues from the last committed checkpoint.
Source of the behaviour of signals: submitit/core/job_environment.py (SignalHandler).
"""

import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import submitit
from submitit.helpers import DelayedSubmission

from launchers.env import (
    LOOPBACK_ADDRESS,
    NUM_PORTS,
    RANK_VARIABLES,
    RENDEZVOUS_VARIABLES,
    Launch,
    environment_of,
    port_of,
    threads_per_rank,
    usable_cores,
)

STOP_LIMIT_S = 30


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
    requeue: bool
    """Queue the job again when its time is up or a higher priority takes its nodes."""
    local: bool = False
    """Under submitit's local executor, which reads the code that the task returns; SLURM reads that of the process."""

    def __call__(self) -> int:
        """Start the ranks, wait for them and give (or, under SLURM, exit with) their code."""
        job = submitit.JobEnvironment()
        command, variables = self.start_of(job)
        stale = (*RANK_VARIABLES, *RENDEZVOUS_VARIABLES)
        environment = {name: value for name, value in os.environ.items() if name not in stale} | variables
        print(f"starting {' '.join(command)}", flush=True)
        # submitit's signal reaches every process of the step and would end torchrun and the ranks before the job is
        # queued again; ignoring it is inherited by exec.
        usr = job._usr_sig()
        if not self.requeue:
            signal.signal(usr, signal.SIG_IGN)  # run on to the limit
        child = subprocess.Popen(
            command, cwd=self.folder, env=environment, preexec_fn=lambda: signal.signal(usr, signal.SIG_IGN)
        )
        try:
            code = child.wait()
        finally:  # submitit's handler leaves by an exception once the job is queued again
            _stop(child)
        code = 128 - code if code < 0 else code
        if code and not self.local:
            sys.exit(code)
        return code

    def checkpoint(self) -> DelayedSubmission:
        """Give submitit what to queue again: the same command, which continues from the last checkpoint."""
        return DelayedSubmission(self)

    def start_of(self, job: submitit.JobEnvironment) -> tuple[list[str], dict[str, str]]:
        """Give this task's command and the variables that it needs."""
        port = port_of(job.raw_job_id, int(os.environ.get("SLURM_RESTART_COUNT", "0")))
        # A host's own name need not resolve; between processes of one node nobody has to ask.
        address = job.hostnames[0] if job.num_nodes > 1 else LOOPBACK_ADDRESS
        if self.tasks_per == "node":
            if job.num_nodes == 1:
                port = _free_port(port)
            # torchrun would set 1, with a banner; the ranks may still choose otherwise by run.threads.
            threads = os.environ.get("OMP_NUM_THREADS", str(threads_per_rank(0, self.ranks_per_node, usable_cores())))
            command = self.torchrun_command(str(job.num_nodes), str(job.node), address, str(port))
            return command, {"OMP_NUM_THREADS": threads}
        launch = Launch(
            started_by="slurm",
            rank=job.global_rank,
            local_rank=job.local_rank,
            world_size=job.num_tasks,
            local_world_size=self.ranks_per_node,
            master_addr=address,
            master_port=port,
        )
        return self.rank_command(), environment_of(launch, os.environ)

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
            self.script,
            *self.arguments,
        ]

    def rank_command(self) -> list[str]:
        """Give the command of one rank."""
        return [sys.executable, "-u", self.script, *self.arguments]


def _stop(child: "subprocess.Popen[bytes]") -> None:
    """Leave no process behind: torchrun hands SIGTERM on to its ranks."""
    if child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _free_port(port: int) -> int:
    """Give the first port from here on that nobody holds; only for one node, where nobody else has to know."""
    for candidate in range(port, port + NUM_PORTS):
        with socket.socket() as probe:
            try:
                probe.bind((LOOPBACK_ADDRESS, candidate))
            except OSError:
                continue
            return candidate
    return port
