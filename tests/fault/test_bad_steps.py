"""Losses and gradients are spoiled in real runs: steps are skipped, the run goes back and on, or ends by name.

Each document is a sequence of its own, of a length of its own, so that the number of targets of a step tells which
batch it learned from.
"""

import json
import random
import shutil
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.checkpointer import open_checkpoint
from engine.checkpoint.manifest import step_folder
from engine.data.prepare import PrepareOptions, prepare
from engine.fault.record import read_lines
from engine.metrics_log import read_metrics
from tests.runs import CONFIG, STEPS, VOCAB, Processes, assert_same_end, run_to_end

SHORT = CONFIG.replace("global_batch_size = 8", 'global_batch_size = 8\npacking = "none"')
KEEP_ALL = ("--checkpoint.keep_last", "30")
KEEP = (*KEEP_ALL, "--eval.every_steps", "0")
SPIKE = (*KEEP, "--checkpoint.every_steps", "1", "--fault.spike_threshold", "30", "--fault.spike_window", "8",
         "--fault.inject.kind", "spike", "--fault.inject.rank", "1", "--fault.inject.step", "9",
         "--fault.inject.steps", "3", "--fault.inject.repeat", "true")  # fmt: skip
NAN_LOSS = ("--eval.every_steps", "0", "--checkpoint.every_steps", "3", "--fault.inject.kind", "nan_loss",
            "--fault.inject.rank", "1", "--fault.inject.step", "8", "--fault.inject.steps", "4")  # fmt: skip
NAN_GRAD = (*KEEP, "--fault.inject.kind", "nan_grad", "--fault.inject.step", "9", "--fault.inject.steps", "4",
            "--fault.inject.repeat", "true")  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workplace")
    draw, texts = random.Random(3), folder / "texts"
    texts.mkdir()
    for number in range(400):
        words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(draw.randint(1, 6))]
        (texts / f"{number:03d}.txt").write_text(" ".join(words) + "\n")
    prepare(PrepareOptions(sources=(str(texts),), out=folder / "store", train_tokenizer=VOCAB, workers=1))
    (folder / "tiny.toml").write_text(SHORT)
    return folder


def finished(workplace: Path, name: str, *argv: str) -> Path:
    code, output = run_to_end(workplace, 2, "--run.name", name, *argv)
    assert code == 0, output
    return workplace / "runs" / name


def faults(run: Path, *kinds: str) -> list[dict[str, Any]]:
    return [entry for entry in read_lines(run / "faults.jsonl") if entry["kind"] in kinds]


def leave_checkpoints(run: Path, step: int) -> None:
    """Remove those from after a step."""
    for path in (run / "checkpoints").iterdir():
        if path.name > step_folder(step):
            shutil.rmtree(path)


def state_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    reader = open_checkpoint(run / "checkpoints", step=step)
    return {name: reader.read(name) for name in reader.names("")}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def targets_of_steps(run: Path) -> list[int]:
    """Count the targets of each step; every step must be logged, once."""
    entries = [entry for entry in read_metrics(run / "metrics.jsonl") if entry["kind"] == "step"]
    assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))
    totals = [0, *(entry["num_tokens"] for entry in entries)]
    return [after - before for before, after in pairwise(totals)]


@pytest.fixture(scope="module")
def spiked(workplace: Path) -> Path:
    return finished(workplace, "spiked", *SPIKE)


@pytest.fixture(scope="module")
def gone_back(workplace: Path) -> Path:
    return finished(workplace, "gone-back", *NAN_LOSS, *KEEP_ALL)


def test_a_skipped_step_leaves_weights_and_moments_alone_and_is_told(spiked: Path) -> None:
    states = {step: state_of(spiked, step) for step in (7, 8, 9, 11, 12)}
    assert same(states[8], states[9]) and same(states[8], states[11])
    assert not same(states[7], states[8]) and not same(states[11], states[12])
    told = faults(spiked, "spike", "non_finite", "roll_back")
    assert [(one["kind"], one["step"], one["did"]) for one in told] == [
        ("spike", step, "The update was not applied") for step in (9, 10, 11)
    ]
    first = told[0]["more"]
    assert first["loss"] > 20 and (first["batch"], first["sequences"]) == (8, [64, 71])
    assert first["checkpoint"] in ("step-00000007", "step-00000008"), "the last may still be in the writing"
    logged = {entry["step"]: entry for entry in read_metrics(spiked / "metrics.jsonl")}
    assert (logged[9]["loss"], logged[9]["grad_norm"]) == (first["loss"], first["grad_norm"])


@pytest.mark.long
def test_killed_among_bad_steps_the_rest_is_judged_as_if_nothing_had_been(workplace: Path, spiked: Path) -> None:
    """What a kill leaves is what was saved until then, so the moment is chosen by the checkpoints that are left."""
    run = workplace / "runs" / "resumed"
    shutil.copytree(spiked, run)
    leave_checkpoints(run, 10)
    (run / "faults.jsonl").unlink()
    finished(workplace, "resumed", *SPIKE)
    assert_same_end(run, spiked)
    assert open_checkpoint(run / "checkpoints").meta["guard"] == open_checkpoint(spiked / "checkpoints").meta["guard"]
    assert [(one["kind"], one["step"]) for one in faults(run, "spike")] == [("spike", 11)]


