"""Trainings on a real SLURM cluster of two nodes, driven by the command line that a user has: what ends a job on such
clusters is done to one, and what comes of it is held against a run that nobody disturbed.
"""

import os
import re
import signal
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.fault.record import read_lines
from tests.fault.slurm.cluster import LIMIT_S, NODES, PATIENCE_S, USER_SIGNAL, Cluster, missing_programs, variable
from tests.runs import assert_same_end, last_step, make_workplace

STEPS = 60
EVERY = 20
"""Steps between checkpoints."""
SEEN = 4
"""A step at which a job is disturbed: before its first checkpoint."""

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing_programs()), reason=f"not installed: {', '.join(missing_programs())}"),
]


@dataclass(frozen=True)
class Job:
    """A submitted training."""

    cluster: Cluster
    number: str
    run: Path

    def log(self, number: str = "") -> str:
        """Return the log of the first task."""
        number = number or self.number
        path = self.run / "slurm" / number / f"{number}_0_log.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def tasks_started(self, restart: int) -> int:
        """Count the tasks that listen to signals since a restart."""
        logs = (self.run / "slurm" / self.number).glob("*_log.out")
        return sum(f"restart {restart}, " in path.read_text(errors="replace") for path in logs)

    def ends(self) -> list[str]:
        """Return the lines of the log that say how a start ended."""
        return [line for line in self.log().splitlines() if re.match(r"attempt \d+ ended ", line)]

    def until(self, condition: Callable[[], object], what: str, limit_s: float = LIMIT_S) -> None:
        """Wait until a condition holds."""
        try:
            self.cluster.until(condition, what, limit_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()}") from None

    def reach(self, step: int) -> None:
        """Wait until the run has logged a step."""
        self.until(lambda: last_step(self.run) >= step, f"step {step}")

    def wait(self) -> str:
        """Wait for the end; return the state."""
        self.until(lambda: self.cluster.has_ended(self.number), "end of the job")
        return self.cluster.state(self.number)

    def ranks(self) -> list[int]:
        """List the processes of the ranks."""
        return [pid for pid in self.cluster.processes() if variable(pid, "LOCAL_RANK") and is_rank(pid)]

    def attempts(self, event: str) -> list[dict]:
        """Return the starts or the ends of the run's history."""
        return [entry for entry in read_lines(self.run / "attempts.jsonl") if entry["event"] == event]


Submit = Callable[..., Job]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("workplace"))


@pytest.fixture(scope="module")
def submit_job(cluster: Cluster, workplace: Path) -> Submit:
    def submit(name: str, *options: str, limit_min: int = 5, **variables: str) -> Job:
        assert not cluster.queue()
        fixed = ("--time", str(limit_min), "--run.name", name, "--run.steps", str(STEPS))
        number = cluster.submit(workplace, *fixed, "--checkpoint.every_steps", str(EVERY), *options, **variables)
        return Job(cluster, number, workplace / "runs" / name)

    return submit


@pytest.fixture(scope="module")
def whole(submit_job: Submit) -> Job:
    """The run that nobody disturbed."""
    options = ("--setup", "env > environment", "--export", "ADDED_TOKEN")
    secrets = {"MY_API_KEY": "canary", "HF_TOKEN": "canary", "ELSEWHERE": "canary", "ADDED_TOKEN": "asked for"}
    job = submit_job("whole", *options, **secrets)
    assert job.wait() == "COMPLETED", job.log()
    return job


def is_rank(pid: int) -> bool:
    with suppress(OSError):
        return b"launchers/train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def send(pids: list[int], signum: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, signum)


# ---- without a fault


def test_two_nodes_train_and_the_log_says_where(whole: Job) -> None:
    start = f"attempt 1: job {whole.number}, restart 0, 2 nodes {' '.join(NODES)}, task 0 on {NODES[0]}, rendezvous at "
    assert start in whole.log()
    assert whole.log().splitlines()[-1].startswith("attempt 1 ended after ")
    assert whole.log().endswith(f"s: exit code 0, saved step {STEPS}; not queued again: the run is done\n")
    assert whole.attempts("start")[0]["world_size"] == 4
    assert whole.cluster.job(whole.number)["ExitCode"] == "0:0"
    assert last_step(whole.run) == STEPS


