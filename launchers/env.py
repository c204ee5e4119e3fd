"""Who this process is: its rank, its neighbours and where they meet, from torchrun's or SLURM's variables.

The only reader of the environment in the project. A process that neither torchrun nor `srun` started is a run of one.
SLURM's variables count only inside a job step of more than one task: a batch script and a shell of `salloc` carry
SLURM_PROCID too, and are one process each. An environment that is half set is refused, never completed by guesses.
All functions take the environment as an argument and change nothing; `environment_of` says what to add to it.
"""

import getpass
import os
import re
import sys
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.errors import LayoutError, RunError, problem

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
RENDEZVOUS_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")
LOOPBACK_ADDRESS = "127.0.0.1"
# Below Linux's range of ephemeral ports (32768 up), so that no outgoing connection holds one of them.
FIRST_PORT, NUM_PORTS = 20000, 10000
MAX_PORT = 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """The place of this process among all processes of the run."""

    started_by: Literal["nothing", "torchrun", "slurm"]
    """What set the environment; `nothing` is a single process."""
    rank: int
    """Index among all processes."""
    local_rank: int
    """Index among the processes of this node; picks the GPU."""
    world_size: int
    """Number of processes."""
    local_world_size: int
    """Number of processes on this node."""
    master_addr: str
    """Host of rank 0."""
    master_port: int
    """Port on that host where the ranks meet; 0 for a single process, which meets nobody."""
    restart_count: int = 0
    """Times that torchrun or SLURM has started the ranks again by itself."""
    job: str = ""
    """SLURM's job id."""
    agent_store: bool = False
    """Whoever started the ranks keeps the store where they meet; else rank 0 opens it."""

    @property
    def is_one_node(self) -> bool:
        """True when all processes share this machine."""
        return self.world_size == self.local_world_size


def read_launch(environment: Mapping[str, str]) -> Launch:
    """Say who this process is; raise LayoutError when the environment is half set or contradicts itself."""
    if any(name in environment for name in RANK_VARIABLES):
        return _from_torchrun(environment)
    if "SLURM_STEP_ID" in environment and _integer(environment, "SLURM_NTASKS", default=1) > 1:
        return _from_slurm(environment)
    return Launch(
        started_by="nothing",
        rank=0,
        local_rank=0,
        world_size=1,
        local_world_size=1,
        master_addr=LOOPBACK_ADDRESS,
        master_port=0,
    )


