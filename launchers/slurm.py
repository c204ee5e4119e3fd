"""Put a run into SLURM's queue, through submitit.

    python launchers/slurm.py configs/NAME.toml --nodes 4 --gpus-per-node 8 [--section.field VALUE ...]

The config is checked for that number of ranks before anything is queued. --dry-run prints the job, --local runs it on
this machine through submitit's local executor; neither needs SLURM. What the job does is in slurm_job.py, how signals
and requeueing behave in docs/slurm.md. Nothing here may know what a run computes.
"""

import argparse
import hashlib
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError

from configs.check import missing_files, resolve
from configs.errors import INTERRUPTED, ConfigError, RankFailure, RunError, problem
from configs.load import find_config, load_config
from configs.schema import Config
from launchers.exports import exported_names, job_environment
from launchers.requeue import EARLY_S, Limits
from launchers.slurm_job import SlurmJob

TRAIN_SCRIPT = Path(__file__).parent / "train.py"
CPUS_PER_RANK = 4
NAMESAKES = ("account", "constraint", "cpus-per-task", "exclusive", "gpus-per-node", "job-name", "mem", "nodes")
DECIDED = {
    **{key: f"Use --{key}." for key in (*NAMESAKES, "no-requeue", "partition", "qos", "requeue", "time")},
    **dict.fromkeys(("gpus", "gpus-per-task", "gpus-per-socket", "gpu-bind"), "Use --gpus-per-node."),
    **dict.fromkeys(
        ("ntasks", *(f"ntasks-per-{unit}" for unit in ("node", "core", "gpu", "socket"))),
        "Use --gpus-per-node and --tasks-per.",
    ),
    **dict.fromkeys(("export", "export-file"), "Add variables by --export NAME."),
    **dict.fromkeys(("output", "error", "open-mode"), "See the logs in runs/NAME/slurm/JOB."),
    "array": "Use array=0-N%1.",
    "chdir": "Submit from the folder that the job is to run in.",
    "cpus-per-gpu": "Use --cpus-per-task.",
    "signal": "Use --signal-delay-s.",
    "time-min": "Use --time.",
}
"""Options of sbatch that --sbatch may not set, and what to do instead."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A checked run and where its job's files go."""

    job: SlurmJob
    name: str
    folder: Path
    config_text: bytes
    config_copy: Path
    asks_for_gpus: bool
    num_elements: int
    """Elements of a job array, which go on with the run one after the other; 0 for a plain job."""


