"""Submitting to SLURM: what is asked for, what is refused, and real jobs through submitit's local executor."""

import argparse
import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from launchers import slurm
from launchers.slurm import main, minutes, split_overrides

CONFIG = """
[run]
name = "small"
steps = 10
device = "cpu"

[model]
vocab_size = 64
dim = 16
num_layers = 1
num_heads = 2
ffn_dim = 32

[data]
seq_len = 16
global_batch_size = 16

[[data.stores]]
path = "store"
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A config in a working folder of its own, and the store that it names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").touch()
    (tmp_path / "small.toml").write_text(CONFIG)
    return "small.toml"


def _printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def _refused(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    assert main(arguments) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


# ---- what is submitted


def test_dry_run_prints_one_torchrun_a_node(
    config: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name not in ("PATH", "HOME")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("NCCL_TOKEN", "secret")
    monkeypatch.setenv("MINE", "1")
    options = ["--nodes", "2", "--gpus-per-node", "8", "--partition", "main", "--account", "me", "--time", "1:30:00"]
    options += ["--export", "MINE"]
    more = ["--setup", "module load cuda", "--sbatch", "reservation=big", "--dry-run", "--run.device", "cuda"]
    text = _printed([config, *options, *more], capsys)
    folder = f"{tmp_path}/runs/small/slurm"
    copy = next(word for word in text.split() if word.startswith(f"{folder}/small-"))
    train = Path(slurm.__file__).parent / "train.py"
    assert (
        text
        == f"""\
#!/bin/bash

# Parameters
#SBATCH --account=me
#SBATCH --cpus-per-task=32
#SBATCH --export=ALL
#SBATCH --gpus-per-node=8
#SBATCH --job-name=small
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output={folder}/%j/%j_0_log.out
#SBATCH --partition=main
#SBATCH --requeue
#SBATCH --reservation=big
#SBATCH --signal=USR2@60
#SBATCH --time=90
#SBATCH --wckey=submitit

# setup
module load cuda

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output {folder}/%j/%j_%t_log.out --kill-on-bad-exit=1 --wait=60 --cpus-per-task=32 \
{sys.executable} -u -m submitit.core._submit {folder}/%j

