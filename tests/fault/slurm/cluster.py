"""A SLURM cluster of two nodes for the tests, on this machine and for one session: Debian's daemons, a folder, ports.

It needs neither root nor munge nor accounting. The nodes are called 127.0.0.1 and 127.0.0.2: names that resolve
everywhere, since the ranks meet at the first node by its name.
"""

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from tests.runs import ROOT

NODES = ("127.0.0.1", "127.0.0.2")
LIMIT_S = 180.0
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
CONFIG = """
ClusterName=ropes
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
# A job that is queued again waits for its credentials to expire: two minutes by default, five seconds at least.
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{user_signal}
# More CPUs than the machine has.
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
MinJobAge=3600
PropagateResourceLimits=NONE
SlurmdTimeout={patience_s}
{nodes}
PartitionName=main Nodes=127.0.0.[1-2] Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=127.0.0.[1-2] State=UP PriorityTier=10
"""
USER_SIGNAL = "SlurmctldParameters=preempt_send_user_signal"
PATIENCE_S = 300
"""Seconds after which the controller gives up a node that doesn't answer; SLURM's own default."""


def missing_programs() -> list[str]:
    """Name what this machine lacks for a cluster."""
    return [name for name in ("slurmctld", "slurmd", "sbatch", "srun") if shutil.which(name, path=PATH) is None]


class Cluster:
    """A running cluster; a context manager that ends all that it started."""

    def __init__(self, folder: Path) -> None:
        """Start the daemons and wait until both nodes are idle."""
        self.folder, self.config = folder, folder / "slurm.conf"
        for name in ("state", *(f"spool/{node}" for node in NODES)):
            (folder / name).mkdir(parents=True)
        self._ports = free_ports(3)
        self._slurmd: dict[str, subprocess.Popen[bytes]] = {}
        # Jobs are submitted from a shell with these.
        outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        self.environment = {**outside, "PATH": PATH, "SLURM_CONF": str(self.config), "GLOO_SOCKET_IFNAME": "lo"}
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._write_config()
        self._start("slurmctld", "-c")
        for node in NODES:
            self.start_node(node)
        self.until(lambda: self.idle_nodes() == len(NODES), "two idle nodes")

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(subprocess.SubprocessError, AssertionError):
            self.call("scancel", f"--user={getpass.getuser()}")
            self.until(lambda: not self.queue(), "an empty queue")
        for daemon in self._daemons:
            daemon.terminate()
        for daemon in self._daemons:
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait(10)

    def start_node(self, node: str) -> None:
        """Start the daemon of a node, for the first time or again."""
        self._slurmd[node] = self._start("slurmd", "-N", node)

    def lose_node(self, node: str, signum: signal.Signals) -> Callable[[], None]:
        """End a node and all that runs on it, and return what clears it away.

        By SIGSTOP it falls silent as a machine without power does; after SIGKILL the kernel tells its peers at once.
        """
        tasks = [pid for pid in self.processes() if variable(pid, "SLURMD_NODENAME") == node]
        steps = {parent_of(pid) for pid in tasks if name_of(parent_of(pid)) == "slurmstepd"}
        lost = [self._slurmd[node].pid, *steps, *tasks]
        for each in (signal.SIGSTOP, signum):
            for pid in lost:
                os.kill(pid, each)

        def clear() -> None:
            for pid in lost:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._slurmd[node].wait(10)

        return clear

    def reconfigure(self, *, user_signal: str = USER_SIGNAL, patience_s: int = PATIENCE_S) -> None:
        """Give the controller other settings, or those that it began with."""
        self._write_config(user_signal, patience_s)
        self.call("scontrol", "reconfigure")

    def call(self, *command: str, cwd: Path | None = None, **variables: str) -> str:
        """Run a client of the cluster and return what it says."""
        environment = {**self.environment, **variables}
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
        assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, workplace: Path, *arguments: str, **variables: str) -> str:
        """Submit tiny.toml as a user does, two ranks on each of two nodes, and return the job's number."""
        script = str(ROOT / "launchers" / "slurm.py")
        fixed = ("tiny.toml", "--nodes", "2", "--gpus-per-node", "2", "--cpus-per-task", "2", "--run.device", "cpu")
        text = self.call(sys.executable, script, *fixed, *arguments, cwd=workplace, **variables)
        found = re.match(r"submitted job (\d+) ", text)
        assert found, text
        return found[1]

    def idle_nodes(self) -> int:
        """Count the nodes that could take a job."""
        with suppress(AssertionError):  # the controller may still be starting
            return self.call("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split().count("idle")
        return 0

    def queue(self) -> list[str]:
        """List the jobs that wait, run or end."""
        return self.call("squeue", "-h", "-o", "%i %T").splitlines()

    def job(self, number: str) -> dict[str, str]:
        """Return what SLURM says of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", "-o", number)))

    def state(self, number: str) -> str:
        """Return a job's state."""
        return self.job(number)["JobState"]

    def has_ended(self, number: str) -> bool:
        """Tell whether a job has left the queue for good."""
        return self.state(number) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    def until(self, condition: Callable[[], Any], what: str, limit_s: float = LIMIT_S) -> None:
        """Wait until a condition holds."""
        end = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < end, f"no {what} after {limit_s:g} s: {self.queue()}\n{self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        """Return the end of each daemon's log."""
        return "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in sorted(self.folder.glob("*.log")))

    def processes(self) -> list[int]:
        """List the processes of this cluster's jobs, and the daemons of their steps."""
        pids = (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())
        here = [pid for pid in pids if variable(pid, "SLURM_CONF") == str(self.config)]
        return [pid for pid in here if variable(pid, "SLURM_JOB_ID") or name_of(pid) == "slurmstepd"]

    def _write_config(self, user_signal: str = USER_SIGNAL, patience_s: int = PATIENCE_S) -> None:
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr={node} Port={port} CPUs=8 RealMemory=1000 State=UNKNOWN"
            for node, port in zip(NODES, self._ports[1:], strict=True)
        )
        text = CONFIG.format(
            host=host,
            controller_port=self._ports[0],
            user=getpass.getuser(),
            folder=self.folder,
            user_signal=user_signal,
            patience_s=patience_s,
            nodes=nodes,
        )
        self.config.write_text(text)

    def _start(self, program: str, *arguments: str) -> "subprocess.Popen[bytes]":
        path = shutil.which(program, path=PATH)
        assert path, f"{program} was looked for before"
        with (self.folder / f"{program}.out").open("ab") as output:
            daemon = subprocess.Popen(
                [path, "-D", "-f", str(self.config), *arguments], env=self.environment, stdout=output, stderr=output
            )
        self._daemons.append(daemon)
        return daemon


def free_ports(count: int) -> list[int]:
    """Find ports that nobody holds, below those that the system gives to clients."""
    with ExitStack() as held:
        found: list[int] = []
        for port in range(18000 + os.getpid() % 1000, 20000):
            probe = held.enter_context(socket.socket())
            with suppress(OSError):
                probe.bind(("", port))
                found.append(port)
            if len(found) == count:
                break
        return found


def variable(pid: int, name: str) -> str:
    """Return a variable that a process was started with; empty where it has none or is gone."""
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return ""
    start = f"{name}=".encode()
    return next((word[len(start) :].decode() for word in words if word.startswith(start)), "")


def parent_of(pid: int) -> int:
    """Return the parent of a process, 0 where it is gone."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()[1])
    return 0


def name_of(pid: int) -> str:
    """Return the name of a process's program."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""