class DrySlurmExecutor(submitit.SlurmExecutor):
    """submitit's executor where there is no SLURM: it writes the script that would be submitted."""

    @classmethod
    def affinity(cls) -> int:
        """Claim that SLURM is here; nothing is submitted."""
        return 2

    def script_text(self, num_elements: int) -> str:
        """Give the sbatch script."""
        if num_elements:
            self.parameters["map_count"] = num_elements
        return self._make_submission_file_text(self._submitit_command_str, uid="")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit code."""
    try:
        own, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
        options = parser().parse_args(own)
        submission = prepare(options, overrides)
        if options.dry_run:
            print(dry_run_text(submission, options))
            return 0
        return run_locally(submission, options) if options.local else submit(submission, options)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED


def prepare(options: argparse.Namespace, overrides: Sequence[str], script: Path = TRAIN_SCRIPT) -> Submission:
    """Check options and config, all of it before anything is written; raise ConfigError with every problem."""
    path = find_config(Path(options.config))
    config = load_config(path, list(overrides))
    problems = option_problems(options)
    try:
        config = resolve(config, max(1, options.nodes * options.gpus_per_node))
    except ConfigError as error:
        problems += error.problems
    problems += missing_files(config)
    if problems:
        raise ConfigError(problems)
    folder = Path(config.run.dir, config.run.name, "slurm").absolute()
    text = path.read_bytes()
    # A job may start days from now: it reads this copy, which was checked, and not a file that is edited meanwhile.
    copy = folder / f"{path.stem}-{hashlib.sha256(text).hexdigest()[:8]}.toml"
    job = SlurmJob(
        script=str(script.absolute()),
        arguments=(str(copy), *overrides),
        ranks_per_node=options.gpus_per_node,
        tasks_per=options.tasks_per,
        folder=os.getcwd(),
        run_folder=str(folder.parent),
        limits=Limits(
            requeue=options.requeue,
            max_requeues=options.max_requeues,
            max_fruitless_starts=config.fault.max_fruitless_starts,
            signal_from_s=options.time * 60 - options.signal_delay_s - 2 * EARLY_S,
        ),
        meeting_limit_s=config.fault.rendezvous_timeout_s,
        local=options.local,
    )
    name = options.job_name or config.run.name
    return Submission(job, name, folder, text, copy, wants_gpus(config), num_elements(options.sbatch))


def wants_gpus(config: Config) -> bool:
    """A run on CPUs asks for no GPU, and --gpus-per-node then counts ranks."""
    return config.run.device != "cpu"


def option_problems(options: argparse.Namespace) -> list[str]:
    """List what is wrong with the options, apart from the config."""
    problems: list[str] = []
    for name in ("nodes", "gpus_per_node", "signal_delay_s", "max_requeues"):
        least = 0 if name == "max_requeues" else 1
        if getattr(options, name) < least:
            option = f"--{name.replace('_', '-')}"
            problems.append(problem(option, getattr(options, name), f"must be at least {least}"))
    if options.local and options.nodes != 1:
        why = "the local executor is this machine"
        problems.append(problem("--nodes", options.nodes, "must be 1 with --local", why, "Use --gpus-per-node."))
    if options.time * 60 <= options.signal_delay_s + EARLY_S:
        why = "SLURM may send the signal a minute early, and the job would be queued again as soon as it starts"
        expected = f"must be more than --signal-delay-s = {options.signal_delay_s} s and a minute"
        problems.append(problem("--time", f"{options.time} minutes", expected, why))
    problems += [
        problem("--sbatch", text, "must be KEY=VALUE", "", "For example --sbatch reservation=NAME.")
        for text in options.sbatch
        if not re.fullmatch(r"[a-z][a-z-]*=.+", text)
    ]
    for text in options.sbatch:
        if text.startswith("array=") and num_elements([text]) == 0:
            why = "a run is one folder, which one job at a time may write"
            do = "Submit runs of other names one by one."
            problems.append(problem("--sbatch", text, "must be array=0-N%1: one element after the other", why, do))
        if do := _instead_of(text):
            problems.append(problem("--sbatch", text, "is not passed on", "the launcher decides it", do))
    problems += [
        problem("--export", name, "is not set in this shell") for name in options.export if name not in os.environ
    ]
    return problems


def _instead_of(text: str) -> str:
    """Say what to do instead of an option that the launcher decides; empty for the others."""
    key, _, value = text.partition("=")
    if not key or not value or key == "array":  # looked at by themselves
        return ""
    if key in ("gres", "tres-per-task") and "gpu" in value:
        return DECIDED["gpus"]
    # sbatch takes the beginning of a name for the name; none of these begins with that of another option.
    return DECIDED.get(key) or next((do for name, do in DECIDED.items() if name.startswith(key)), "")


def num_elements(sbatch: Sequence[str]) -> int:
    """Count the elements of the job array that the options ask for; 0 without one."""
    found = (re.fullmatch(r"array=0-(\d+)%1", text) for text in sbatch)
    return next((int(match[1]) + 1 for match in found if match), 0)


def sbatch_parameters(submission: Submission, options: argparse.Namespace) -> dict[str, Any]:
    """Give the parameters of the job in submitit's words."""
    tasks = 1 if options.tasks_per == "node" else options.gpus_per_node
    # SLURM's default is one CPU a task: the ranks of a whole node would share it.
    cpus = options.cpus_per_task or CPUS_PER_RANK * options.gpus_per_node // tasks
    chosen = ("partition", "account", "constraint", "qos", "mem")
    extra = dict(text.split("=", 1) for text in options.sbatch if not text.startswith("array="))
    return {
        **{name: getattr(options, name) for name in chosen if getattr(options, name)},
        **({"gpus_per_node": options.gpus_per_node} if submission.asks_for_gpus else {}),
        **({"exclusive": True} if options.exclusive else {}),
        **({"setup": options.setup} if options.setup else {}),
        **({"array_parallelism": 1} if submission.num_elements else {}),
        "job_name": submission.name,
        "nodes": options.nodes,
        "ntasks_per_node": tasks,
        "cpus_per_task": cpus,
        "time": options.time,
        "signal_delay_s": options.signal_delay_s,
        "stderr_to_stdout": True,
        # One rank's death ends the job at once (srun would wait for the others), and srun does not inherit the CPUs.
        "srun_args": ["--kill-on-bad-exit=1", "--wait=60", f"--cpus-per-task={cpus}"],
        # All that sbatch is given: the variables on the list of exports.py.
        "additional_parameters": {"export": "ALL", "requeue" if options.requeue else "no-requeue": True} | extra,
    }


