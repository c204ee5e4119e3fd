"""Every kind of `[fault.inject]` once, in real processes: it strikes where it was told to, is answered, said, recorded.

What a run survives, it survives here one after the other in one training, whose end is held against an undisturbed run.
Kinds whose detectors have tests of their own (hangs, stragglers, bad numbers, drift, memory, data) are in those files;
the last test here sees that none is forgotten.
"""

import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from configs.check_inject import KINDS
from configs.faults import InjectConfig
from engine.fault.plan import plan_faults
from engine.fault.record import read_lines
from engine.metrics_log import read_metrics
from tests.runs import STEPS, Processes, assert_same_end, run_to_end

LONG, KILLED = 60, -signal.SIGKILL
DAMAGE = {
    "flip_checkpoint": r"has sha256 \w+\.\., the manifest says",
    "truncate_checkpoint": r"has \d+ bytes, the manifest says",
    "remove_checkpoint_file": r"is missing",
    "swap_checkpoint_files": r"has \d+ bytes, the manifest says",
}
SURVIVED: list[tuple[str, int, int, list[int], str, str]] = [
    # kind, rank, step, exit codes, what is said, what is recorded
    (
        "exception",
        1,
        7,
        [1, 1],
        "another rank (rank 1 RuntimeError: an exception of fault.inject). Read the traceback in runs/",
        "error",
    ),
    (
        "kill",
        1,
        12,
        [1, KILLED],
        "rank 0 of 2: lost contact with another rank (rank 1 was killed by SIGKILL). The same",
        "rank_lost",
    ),
    ("sigterm", 1, 17, [0, 0], "stopped by SIGTERM after step ", "stop"),
    ("sigusr1", 0, 22, [0, 0], "stopped by SIGUSR1 after step ", "stop"),
    ("sigusr2", 1, 27, [0, 0], "stopped by SIGUSR2 after step ", "stop"),
    ("sigint", 0, 32, [130, 130], "stopped by SIGINT after step ", "stop"),
    ("kill_in_save", 1, 36, [1, KILLED], "rank 0 of 2: lost contact with another rank", "rank_lost"),
    ("flip_checkpoint", 1, 42, [1, KILLED], "", "rank_lost"),
    ("truncate_checkpoint", 1, 47, [1, KILLED], "", "rank_lost"),
    ("remove_checkpoint_file", 1, 52, [1, KILLED], "", "rank_lost"),
    ("swap_checkpoint_files", 1, 57, [1, KILLED], "", "rank_lost"),
]


@pytest.fixture(scope="module")
def alone(workplace: Path) -> Path:
    """The same, of a single process."""
    code, output = run_to_end(workplace, 1, "--run.name", "alone")
    assert code == 0, output
    return workplace / "runs" / "alone"


SYNC = ("--checkpoint.asynchronous", "false")
"""A save in the background may belong to a later step than the fault, by the time that it is written."""


def inject(kind: str, **fields: Any) -> list[str]:
    """Write the options that have a fault injected."""
    pairs = {"kind": kind, **fields}
    return [word for name, value in pairs.items() for word in (f"--fault.inject.{name}", str(value))]


def injected(run: Path) -> list[tuple[str, int]]:
    return [(entry["kind"], entry["rank"]) for entry in read_lines(run / "injected.jsonl")]


@pytest.mark.long
def test_one_training_survives_them_one_after_the_other(workplace: Path) -> None:
    """Each start is told of the fault before as well, which must not come again."""
    command = ["--run.steps", str(LONG), "--checkpoint.keep_last", "3"]
    code, output = run_to_end(workplace, 2, "--run.name", "long", *command)
    assert code == 0, output
    run, outputs = workplace / "runs" / "survivor", []
    for kind, rank, step, codes, said, _ in SURVIVED:
        stage = {"stage": "between_shards"} if kind == "kill_in_save" else {}
        with Processes(workplace, 2, "--run.name", "survivor", *command,
                       *inject(kind, rank=rank, step=step, **stage)) as start:  # fmt: skip
            assert start.join(end_all=False) == codes, (kind, start.output())
            outputs.append(start.output())
        assert said in outputs[-1], (kind, outputs[-1])
        assert injected(run)[-1] == (kind, rank), "a fault happens once, where it was told to"
        assert step <= read_lines(run / "injected.jsonl")[-1]["step"] < LONG
    kind, rank, step, *_ = SURVIVED[-1]
    code, output = run_to_end(workplace, 2, "--run.name", "survivor", *command, *inject(kind, rank=rank, step=step))
    assert code == 0, output
    outputs.append(output)
    assert injected(run) == [(kind, rank) for kind, rank, *_ in SURVIVED]
    faults = read_lines(run / "faults.jsonl")
    for number, ((kind, *_, recorded), entry) in enumerate(
        zip(SURVIVED, read_lines(run / "injected.jsonl"), strict=True), start=1
    ):
        assert any((fault["kind"], fault["attempt"]) == (recorded, number) for fault in faults), (kind, faults)
        if kind in DAMAGE:  # the start after it has met it
            file = Path(entry["file"])
            refusal = rf"refused {file.parent.name}: .*{file.name} {DAMAGE[kind]}"
            assert re.search(refusal, outputs[number]), (kind, outputs[number])
            refused = [fault for fault in faults if fault["kind"] == "checkpoint_refused" and fault["attempt"] > number]
            assert refused[0]["what"].startswith(file.parent.name)
    assert_same_end(run, workplace / "runs" / "long")