# variables of this shell that the job gets: HOME MINE NCCL_DEBUG PATH
# 16 ranks; in {tmp_path} each of the 2 tasks runs
#   {sys.executable} -m torch.distributed.run --nnodes=2 --nproc-per-node=8 --node-rank=$SLURM_NODEID \
--master-addr=<first host of $SLURM_JOB_NODELIST> --master-port=<from job id and restart count> --max-restarts=0 \
--signals-to-handle=SIGINT {train} {copy} --run.device cuda
"""
    )
    assert {path.name for path in tmp_path.iterdir()} == {"small.toml", "store"}  # nothing was written


def test_dry_run_prints_one_task_a_gpu(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--nodes", "2", "--gpus-per-node", "4", "--tasks-per", "gpu", "--no-requeue", "--mem", "0"]
    text = _printed([config, *options, "--exclusive", "--dry-run"], capsys)
    for line in ("ntasks-per-node=4", "cpus-per-task=4", "no-requeue", "mem=0", "exclusive"):
        assert f"#SBATCH --{line}\n" in text
    assert "#SBATCH --gpus-per-node" not in text  # run.device is cpu
    assert "torch.distributed.run" not in text
    assert "# 8 ranks; in " in text


def test_an_array_is_a_chain_of_jobs(config: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["--nodes", "1", "--gpus-per-node", "2", "--sbatch", "array=0-3%1", "--sbatch", "dependency=afterok:5"]
    text = _printed([config, *options, "--dry-run"], capsys)
    assert "#SBATCH --array=0-3%1\n" in text
    assert "#SBATCH --dependency=afterok:5\n" in text
    assert f"#SBATCH --output={tmp_path}/runs/small/slurm/%A_%a/%A_%a_0_log.out\n" in text


def test_overrides_are_parted_from_options_wherever_they_stand() -> None:
    words = ["--nodes", "2", "--run.steps", "-1", "a.toml", "--parallel.dp_shard=4", "--local", "--run.name"]
    assert split_overrides(words) == (
        ["--nodes", "2", "a.toml", "--local"],
        ["--run.steps", "-1", "--parallel.dp_shard=4", "--run.name"],
    )


@pytest.mark.parametrize(
    ("text", "expected"), [("90", 90), ("1:30:00", 90), ("00:00:01", 1), ("2-00:00:00", 2880), ("00:10:30", 11)]
)
def test_time_limits_are_read_as_minutes(text: str, expected: int) -> None:
    assert minutes(text) == expected


@pytest.mark.parametrize("text", ["0", "", "1:30", "00:00:00", "1h", "-5", "1:60:00"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as error:
        minutes(text)
    assert str(error.value) == f"{text!r}: minutes or [D-]HH:MM:SS are expected, for example 90 or 1:30:00"


# ---- what is refused


def test_every_problem_of_options_and_config_is_listed(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--nodes", "3", "--gpus-per-node", "3", "--local", "--time", "2", "--sbatch", "reservation"]
    lines = _refused([config, *options, "--data.stores.0.path", "lost"], capsys).splitlines()
    assert lines[:3] == [
        "error: --nodes = 3: must be 1 with --local (the local executor is this machine). Use --gpus-per-node.",
        "--time = '2 minutes': must be more than --signal-delay-s = 60 s and a minute "
        "(SLURM may send the signal a minute early, and the job would be queued again as soon as it starts).",
        "--sbatch = 'reservation': must be KEY=VALUE. For example --sbatch reservation=NAME.",
    ]
    assert lines[3].startswith("data.global_batch_size = 16: must be a multiple of the 9 ranks")
    assert lines[4].startswith("data.stores.0.path = 'lost': no such token store.")


def test_options_that_a_run_can_not_have_are_refused(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--sbatch", "array=0-3", "--sbatch", "export=ALL", "--export", "NOT_SET"]
    assert _refused([config, "--nodes", "1", "--gpus-per-node", "2", *options], capsys).splitlines() == [
        "error: --sbatch = 'array=0-3': must be array=0-N%1: one element after the other "
        "(a run is one folder, which one job at a time may write). Submit runs of other names one by one.",
        "--sbatch = 'export=ALL': is not passed on (the launcher decides it). Add variables by --export NAME.",
        "--export = 'NOT_SET': is not set in this shell.",
    ]


@pytest.mark.parametrize(
    ("text", "do"),
    [
        ("time=5", "Use --time."),
        ("tim=5", "Use --time."),  # sbatch takes it for time
        ("time-min=5", "Use --time."),
        ("nodes=2", "Use --nodes."),
        ("ntasks=4", "Use --gpus-per-node and --tasks-per."),
        ("ntasks-per-node=4", "Use --gpus-per-node and --tasks-per."),
        ("signal=USR1@5", "Use --signal-delay-s."),
        ("output=x", "See the logs in runs/NAME/slurm/JOB."),
        ("error=x", "See the logs in runs/NAME/slurm/JOB."),
        ("open-mode=truncate", "See the logs in runs/NAME/slurm/JOB."),
        ("requeue=yes", "Use --requeue."),
        ("no-requeue=yes", "Use --no-requeue."),
        ("cpus-per-task=1", "Use --cpus-per-task."),
        ("cpus-per-gpu=1", "Use --cpus-per-task."),
        ("gpus-per-node=1", "Use --gpus-per-node."),
        ("gpus=1", "Use --gpus-per-node."),
        ("gres=gpu:4", "Use --gpus-per-node."),
        ("job-name=x", "Use --job-name."),
        ("partition=x", "Use --partition."),
        ("exclusive=user", "Use --exclusive."),
        ("mem=1G", "Use --mem."),
        ("chdir=/", "Submit from the folder that the job is to run in."),
        ("arr=0-3", "Use array=0-N%1."),
    ],
)
def test_what_the_launcher_decides_is_not_passed_on(
    config: str, capsys: pytest.CaptureFixture[str], text: str, do: str
) -> None:
    options = ["--nodes", "1", "--gpus-per-node", "2", "--dry-run", "--sbatch", text]
    assert _refused([config, *options], capsys) == (
        f"error: --sbatch = '{text}': is not passed on (the launcher decides it). {do}\n"
    )


def test_other_options_pass_through(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    others = ("nodelist=n1", "exclude=n2", "begin=now", "nice=5", "mem-per-gpu=8G", "gres=lustre:1", "wckey=mine")
    options = [word for text in others for word in ("--sbatch", text)]
    text = _printed([config, "--nodes", "1", "--gpus-per-node", "2", "--dry-run", *options], capsys)
    for other in others:
        assert f"#SBATCH --{other}\n" in text


def test_what_the_launcher_asks_for_itself_can_not_be_set_twice(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--partition", "p", "--account", "a", "--constraint", "c", "--qos", "q", "--mem", "0", "--exclusive"]
    text = _printed(
        [config, "--nodes", "1", "--gpus-per-node", "2", "--dry-run", *options, "--run.device", "cuda"], capsys
    )
    keys = {line.removeprefix("#SBATCH --").split("=")[0] for line in text.splitlines() if line.startswith("#SBATCH")}
    assert keys - slurm.DECIDED.keys() == {"wckey"}  # a site's own accounting, which nothing here relies on


def test_counts_below_their_least_are_refused(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = _refused([config, "--nodes", "0", "--gpus-per-node", "-2", "--max-requeues", "-1"], capsys)
    assert "error: --nodes = 0: must be at least 1.\n--gpus-per-node = -2: must be at least 1.\n" in text
    assert "--max-requeues = -1: must be at least 0.\n" in text


def test_a_misspelt_key_of_the_config_is_refused(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = _refused([config, "--nodes", "1", "--gpus-per-node", "2", "--dry-run", "--run.stebs", "5"], capsys)
    assert text.startswith("error: --run.stebs: unknown")


def test_without_slurm_the_ways_out_are_said(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _refused([config, "--nodes", "1", "--gpus-per-node", "2"], capsys, code=1) == (
        "error: sbatch: not found, so there is no SLURM to submit to. Run this on a login node of the cluster; "
        "--dry-run prints the job, --local runs it on this machine.\n"
    )
    assert not (tmp_path / "runs").exists()


# ---- submitting, to a stand-in for sbatch that says what SLURM's says


def _install(folder: Path, monkeypatch: pytest.MonkeyPatch, sbatch: str) -> None:
    (folder / "bin").mkdir()
    for name in ("sbatch", "srun"):
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{sbatch}\n")
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:/bin:/usr/bin")


def test_a_submitted_job_leaves_private_files_and_says_how_to_follow_it(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _install(tmp_path, monkeypatch, f'cp "$1" {tmp_path}/submitted.sh; echo "$SLURM_CONF" > conf; echo "job 7"')
    monkeypatch.setenv("SLURM_CONF", "/etc/here")
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    text = _printed([config, "--nodes", "2", "--gpus-per-node", "2"], capsys)
    folder = tmp_path / "runs" / "small" / "slurm"
    log = folder / "7" / "7_0_log.out"
    assert text == (f"submitted job 7 (small, 2 x 2 ranks)\n  squeue -j 7\n  tail -F {log}\n  scancel 7\n")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert next(folder.glob("small-*.toml")).read_text() == CONFIG
    assert (folder / "7" / "7_submitted.pkl").exists()
    assert "#SBATCH --ntasks-per-node=1\n" in (tmp_path / "submitted.sh").read_text()
    assert (tmp_path / "conf").read_text() == "/etc/here\n"


def test_a_job_that_slurm_refuses_is_one_line(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _install(tmp_path, monkeypatch, 'echo "sbatch: error: invalid partition specified: x" >&2; exit 1')
    text = _refused([config, "--nodes", "1", "--gpus-per-node", "2", "--partition", "x"], capsys, code=1)
    assert text.splitlines()[-1] == (  # submitit has shown all that sbatch said
        "error: sbatch: refused the job: sbatch: error: invalid partition specified: x. "
        "See the whole job with --dry-run."
    )


# ---- real jobs on this machine

RANK = """
import os, sys
import torch, torch.distributed as dist
from launchers.env import environment_of, read_launch
os.environ.update(environment_of(read_launch(os.environ), os.environ))
dist.init_process_group("gloo")
total = torch.tensor(dist.get_rank() + 1)
dist.all_reduce(total)
if dist.get_rank() == 0:  # two ranks' words would mix in the one log
    print("total", total.item(), sys.argv[1:], flush=True)
