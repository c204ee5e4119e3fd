"""Who a process is, from the variables that torchrun and SLURM really set."""

import os
from pathlib import Path

import pytest
from submitit.slurm.slurm import _parse_node_list

from configs.errors import LayoutError, RunError
from launchers.env import (
    compile_cache,
    environment_of,
    first_host,
    port_of,
    read_launch,
    threads_per_rank,
    usable_cores,
)

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
}
# What srun 22.05 sets in the second of two tasks on each of two nodes.
SLURM_STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "41",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}


def test_an_empty_environment_is_a_single_process() -> None:
    launch = read_launch({})
    assert (launch.started_by, launch.rank, launch.world_size, launch.local_world_size) == ("nothing", 0, 1, 1)
    assert launch.is_one_node


def test_torchruns_variables_are_taken_as_they_are() -> None:
    launch = read_launch(TORCHRUN)
    assert (launch.started_by, launch.rank, launch.local_rank) == ("torchrun", 5, 1)
    assert (launch.world_size, launch.local_world_size) == (8, 4)
    assert (launch.master_addr, launch.master_port) == ("n1", 29500)
    assert not launch.is_one_node


def test_a_slurm_step_is_one_rank_a_task() -> None:
    launch = read_launch(SLURM_STEP)
    assert (launch.started_by, launch.rank, launch.local_rank) == ("slurm", 3, 1)
    assert (launch.world_size, launch.local_world_size) == (4, 2)
    assert (launch.master_addr, launch.master_port) == ("n1", port_of("41", 0))


def test_torchrun_inside_a_slurm_step_wins() -> None:
    assert read_launch(SLURM_STEP | TORCHRUN).started_by == "torchrun"


def test_a_requeued_job_meets_at_another_port() -> None:
    assert read_launch(SLURM_STEP | {"SLURM_RESTART_COUNT": "1"}).master_port == port_of("41", 1) != port_of("41", 0)


def test_a_rendezvous_chosen_by_the_user_stays() -> None:
    launch = read_launch(SLURM_STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
    assert (launch.master_addr, launch.master_port) == ("10.0.0.1", 4000)


@pytest.mark.parametrize("left_out", [{"SLURM_STEP_ID"}, {"SLURM_NTASKS"}])
def test_a_batch_script_and_a_shell_in_an_allocation_are_single_processes(left_out: set[str]) -> None:
    environment = {name: value for name, value in SLURM_STEP.items() if name not in left_out}
    assert read_launch(environment).started_by == "nothing"


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            "environment: RANK, WORLD_SIZE set but LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT not "
            "(torchrun sets all six for every rank, and guessing one would hang the others). "
            "Start with torchrun, or unset them for a single process.",
        ),
        (TORCHRUN | {"RANK": "8"}, "environment: rank = 8: must be from 0 to 7."),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "environment: local rank = 4: must be from 0 to 3."),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, "environment: local world size = 9: must be from 1 to 8."),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "0"}, "environment: local world size = 0: must be from 1 to 8."),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "environment: world size = 0: must be at least 1."),
        (TORCHRUN | {"MASTER_PORT": "0"}, "environment: MASTER_PORT = 0: must be from 1 to 65535."),
        (TORCHRUN | {"MASTER_PORT": "65536"}, "environment: MASTER_PORT = 65536: must be from 1 to 65535."),
        (SLURM_STEP | {"MASTER_PORT": "70000"}, "environment: MASTER_PORT = 70000: must be from 1 to 65535."),
        (TORCHRUN | {"WORLD_SIZE": "two"}, "environment: WORLD_SIZE = 'two': must be a whole number."),
        (
            {name: value for name, value in SLURM_STEP.items() if "NODELIST" not in name and name != "SLURM_LOCALID"},
            "environment: SLURM_LOCALID, SLURM_STEP_NODELIST not set (a step of several tasks is one rank a task). "
            "Start the ranks with srun.",
        ),
        (
            SLURM_STEP | {"SLURM_STEP_TASKS_PER_NODE": "3,1"},
            "SLURM_STEP_TASKS_PER_NODE = '3,1': every node must have as many ranks. "
            "Ask for --ntasks-per-node, and for whole nodes.",
        ),
    ],
)
def test_an_environment_that_is_half_set_is_refused(environment: dict[str, str], text: str) -> None:
    with pytest.raises(LayoutError) as error:
        read_launch(environment)
    assert str(error.value) == text


def test_the_last_port_and_a_single_process_without_one_are_taken() -> None:
    assert read_launch(TORCHRUN | {"MASTER_PORT": "65535"}).master_port == 65535
    alone = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "1") | dict.fromkeys(("RANK", "LOCAL_RANK"), "0")
    assert read_launch(TORCHRUN | alone | {"MASTER_PORT": "0"}).master_port == 0


@pytest.mark.parametrize("nodes", ["n1", "n[1-3]", "gpu[007-009,012],cpu1", "a,b[1-2]", "r[1-2]n[03,5]", "x[5,7-8]y"])
def test_the_first_host_is_the_one_that_submitit_finds(nodes: str) -> None:
    assert first_host(nodes) == _parse_node_list(nodes)[0]


def test_torch_distributed_finds_the_launch_in_the_variables() -> None:
    launch = read_launch(SLURM_STEP)
    again = read_launch(SLURM_STEP | environment_of(launch, SLURM_STEP))
    assert (again.rank, again.world_size, again.master_port) == (launch.rank, launch.world_size, launch.master_port)
    assert again.started_by == "torchrun"


def test_a_run_on_one_node_meets_on_loopback_unless_told_otherwise() -> None:
    one_node = read_launch(TORCHRUN | {"WORLD_SIZE": "4", "RANK": "1"})
    assert environment_of(one_node, {})["GLOO_SOCKET_IFNAME"].startswith("lo")
    assert "GLOO_SOCKET_IFNAME" not in environment_of(one_node, {"GLOO_SOCKET_IFNAME": "eth0"})
    assert "GLOO_SOCKET_IFNAME" not in environment_of(read_launch(TORCHRUN), {})


def test_torch_writes_no_pickle_of_its_own_when_a_collective_hangs() -> None:
    launch, name = read_launch(TORCHRUN), "TORCH_NCCL_DUMP_ON_TIMEOUT"
    assert environment_of(launch, {})[name] == "0"
    assert name not in environment_of(launch, {name: "1"})


@pytest.mark.parametrize(("configured", "ranks", "cores", "threads"), [(0, 2, 8, 4), (0, 8, 2, 1), (3, 2, 8, 3)])
def test_cores_are_shared_evenly_among_ranks(configured: int, ranks: int, cores: int, threads: int) -> None:
    assert threads_per_rank(configured, ranks, cores) == threads


def test_usable_cores_follow_the_affinity_of_the_process() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("no CPU affinity on this system")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_each_rank_compiles_into_a_folder_of_its_own(tmp_path: Path) -> None:
    given = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    launch = read_launch({**TORCHRUN, "RANK": "1"})
    folder = Path(compile_cache(launch, given))
    assert folder == tmp_path / "cache" / "rank-1"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert Path(compile_cache(launch, given)) == folder  # once more, as after a restart
    (tmp_path / "file").touch()
    with pytest.raises(RunError) as caught:
        compile_cache(launch, {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file")})
    assert str(caught.value) == (
        f"{tmp_path / 'file' / 'rank-1'}: can't be made: Not a directory (kernels go there). Set "
        "TORCHINDUCTOR_CACHE_DIR to a folder that can be written."
    )
