"""Whatever happens to the newest checkpoints, the last good one stays until there is another good one.

What is good is judged by the reader of tools, which shares nothing with a run's memory of what it has proved.
"""

import multiprocessing
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

from configs.errors import CheckpointError
from configs.schema import CheckpointConfig
from engine.checkpoint.checkpointer import Checkpointer
from engine.checkpoint.manifest import step_folder
from engine.checkpoint.reader import open_checkpoint
from tests.ranks import PRELOADED

KILLED = 37

DAMAGES: dict[str, Callable[[Path], object]] = {
    "none": lambda path: None,
    "cut": lambda path: os.truncate(path / "model-rank-00000.safetensors", 9),
    "flipped": lambda path: (path / "model-rank-00000.safetensors").write_bytes(
        (path / "model-rank-00000.safetensors").read_bytes()[:-1] + b"\7"
    ),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
}


def model_of(step: int) -> nn.Module:
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.fill_(step)
    return model


def save(folder: Path, steps: list[int], keep_last: int = 1) -> None:
    """One start of a run that finds what is there and saves these steps."""
    with Checkpointer(folder, CheckpointConfig(keep_last=keep_last, asynchronous=False)) as checkpointer:
        checkpointer.find_latest()
        for step in steps:
            checkpointer.save(step, model_of(step), None, {"step": step})


def good_steps(folder: Path) -> list[int]:
    found = []
    for path in sorted(folder.glob("step-*")):
        try:
            reader = open_checkpoint(path)
        except CheckpointError:
            continue
        assert torch.equal(reader.read("model.weight"), torch.full((4, 4), float(reader.step)))
        found.append(reader.step)
    return found


@pytest.mark.parametrize("damages", list(product(DAMAGES, repeat=2)), ids="-".join)
@pytest.mark.parametrize("keep_last", [1, 2])
def test_the_last_good_one_stays_when_newer_ones_are_damaged(
    tmp_path: Path, damages: tuple[str, str], keep_last: int
) -> None:
    save(tmp_path, [10, 20, 30], keep_last=3)
    for step, damage in zip((20, 30), damages, strict=True):
        DAMAGES[damage](tmp_path / step_folder(step))
    good = good_steps(tmp_path)
    newest = good[-1]
    save(tmp_path, [], keep_last)  # a start that dies before its first save
    assert good_steps(tmp_path) == good
    save(tmp_path, [newest + 5], keep_last)
    assert good_steps(tmp_path) == ([newest, newest + 5] if keep_last == 2 else [newest + 5])


def die_in_a_save(folder: Path, stage: str) -> None:
    def at(reached: str) -> None:
        if reached == stage:
            os._exit(KILLED)

    with Checkpointer(folder, CheckpointConfig(keep_last=1, asynchronous=False), at=at) as checkpointer:
        checkpointer.find_latest()
        checkpointer.save(20, model_of(20), None, {"step": 20})


@pytest.mark.parametrize("stage", ["before_manifest", "before_rename", "after_rename"])
def test_a_kill_between_rename_and_deletion_leaves_both_and_the_older_one_serves(tmp_path: Path, stage: str) -> None:
    save(tmp_path, [10])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    child = context.Process(target=die_in_a_save, args=(tmp_path, stage))
    child.start()
    child.join()
    assert child.exitcode == KILLED
    committed = stage == "after_rename"
    assert good_steps(tmp_path) == ([10, 20] if committed else [10])
    if committed:
        DAMAGES["cut"](tmp_path / step_folder(20))
    save(tmp_path, [15])
    assert good_steps(tmp_path) == [15]
    save(tmp_path, [20])
    assert good_steps(tmp_path) == [20]


def test_a_save_that_fails_deletes_nothing(tmp_path: Path) -> None:
    save(tmp_path, [10])

    def at(reached: str) -> None:
        if reached == "before_rename":
            raise OSError(28, "No space left on device", str(tmp_path))

    with pytest.raises(CheckpointError, match="No space left"):  # noqa: SIM117 - the error comes on leaving, too
        with Checkpointer(tmp_path, CheckpointConfig(keep_last=1, asynchronous=False), at=at) as checkpointer:
            checkpointer.save(20, model_of(20), None, {"step": 20})
    assert good_steps(tmp_path) == [10]
    assert os.listdir(tmp_path) == ["step-00000010"]