dist.destroy_process_group()
"""


def _run_locally(config: str, script: str, options: list[str]) -> int:
    Path("rank.py").write_text(script)
    own, overrides = split_overrides([config, "--nodes", "1", "--local", *options])
    parsed = slurm.parser().parse_args(own)
    return slurm.run_locally(slurm.prepare(parsed, overrides, Path("rank.py")), parsed)


@pytest.mark.parametrize("tasks_per", ["node", pytest.param("gpu", marks=pytest.mark.long)])
def test_two_ranks_meet_in_a_local_job(config: str, capsys: pytest.CaptureFixture[str], tasks_per: str) -> None:
    options = ["--gpus-per-node", "2", "--tasks-per", tasks_per, "--run.steps", "3"]
    assert _run_locally(config, RANK, options) == 0
    text = capsys.readouterr().out
    assert text.startswith("log: ")
    assert "total 3 [" in text
    assert "'--run.steps', '3']" in text


def test_the_code_of_a_local_job_is_that_of_its_ranks(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--gpus-per-node", "1", "--tasks-per", "gpu"]
    assert _run_locally(config, "raise SystemExit(5)", options) == 5
    assert _run_locally(config, "import os; os.kill(os.getpid(), 9)", options) == 137


SIGNALLED = """
import json, os, pathlib, signal, threading
asked = threading.Event()
signal.signal(signal.SIGUSR2, lambda *_: asked.set())
run, first = pathlib.Path("runs/small"), not pathlib.Path("first").exists()
pathlib.Path("first").touch()
if first:
    os.kill(os.getppid(), signal.SIGUSR2)  # what SLURM sends before the time is up, here to the task alone
    asked.wait()
