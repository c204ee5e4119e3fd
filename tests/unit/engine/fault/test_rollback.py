"""Which batch a step learns from after roll backs, how they are counted, and the file that keeps them."""

import json
from pathlib import Path

import pytest

from configs.errors import DataError
from engine.checkpoint.manifest import expired_steps
from engine.fault.rollback import RollBacks


def test_no_batch_of_a_bad_step_is_seen_again_and_no_other_is_left_out(tmp_path: Path) -> None:
    """Three roll backs, two of them from the same place; each batch but the bad ones stands once, in order."""
    rollbacks = RollBacks(tmp_path / "rollbacks.json")
    assert [rollbacks.batch_of(step) for step in (1, 2, 30)] == [0, 1, 29]
    rollbacks.add(8, 10, 13)  # of batches 9 to 12
    rollbacks.add(8, 11, 14)  # step 10 learned from 13; of batches 14 to 17
    rollbacks.add(20, 22, 22)  # steps 11 to 21 learned from 18 to 28; of batch 29
    seen = [rollbacks.batch_of(step) for step in range(1, 26)]
    assert seen == [*range(9), 13, *range(18, 29), *range(30, 34)]


def test_roll_backs_are_in_a_row_until_a_checkpoint_lies_behind_the_bad_steps(tmp_path: Path) -> None:
    rollbacks = RollBacks(tmp_path / "rollbacks.json")
    assert rollbacks.in_a_row(8) == 0
    rollbacks.add(8, 10, 13)
    assert [rollbacks.in_a_row(step) for step in (8, 13, 14)] == [1, 1, 0]
    rollbacks.add(12, 13, 16)
    assert [rollbacks.in_a_row(step) for step in (8, 12, 16, 17)] == [2, 2, 2, 0]
    rollbacks.add(20, 21, 24)
    assert [rollbacks.in_a_row(step) for step in (20, 25)] == [1, 0]


def test_what_is_written_is_read_and_whichever_list_is_longer_holds(tmp_path: Path) -> None:
    path = tmp_path / "rollbacks.json"
    first = RollBacks(path)
    assert first.read() == []
    first.add(8, 10, 13)
    in_checkpoint = json.loads(json.dumps(first.state()))
    first.add(8, 11, 14)
    first.write()
    assert [entry.name for entry in tmp_path.iterdir()] == ["rollbacks.json"]
    killed = RollBacks(path)
    killed.load(in_checkpoint, killed.read())
    assert killed.all == first.all, "the folder knows of the roll back after the checkpoint"
    path.unlink()
    copied = RollBacks(path)
    copied.load(in_checkpoint, copied.read())
    assert copied.all == first.all[:1], "a checkpoint that was taken elsewhere knows its own"
    copied.forget()
    assert not path.exists()


@pytest.mark.parametrize("text", ["", "{", "[1]", '[{"to_step": 1}]', '{"a": 1}', '[{"to_step": 1, "x": 2}]', "null"])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rollbacks.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        RollBacks(path).read()
    assert str(caught.value).startswith(f"{path}: can't be read (")
    assert str(caught.value).endswith("Restore it; without it the run would repeat the data of bad steps.")


def test_the_checkpoint_before_bad_steps_stays_whatever_is_kept() -> None:
    losses = dict.fromkeys([2, 4, 6, 8, 10, 12])
    kept = {"keep_last": 1, "keep_every": 0, "keep_best": False}
    assert expired_steps(losses, 12, **kept) == [2, 4, 6, 8, 10]
    assert expired_steps(losses, 12, **kept, keep_before=9) == [2, 4, 6, 10]
    assert expired_steps(losses, 12, **kept, keep_before=8) == [2, 4, 8, 10]
    assert expired_steps(losses, 12, **kept, keep_before=2) == [2, 4, 6, 8, 10], "there is none"