def test_one_task_a_gpu_trains_the_same_weights(submit_job: Submit, whole: Job) -> None:
    job = submit_job("gpu", "--tasks-per", "gpu")
    assert job.wait() == "COMPLETED", job.log()
    assert_same_end(job.run, whole.run)


def test_a_job_gets_the_variables_of_a_list_and_its_files_are_private(whole: Job, workplace: Path) -> None:
    names = {line.split("=")[0] for line in (workplace / "environment").read_text().splitlines()}
    assert {"PATH", "HOME", "GLOO_SOCKET_IFNAME", "SLURM_CONF", "SLURM_JOB_ID", "ADDED_TOKEN"} <= names
    files = [path for path in whole.run.rglob("*") if path.is_file()]
    assert any("submitted.pkl" in path.name for path in files)
    for path in [workplace / "environment", *files]:
        assert b"canary" not in path.read_bytes(), path
    for path in (whole.run / "slurm").rglob("*"):
        assert not stat.S_IMODE(path.lstat().st_mode) & 0o077 or path.is_symlink(), path


# ---- saved and queued again


def assert_queued_again_once(job: Job, signum: str, why: str) -> None:
    assert job.wait() == "COMPLETED", job.log()
    assert job.cluster.job(job.number)["Restarts"] == "1"
    first, second = job.attempts("end")
    assert SEEN <= first["step"] < STEPS
    assert (first["reason"], second["reason"]) == (signum, "done")
    start = job.attempts("start")[1]
    assert (start["from_step"], start["lost_steps"], start["restart_count"]) == (first["step"], 0, 1)
    assert f"exit code 0, {signum}, saved step {first['step']}; queued again: {why}\n" in job.log()
    assert f"attempt 2: job {job.number}, restart 1, 2 nodes" in job.log()
    assert "0 steps lost" in job.log()


def test_the_time_limit_saves_and_queues_again(submit_job: Submit, whole: Job) -> None:
    """SLURM continues the ranks, which stand still here to be slow enough for its minutes, and signals them."""
    job = submit_job("limit", "--signal-delay-s", "55", "--fault.watchdog", "false", limit_min=2)
    job.reach(SEEN)
    send(job.ranks(), signal.SIGSTOP)
    assert_queued_again_once(job, "SIGUSR2", "time limit")
    assert_same_end(job.run, whole.run)


@pytest.mark.parametrize(("signum", "tasks_per"), [("SIGUSR2", "node"), ("SIGTERM", "gpu")])
def test_preemption_saves_and_queues_again(
    submit_job: Submit, cluster: Cluster, whole: Job, tmp_path: Path, signum: str, tasks_per: str
) -> None:
    """With and without SLURM's preempt_send_user_signal."""
    cluster.reconfigure(user_signal=USER_SIGNAL if signum == "SIGUSR2" else "")
    job = submit_job(f"preempted-{signum.lower()}", "--tasks-per", tasks_per)
    job.reach(SEEN)
    urgent = ("sbatch", "-p", "high", "-N2", "--exclusive", "-o", str(tmp_path / "urgent"), "--wrap", "true")
    cluster.call(*urgent)
    assert_queued_again_once(job, signum, "preempted")
    assert_same_end(job.run, whole.run)


@pytest.mark.parametrize("found_by", ["SLURM", "its peers"])
def test_a_lost_node_queues_again(submit_job: Submit, cluster: Cluster, whole: Job, found_by: str) -> None:
    """SLURM gives up a node after minutes, and its peers may have failed by then, which alone would end the job."""
    by_slurm = found_by == "SLURM"
    cluster.reconfigure(patience_s=10 if by_slurm else PATIENCE_S)
    job = submit_job(f"lost-{found_by.split()[-1].lower()}")
    job.reach(EVERY + SEEN)
    clear = cluster.lose_node(NODES[1], signal.SIGSTOP if by_slurm else signal.SIGKILL)
    job.until(lambda: cluster.job(job.number).get("Restarts") == "1", "restart")
    clear()
    # The old srun outlives its batch script here, and would end the step of the same number.
    cluster.until(lambda: not cluster.processes(), "end of the first start")
    cluster.start_node(NODES[1])
    assert job.wait() == "COMPLETED", job.log()
    assert [entry["from_step"] for entry in job.attempts("start")] == [0, EVERY]
    if not by_slurm:
        assert job.ends()[0].endswith(f"exit code 1, saved step {EVERY}; queued again: lost {NODES[1]}")
        lost = [entry for entry in read_lines(job.run / "faults.jsonl") if entry["kind"] == "node_lost"]
        assert [(entry["what"], entry["did"]) for entry in lost] == [
            (f"no sign of life from {NODES[1]}", "the job is queued again")
        ]
    assert_same_end(job.run, whole.run)