number = 1 if first else 2
for event in ("start", "end"):
    with (run / "attempts.jsonl").open("a") as file:
        line = {"event": event, "attempt": number, "from_step": 0, "job": "", "reason": "SIGUSR2" if first else "done"}
        file.write(json.dumps(line) + chr(10))
"""


def test_a_signal_reaches_the_ranks_and_the_job_starts_again(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run_locally(config, SIGNALLED, ["--gpus-per-node", "1", "--tasks-per", "gpu"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("attempt ")]
    assert [" ".join(line.split()[:3]).split(":")[0] for line in lines] == [
        "attempt 1",
        "attempt 1 ended",
        "attempt 2",
        "attempt 2 ended",
    ]
    assert lines[1].endswith("s: exit code 0, SIGUSR2, saved step 0; queued again: signalled")
    assert lines[3].endswith("s: exit code 0, saved step 0; not queued again: the run is done")


def test_a_job_runs_with_a_history_that_is_damaged(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/small").mkdir(parents=True)
    Path("runs/small/attempts.jsonl").write_text('{}\n{"attempt": 3}\n{"event": "end", "attempt": "4"}\n{"torn')
    assert _run_locally(config, "", ["--gpus-per-node", "1", "--tasks-per", "gpu"]) == 0
    assert "attempt 4 ended" in capsys.readouterr().out


def test_a_local_job_that_is_told_to_end_is_not_started_again(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = SIGNALLED.replace("os.getppid(), signal.SIGUSR2", "os.getppid(), signal.SIGTERM")
    assert _run_locally(config, script, ["--gpus-per-node", "1", "--tasks-per", "gpu"]) == 0
    last = capsys.readouterr().out.split("attempt 1 ended ")[1].splitlines()[0]
    assert last.endswith("exit code 0, SIGTERM, saved step 0; not queued again: the run was stopped by SIGUSR2")


def test_help_names_every_option() -> None:
    command = [sys.executable, slurm.__file__, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("usage: python launchers/slurm.py CONFIG --nodes N --gpus-per-node G [options]")
    for option in (
        "--constraint",
        "--qos",
        "--tasks-per",
        "--signal-delay-s",
        "--dry-run",
        "--local",
        "--section.field",
    ):
        assert option in done.stdout


@pytest.mark.long
def test_debug_trains_on_two_ranks_in_a_local_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["debug", "--nodes", "1", "--gpus-per-node", "2", "--local", "--run.device", "cpu"]
    arguments += ["--run.dir", str(tmp_path), "--run.steps", "4", "--checkpoint.every_steps", "2"]
    arguments += ["--data.stores.0.path", str(tmp_path / "store"), "--data.stores.0.max_bytes", "300000"]
    assert main(arguments) == 0, capsys.readouterr().out
    run = tmp_path / "debug"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert sorted(losses) == [1, 2, 3, 4]
    assert losses[4] < losses[1] < 1.2 * math.log(512)  # a vocabulary of 512, untrained
    assert json.loads((run / "config.resolved.json").read_text())["parallel"]["dp_shard"] == 2
    assert (run / "checkpoints" / "step-00000004").is_dir()