def environment_of(launch: Launch, environment: Mapping[str, str]) -> dict[str, str]:
    """Give the variables that torch.distributed should find: who and where, and loopback for a run on one node.

    What the user chose stays.
    """
    variables = {
        "RANK": str(launch.rank),
        "LOCAL_RANK": str(launch.local_rank),
        "WORLD_SIZE": str(launch.world_size),
        "LOCAL_WORLD_SIZE": str(launch.local_world_size),
        "MASTER_ADDR": launch.master_addr,
        "MASTER_PORT": str(launch.master_port),
    }
    if launch.is_one_node and "GLOO_SOCKET_IFNAME" not in environment:
        # Otherwise gloo resolves the host's own name, which on laptops and in containers often leads nowhere.
        variables["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    if "TORCH_NCCL_DUMP_ON_TIMEOUT" not in environment:
        # torch would write its flight recorder as a pickle below /tmp; the watchdog writes it as JSON.
        variables["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "0"
    return variables


def compile_cache(launch: Launch, environment: Mapping[str, str]) -> str:
    """Make this rank's own folder of compiled kernels and give its path, below the user's choice or the default.

    Ranks of several hosts may share a disk, and the compiler names its temporary files by process number only. The
    folder holds pickles and code, so it is closed to others.
    """
    given = environment.get("TORCHINDUCTOR_CACHE_DIR")
    default = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
    folder = (Path(given) if given else default) / f"rank-{launch.rank}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        do = "Set TORCHINDUCTOR_CACHE_DIR to a folder that can be written."
        raise RunError(problem(str(folder), "", f"can't be made: {error.strerror}", "kernels go there", do)) from None
    return str(folder)


def threads_per_rank(configured: int, local_world_size: int, cores: int) -> int:
    """Give `run.threads`, or when that is 0 an even share of the node's usable cores.

    torchrun sets OMP_NUM_THREADS=1 for every rank; this rule replaces it.
    """
    return configured or max(1, cores // local_world_size)


def usable_cores() -> int:
    """Count the cores that this process may run on: cgroups, taskset and SLURM may grant fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def first_host(node_list: str) -> str:
    """Give the first host of SLURM's compressed form: `gpu[07-09,12],cpu1` -> `gpu07`."""
    first = re.split(r",(?![^\[]*\])", node_list)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def port_of(job_id: str, restart_count: int) -> int:
    """Derive the port of a job: the same on all its nodes without asking, another one after each requeue."""
    return FIRST_PORT + zlib.crc32(f"{job_id}.{restart_count}".encode()) % NUM_PORTS


def _from_torchrun(environment: Mapping[str, str]) -> Launch:
    needed = RANK_VARIABLES + RENDEZVOUS_VARIABLES
    missing = [name for name in needed if name not in environment]
    if missing:
        there = ", ".join(name for name in needed if name in environment)
        why = "torchrun sets all six for every rank, and guessing one would hang the others"
        do = "Start with torchrun, or unset them for a single process."
        raise LayoutError(problem("environment", "", f"{there} set but {', '.join(missing)} not", why, do))
    restarts = _integer(environment, "SLURM_RESTART_COUNT", default=0)
    return _checked(
        Launch(
            started_by="torchrun",
            rank=_integer(environment, "RANK"),
            local_rank=_integer(environment, "LOCAL_RANK"),
            world_size=_integer(environment, "WORLD_SIZE"),
            local_world_size=_integer(environment, "LOCAL_WORLD_SIZE"),
            master_addr=environment["MASTER_ADDR"],
            master_port=_integer(environment, "MASTER_PORT"),
            restart_count=_integer(environment, "TORCHELASTIC_RESTART_COUNT", default=0) + restarts,
            job=environment.get("SLURM_JOB_ID", ""),
            agent_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
    )


def _from_slurm(environment: Mapping[str, str]) -> Launch:
    """One task a rank; srun describes the step, and what it leaves out it describes for the job."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", "")
    names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID")
    missing = [name for name in names if name not in environment]
    missing += ["SLURM_STEP_NODELIST"] * (not nodes) + ["SLURM_STEP_TASKS_PER_NODE"] * (not tasks)
    if missing:
        why = "a step of several tasks is one rank a task"
        raise LayoutError(
            problem("environment", "", f"{', '.join(missing)} not set", why, "Start the ranks with srun.")
        )
    if not re.fullmatch(r"\d+(\(x\d+\))?", tasks):
        do = "Ask for --ntasks-per-node, and for whole nodes."
        raise LayoutError(problem("SLURM_STEP_TASKS_PER_NODE", tasks, "every node must have as many ranks", "", do))
    restarts = _integer(environment, "SLURM_RESTART_COUNT", default=0)
    return _checked(
        Launch(
            started_by="slurm",
            rank=_integer(environment, "SLURM_PROCID"),
            local_rank=_integer(environment, "SLURM_LOCALID"),
            world_size=_integer(environment, "SLURM_NTASKS"),
            local_world_size=int(tasks.split("(")[0]),
            master_addr=environment.get("MASTER_ADDR") or first_host(nodes),
            master_port=_integer(environment, "MASTER_PORT", default=port_of(environment["SLURM_JOB_ID"], restarts)),
            restart_count=restarts,
            job=environment["SLURM_JOB_ID"],
        )
    )


def _checked(launch: Launch) -> Launch:
    if launch.world_size < 1:
        raise LayoutError(problem("environment: world size", launch.world_size, "must be at least 1"))
    for name, number, least, most in (
        # The sizes first: a rank below a size that is wrong itself would be asked for in vain.
        ("local world size", launch.local_world_size, 1, launch.world_size),
        ("rank", launch.rank, 0, launch.world_size - 1),
        ("local rank", launch.local_rank, 0, launch.local_world_size - 1),
        ("MASTER_PORT", launch.master_port, int(launch.world_size > 1), MAX_PORT),  # one process meets nobody
    ):
        if not least <= number <= most:
            raise LayoutError(problem(f"environment: {name}", number, f"must be from {least} to {most}"))
    return launch


def _integer(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None:
        assert default is not None, f"{name} was checked to be there"
        return default
    if not re.fullmatch(r"\d+", text):
        raise LayoutError(problem(f"environment: {name}", text, "must be a whole number"))
    return int(text)