def test_too_many_in_a_row_take_the_run_back_and_on_without_their_data(workplace: Path, gone_back: Path) -> None:
    (one,) = json.loads((gone_back / "rollbacks.json").read_text())
    assert one == {"to_step": 6, "first": 8, "last": 11, "batch": 11}
    told = faults(gone_back, "non_finite", "roll_back")
    assert [(entry["kind"], entry["step"], entry["rank"]) for entry in told] == [
        *(("non_finite", step, 1) for step in (8, 9, 10, 11)),
        ("roll_back", 11, None),
    ]
    assert told[0]["more"]["loss"] == "nan" and told[0]["more"]["batch"] == 7
    assert told[-1]["did"] == "Went back to step-00000006, and on without the data of batches 7 to 10"
    plain = finished(workplace, "plain", "--run.steps", str(STEPS + 4), "--eval.every_steps", "0")
    batches = targets_of_steps(plain)
    assert len(set(batches)) > STEPS // 2, "the counts tell batches apart"
    assert targets_of_steps(gone_back) == [*batches[:7], *batches[11:]]


@pytest.mark.long
def test_killed_after_going_back_the_same_command_ends_the_same(workplace: Path, gone_back: Path) -> None:
    """For real as soon as it has gone back, and before its next checkpoint by what is left then.

    Of those that are kept by count the only one lies among the bad steps: the one before them stays nevertheless.
    """
    command = ("--run.name", "killed", *NAN_LOSS, "--checkpoint.keep_last", "1")
    run = workplace / "runs" / "killed"
    with Processes(workplace, 2, *command) as start:
        start.until((run / "rollbacks.json").exists)
        start.send(signal.SIGKILL)
        start.join()
    finished(workplace, *command[1:])
    assert_same_end(run, gone_back)
    early = workplace / "runs" / "early"
    shutil.copytree(gone_back, early)
    leave_checkpoints(early, 6)
    finished(workplace, "early", *NAN_LOSS, *KEEP_ALL)
    assert_same_end(early, gone_back)


def test_it_gives_up_after_going_back_as_often_as_it_may(workplace: Path) -> None:
    """Every start comes to the same end; what it may do is counted over all of them."""
    text = (
        "error: steps 9 to 12: loss {}, grad_norm nan: must be finite (no update of theirs was applied; gone back "
        "fault.rollback_limit = 2 times in a row already). The same command would come to the same step: lower "
        "optim.lr or lengthen lr.warmup_steps under another --run.name, or look at the data of these steps.\n"
    )
    run = workplace / "runs" / "given-up"
    for _ in range(2):
        code, output = run_to_end(workplace, 2, "--run.name", "given-up", *NAN_GRAD)
        assert code == 1, output
        begin, end = text.split("{}")
        assert output.count("error: ") == 1 and begin in output and end in output, output
        assert [one["batch"] for one in json.loads((run / "rollbacks.json").read_text())] == [12, 16]
    assert len(faults(run, "roll_back")) == 2
    assert [entry["step"] for entry in faults(run, "non_finite") if entry["did"].startswith("The run ended: ")] == [
        12
    ] * 2


def test_without_skips_and_roll_backs_the_first_bad_step_ends_the_run(workplace: Path) -> None:
    argv = ("--run.name", "strict", "--fault.skip_limit", "0", "--fault.rollback_limit", "0", *NAN_GRAD)
    code, output = run_to_end(workplace, 1, *argv, "--checkpoint.every_steps", "4")
    assert code == 1
    assert "error: step 9: loss " in output and "applied; fault.rollback_limit = 0)" in output, output
    steps = sorted(path.name for path in (workplace / "runs" / "strict" / "checkpoints").iterdir())
    assert steps == ["step-00000004", "step-00000008"]


@pytest.mark.long
def test_a_rank_whose_copy_has_changed_is_found_before_it_is_saved(workplace: Path) -> None:
    """What the ranks of tp hold alike; tests/layouts/test_same_on_all_ranks.py has the other copies there are."""
    name = "flipped"
    argv = ("--parallel.tp", "2", "--fault.inject.kind", "flip_parameter", "--fault.inject.step", "8",
            "--fault.inject.rank", "1", *KEEP)  # fmt: skip
    code, output = run_to_end(workplace, 2, "--run.name", name, *argv)
    run = workplace / "runs" / name
    assert code == 1, output
    assert (
        "error: ranks 0 on " in output
        and "differs from one another, after step 10, since the last check at step 5" in output
    )
    (fault,) = faults(run, "replica_drift")
    drifted = fault["more"]["drifted"]
    assert drifted[0]["name"].startswith("model.") and (drifted[0]["ranks"], fault["step"]) == ([0, 1], 10)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000005"]
    finished(workplace, name, *argv)
    assert_same_end(run, finished(workplace, "whole-tp", "--parallel.tp", "2", *KEEP))