def dry_run_text(submission: Submission, options: argparse.Namespace) -> str:
    """Give the sbatch script and, as comments in it, what each task then runs."""
    executor = DrySlurmExecutor(submission.folder / "%j", options.max_requeues)
    executor.update_parameters(**sbatch_parameters(submission, options))
    if options.tasks_per == "node":
        one = options.nodes == 1
        place = ("0", "127.0.0.1") if one else ("$SLURM_NODEID", "<first host of $SLURM_JOB_NODELIST>")
        command = submission.job.torchrun_command(str(options.nodes), *place, "<from job id and restart count>")
    else:
        command = ["RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS ..."]
        command += submission.job.rank_command()
    words = [word if re.search(r"[$<]|=\$", word) else shlex.quote(word) for word in command]
    ranks = options.nodes * options.gpus_per_node
    return "\n".join(
        [
            executor.script_text(submission.num_elements).rstrip(),
            "",
            f"# variables of this shell that the job gets: {' '.join(exported_names(os.environ, options.export))}",
            f"# {ranks} ranks; in {submission.job.folder} each of the {executor._num_tasks()} tasks runs",
            f"#   {' '.join(words)}",
        ]
    )


def submit(submission: Submission, options: argparse.Namespace) -> int:
    """Queue the job and say how to follow it."""
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        do = "Run this on a login node of the cluster; --dry-run prints the job, --local runs it on this machine."
        raise RunError(problem("sbatch", "", "not found, so there is no SLURM to submit to", do=do))
    executor = submitit.SlurmExecutor(submission.folder / "%j", options.max_requeues)
    executor.update_parameters(**sbatch_parameters(submission, options))
    try:
        with job_environment(options.export):
            make_private_folder(submission)
            with executor.batch():  # several become an array
                jobs = [executor.submit(submission.job) for _ in range(max(1, submission.num_elements))]
    except (FailedJobError, FailedSubmissionError) as error:
        reason = str(error).strip().splitlines()[-1]
        do = "See the whole job with --dry-run."
        raise RunError(problem("sbatch", "", f"refused the job: {reason.rstrip('.')}", do=do)) from None
    first = jobs[0]
    number = first.job_id.split("_")[0]
    chain = f", {len(jobs)} in a row" if submission.num_elements else ""
    print(f"submitted job {number} ({submission.name}, {options.nodes} x {options.gpus_per_node} ranks{chain})")
    print(f"  squeue -j {number}\n  tail -F {first.paths.stdout}\n  scancel {number}")
    return 0


def run_locally(submission: Submission, options: argparse.Namespace) -> int:
    """Run the job on this machine, show its log and give its exit code."""
    executor = submitit.LocalExecutor(submission.folder / "%j", options.max_requeues)
    executor.update_parameters(
        timeout_min=options.time,
        signal_delay_s=options.signal_delay_s,
        gpus_per_node=options.gpus_per_node if submission.asks_for_gpus else 0,
        tasks_per_node=1 if options.tasks_per == "node" else options.gpus_per_node,
        stderr_to_stdout=True,
        setup=options.setup,
    )
    with job_environment(options.export):
        make_private_folder(submission)
        job = executor.submit(submission.job)
    print(f"log: {job.paths.stdout}", flush=True)
    try:
        _follow(job)
        return max(job.results())
    except KeyboardInterrupt:
        job.cancel()
        while not job.done():
            time.sleep(0.1)
        raise
    except UncompletedJobError:
        do = f"See {job.paths.stdout}."
        raise RankFailure(problem(f"job {job.job_id}", "", "ended without a result", do=do)) from None


def make_private_folder(submission: Submission) -> None:
    """Make the job's folder, for this user only: who can write submitit's pickles runs code as the user."""
    submission.folder.mkdir(parents=True, exist_ok=True)
    submission.folder.chmod(0o700)
    partial = submission.config_copy.with_suffix(".partial")
    partial.write_bytes(submission.config_text)
    os.replace(partial, submission.config_copy)