@pytest.mark.long
def test_bad_disks_cost_checkpoints_and_no_step(workplace: Path, whole: Path) -> None:
    """Full, read-only and slow, in one run that goes on all the same; blocking saves, so that a slow one is seen."""
    kinds = ("disk_full", "read_only_disk", "slow_disk")
    config = InjectConfig(kind="random", count=3, kinds=kinds, seed=51, seconds=0.2)
    plan = plan_faults(config, STEPS, 2)
    assert sorted(planned.kind for planned in plan) == sorted(kinds), "the seed is chosen for one of each"
    drawn = inject("random", count=3, kinds='["disk_full", "read_only_disk", "slow_disk"]', seed=51, seconds=0.2)
    command = ["--run.name", "disks", "--checkpoint.asynchronous", "false", *drawn]
    code, output = run_to_end(workplace, 2, *command)
    assert code == 0, output
    run = workplace / "runs" / "disks"
    assert sorted(injected(run)) == sorted((planned.kind, planned.rank) for planned in plan)
    failed = [fault for fault in read_lines(run / "faults.jsonl") if fault["kind"] == "save_failed"]
    for error in ("No space left on device (errno 28)", "Read-only file system (errno 30)"):
        (fault,) = [fault for fault in failed if error in fault["what"]]
        assert f"save_failed: {fault['what']} (step {fault['step']}). Tried again at the next due step" in output
    slow = next(entry["step"] for entry in read_lines(run / "injected.jsonl") if entry["kind"] == "slow_disk")
    stalls = {entry["step"]: entry["checkpoint_stall_s"] for entry in read_metrics(run / "metrics.jsonl")
              if entry["kind"] == "step"}  # fmt: skip
    assert max(stalls[step] for step in (slow, slow + 1) if step in stalls) >= 0.4, (slow, stalls)
    assert_same_end(run, whole)


@pytest.mark.long
def test_a_disk_that_stays_full_ends_the_run_with_its_last_good_checkpoint(workplace: Path, whole: Path) -> None:
    """Three saves in a row; then that of the last step, which never may fail."""
    run = workplace / "runs" / "full"
    code, output = run_to_end(workplace, 2, "--run.name", "full", *inject("disk_full", rank=1, step=8, steps=3), *SYNC)
    assert code == 1
    assert output.count("error: checkpoint of step 20: rank 1: ") == 1, output
    assert "Traceback" not in output
    faults = [fault for fault in read_lines(run / "faults.jsonl") if fault["kind"] != "straggler"]
    in_a_row = [fault["more"]["in_a_row"] for fault in faults]
    assert in_a_row == [1, 2, 3]
    code, output = run_to_end(workplace, 2, "--run.name", "full", *inject("disk_full", rank=0, step=STEPS), *SYNC)
    assert code == 1
    assert "continuing from runs/full/checkpoints/step-00000005\n" in output
    assert f"error: checkpoint of step {STEPS}: rank 0: " in output
    assert "The run ends" in output
    code, output = run_to_end(workplace, 2, "--run.name", "full")
    assert code == 0, output
    assert "continuing from runs/full/checkpoints/step-00000020\n" in output
    assert_same_end(run, whole)


def test_the_stop_file_is_made_and_heeded(workplace: Path) -> None:
    run = workplace / "runs" / "file"
    command = ("--run.name", "file", "--run.steps", "100000", "--lr.schedule", "constant")
    code, output = run_to_end(workplace, 2, *command, *inject("stop_file", rank=1, step=3))
    assert code == 0, output
    assert "stopped by the stop file after step " in output
    assert injected(run) == [("stop_file", 1)]
    assert [fault["kind"] for fault in read_lines(run / "faults.jsonl")] == ["stop"]
    assert not (run / "stop").exists()


def test_a_corrupt_batch_ends_the_run_by_place_and_another_reading_goes_on(workplace: Path, alone: Path) -> None:
    run, command = workplace / "runs" / "corrupt", ("--run.name", "corrupt", *inject("corrupt_batch", step=7))
    code, output = run_to_end(workplace, 1, *command)
    assert (code, output.count("error:"), output.count("Traceback")) == (1, 1, 0), output
    assert re.search(
        r"error: batch of step \d+: sequence \d+: store/train/tokens-00000.bin: token \d+ = 65535: ", output
    )
    assert [fault["kind"] for fault in read_lines(run / "faults.jsonl")] == ["bad_batch"]
    assert run_to_end(workplace, 1, *command)[0] == 0
    assert_same_end(run, alone)


def test_a_store_that_is_cut_under_a_run_ends_it_by_name(workplace: Path, tmp_path: Path) -> None:
    """It destroys the store, so it has one of its own."""
    shutil.copytree(workplace / "store", tmp_path / "store")
    shutil.copy(workplace / "tiny.toml", tmp_path)
    code, output = run_to_end(tmp_path, 1, *inject("truncate_store", step=7))
    assert (code, output.count("error:"), output.count("Traceback")) == (1, 1, 0), output
    assert "store/train/tokens-00000.bin: has 0 bytes, the manifest says " in output
    assert [fault["kind"] for fault in read_lines(tmp_path / "runs" / "tiny" / "faults.jsonl")] == ["bad_batch"]


def test_without_a_second_holder_no_flipped_bit_could_be_found(workplace: Path) -> None:
    code, output = run_to_end(workplace, 2, "--run.name", "flipped", *inject("flip_parameter", step=3))
    assert code == 2
    assert (
        "error: fault.inject.kind = 'flip_parameter': no two ranks hold the same (a flipped bit is found by" in output
    )
    assert "Traceback" not in output


def test_every_kind_strikes_in_some_test() -> None:
    """By name, in the files that start runs."""
    texts = "".join(path.read_text() for path in Path(__file__).parent.rglob("*.py"))
    assert not [kind for kind in KINDS if f'"{kind}"' not in texts]