# ---- ended for good


def test_a_killed_rank_fails_the_job_which_does_not_loop(submit_job: Submit, cluster: Cluster, tmp_path: Path) -> None:
    job = submit_job("killed")
    job.reach(SEEN)
    begin = time.monotonic()
    send([pid for pid in job.ranks() if variable(pid, "RANK") == "3"], signal.SIGKILL)
    assert job.wait() == "FAILED"
    assert time.monotonic() - begin < 120
    assert "not queued again: a rank failed" in job.log()
    waiting = ("sbatch", f"--dependency=afterok:{job.number}", "-o", str(tmp_path / "never"), "--wrap", "true")
    number = cluster.call(*waiting, "--parsable").strip()
    cluster.until(lambda: cluster.job(number)["Reason"] == "DependencyNeverSatisfied", "refused dependency")
    assert (cluster.job(job.number)["Restarts"], len(job.attempts("start"))) == ("0", 1)
    cluster.call("scancel", number)
    cluster.until(lambda: not cluster.queue(), "empty queue")


def test_restarts_that_lead_nowhere_are_ended(submit_job: Submit, cluster: Cluster) -> None:
    """Each start is signalled before its first step."""
    job = submit_job("fruitless", "--fault.max_fruitless_starts", "2", "--tasks-per", "gpu")
    for restart in (0, 1):
        job.until(lambda number=restart: job.tasks_started(number) == 4, f"start {restart} of all tasks")
        cluster.call("scancel", "--signal=USR2", job.number)
        job.until(lambda number=restart: len(job.ends()) > number, f"end of start {restart}")
    assert job.wait() == "FAILED"
    assert cluster.job(job.number)["Restarts"] == "1"
    first, second = job.ends()
    assert first.endswith("exit code 0, SIGUSR2, saved step 0; queued again: signalled")
    gave_up = "not queued again: the last 2 starts all began at step 0 and saved nothing newer"
    assert f"exit code 0, SIGUSR2, saved step 0; {gave_up}" in second
    assert [entry["kind"] for entry in read_lines(job.run / "faults.jsonl")] == ["not_requeued"]


def test_a_cancelled_job_saves_and_leaves_no_process(submit_job: Submit, cluster: Cluster) -> None:
    job = submit_job("cancelled")
    job.reach(SEEN)
    assert len(job.ranks()) == 4
    cluster.call("scancel", job.number)
    assert job.wait() == "CANCELLED"
    cluster.until(lambda: not cluster.processes(), "end of every process")
    assert "SIGTERM, saved step " in job.log()
    assert job.ends()[0].endswith("not queued again: SLURM is ending the job, cancelled or out of time")
    assert cluster.job(job.number)["Restarts"] == "0"


# ---- several jobs for one run


def test_an_array_goes_on_one_element_after_the_other_and_a_dependency_waits(
    submit_job: Submit, cluster: Cluster, workplace: Path, whole: Job
) -> None:
    array = submit_job("chain", "--sbatch", "array=0-1%1", "--no-requeue", "--tasks-per", "gpu")
    options = ("--time", "5", "--run.name", "chain", "--run.steps", str(STEPS), "--tasks-per", "gpu")
    options = (*options, "--sbatch", f"dependency=afterok:{array.number}_1")
    last = Job(cluster, cluster.submit(workplace, *options), array.run)
    assert cluster.job(last.number)["Reason"] == "Dependency"
    array.reach(SEEN)
    cluster.call("scancel", "--signal=USR2", f"{array.number}_0")
    last.until(lambda: cluster.has_ended(last.number), "end of the dependent job")
    states = [cluster.state(number) for number in (f"{array.number}_0", f"{array.number}_1", last.number)]
    assert states == ["FAILED", "COMPLETED", "COMPLETED"]  # the first is not done, and not queued again
    assert "not queued again: signalled, and --no-requeue\n" in array.log(f"{array.number}_0")
    assert [entry["reason"] for entry in array.attempts("end")] == ["SIGUSR2", "done", "done"]
    assert_same_end(array.run, whole.run)