def _follow(job: submitit.Job[int]) -> None:
    """Copy the log of the first task to the terminal until the job is done."""
    position, done = 0, False
    while not done:
        done = job.done()  # asked before the last read, so that the last lines are seen
        if job.paths.stdout.exists():
            with job.paths.stdout.open(errors="replace") as log:
                log.seek(position)
                sys.stdout.write(log.read())
                sys.stdout.flush()
                position = log.tell()
        time.sleep(0 if done else 0.1)


def minutes(text: str) -> int:
    """Read a time limit, `90` or `[D-]HH:MM:SS`, as minutes, rounded up."""
    if re.fullmatch(r"\d+", text) and int(text):
        return int(text)
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", text)
    seconds = 0
    if found:
        days, hours, mins, secs = (int(part or 0) for part in found.groups())
        seconds = ((days * 24 + hours) * 60 + mins) * 60 + secs
    if not seconds:
        raise argparse.ArgumentTypeError(f"{text!r}: minutes or [D-]HH:MM:SS are expected, for example 90 or 1:30:00")
    return -(-seconds // 60)


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part the launcher's own arguments from `--section.field VALUE`, which belong to the config."""
    own: list[str] = []
    overrides: list[str] = []
    words = iter(arguments)
    for word in words:
        if re.match(r"--[a-z_]+\.", word):
            overrides.append(word)
            if "=" not in word:
                overrides += [value for value in [next(words, None)] if value is not None]
        else:
            own.append(word)
    return own, overrides


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    result = argparse.ArgumentParser(
        prog="python launchers/slurm.py",
        usage="%(prog)s CONFIG --nodes N --gpus-per-node G [options] [--section.field VALUE ...]",
        description="Submit a run to SLURM through submitit. The config is checked for N x G ranks first.",
        epilog="--section.field VALUE overrides the config; `python launchers/train.py --help` describes every field.",
        allow_abbrev=False,
    )
    result.add_argument("config", metavar="CONFIG", help="a TOML file or the name of a preset")
    where = result.add_argument_group("what to ask SLURM for")
    add = where.add_argument
    add("--nodes", type=int, required=True, metavar="N", help="nodes")
    add(
        "--gpus-per-node",
        type=int,
        required=True,
        metavar="G",
        help="GPUs, and ranks, a node; with run.device cpu: ranks",
    )
    add("--partition", help="partition (queue)")
    add("--account", help="account to charge")
    add("--qos", help="quality of service")
    add("--constraint", help="features that the nodes must have")
    add("--time", type=minutes, default=24 * 60, help="limit, in minutes or [D-]HH:MM:SS (default: 24 hours)")
    add("--cpus-per-task", type=int, metavar="N", help=f"CPUs a task (default: {CPUS_PER_RANK} for each of its ranks)")
    add("--mem", help="memory a node, as SLURM writes it: 200G, or 0 for all (default: the cluster's)")
    add("--exclusive", action="store_true", help="share the nodes with no other job")
    add("--job-name", metavar="NAME", help="name in the queue (default: run.name)")
    add("--sbatch", action="append", default=[], metavar="KEY=VALUE", help="any other option of sbatch; repeatable")
    text = "a variable that the job gets beyond those of the list (docs/slurm.md); repeatable"
    add("--export", action="append", default=[], metavar="NAME", help=text)
    how = result.add_argument_group("how to start and restart")
    add = how.add_argument
    add("--tasks-per", choices=("node", "gpu"), default="node", help="one torchrun a node (default), or one task a GPU")
    add("--setup", action="append", default=[], metavar="COMMAND", help="shell command before the run; repeatable")
    text = "queue again when the time is up or the job is preempted (default: yes)"
    add("--requeue", action=argparse.BooleanOptionalAction, default=True, help=text)
    add("--max-requeues", type=int, default=100, metavar="N", help="time-outs after which to give up (default: 100)")
    text = "save and requeue S seconds before the limit: a step, a save and some slack (default: 60)"
    add("--signal-delay-s", type=int, default=60, metavar="S", help=text)
    instead = result.add_argument_group("instead of submitting").add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="print the job; SLURM is not needed")
    instead.add_argument("--local", action="store_true", help="run on this machine, wait, exit with the job's code")
    return result


if __name__ == "__main__":
    sys.exit(main())
