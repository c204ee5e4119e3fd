"""What a run reads is proved at its start, remembered, and looked at once more when it is read."""

import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from configs.check import resolve
from configs.errors import CheckpointError, DataError
from configs.load import load_config
from engine import proof
from engine.checkpoint.manifest import Manifest, check_files
from engine.checkpoint.storage import require_space
from engine.data.store import TokenStore, all_files
from engine.fault.record import FaultLog, read_lines
from engine.files import write_whole
from engine.ranks import Ranks
from tests.fault.test_bad_input import small_disk
from tests.ranks import run_ranks
from tests.runs import Processes, last_step, make_workplace, run_to_end

__all__ = ["small_disk"]

SHARD = "store/train/tokens-00000.bin"
SHORT = ("--run.steps", "4", "--lr.schedule", "constant")


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    folder = tmp_path / "workplace"
    folder.mkdir()
    return make_workplace(folder)


def flip(path: Path) -> None:
    data = path.read_bytes()
    with path.open("r+b") as file:  # in its place: the inode stays
        file.write(bytes([data[0] ^ 1]))


def prove_on_a_rank(workplace: Path, round_bytes: int = proof.ROUND_BYTES) -> tuple[str, list[str], int]:
    """Return the error, what was said, and how often there was a word of going on."""
    os.chdir(workplace)
    proof.ROUND_BYTES, beats = round_bytes, list[None]()
    config, said = resolve(load_config(Path("tiny.toml"), []), 1), []
    ranks = Ranks(60.0)
    try:
        log = FaultLog(workplace / "faults.jsonl", ranks.index, said.append)
        stamp = workplace / "proved.json"
        proof.prove_inputs(config, ranks, stamp, log, said.append, resuming=False, beat=lambda: beats.append(None))
        return "", said, len(beats)
    except DataError as error:
        return str(error), said, len(beats)
    finally:
        ranks.close()


def test_all_ranks_come_to_one_verdict_and_record_it_once(workplace: Path) -> None:
    assert run_ranks(3, prove_on_a_rank, workplace) == [("", [], 1)] * 3
    proved = (workplace / "proved.json").read_text()
    flip(workplace / SHARD)
    flip(workplace / "store/heldout/bytes.bin")
    answers = run_ranks(3, prove_on_a_rank, workplace)
    assert len(set(map(str, answers))) == 1
    first, second = answers[0][0].splitlines()
    assert first.startswith("store/heldout/bytes.bin: was altered (its sha256 is ")
    assert second.startswith(f"{SHARD}: was altered (its sha256 is ")
    assert second.endswith("Restore it from a copy, or make it again.")
    assert (workplace / "proved.json").read_text() == proved
    (fault,) = read_lines(workplace / "faults.jsonl")
    assert (fault["kind"], fault["rank"], len(fault["more"]["all"])) == ("corrupt_input", 0, 2)


def test_what_was_proved_in_an_earlier_round_is_remembered(workplace: Path) -> None:
    """A start that is ended among terabytes goes on where it was."""
    flip(workplace / "store/train/bytes.bin")
    ((error, _, beats), *others) = run_ranks(2, prove_on_a_rank, workplace, 1)
    assert error.startswith("store/train/bytes.bin: was altered (its sha256 is ") and error.count("was altered") == 1
    assert [(text, count) for text, _, count in others] == [(error, beats)]
    names = {str(workplace / "store" / name) for name in all_files(TokenStore.open(workplace / "store").manifest)}
    assert beats == len(names), "a round for each file"
    assert set(json.loads((workplace / "proved.json").read_text())) == names - {
        str(workplace / "store/train/bytes.bin")
    }


def test_what_was_proved_is_not_read_again_until_it_changes(workplace: Path) -> None:
    """A flipped bit under an unchanged time shows who reads: the run that knows the file doesn't, another one does."""
    assert run_to_end(workplace, 2, *SHORT)[0] == 0
    shard = workplace / SHARD
    before = shard.stat()
    flip(shard)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    code, output = run_to_end(workplace, 1, "--run.steps", "5", "--lr.schedule", "constant")
    assert code == 0, output
    code, output = run_to_end(workplace, 1, *SHORT, "--run.name", "another")
    assert code == 1
    assert f"error: {SHARD}: was altered" in output
    os.utime(shard)
    code, output = run_to_end(workplace, 1, "--run.steps", "6", "--lr.schedule", "constant")
    assert code == 1
    assert f"error: {SHARD}: was altered" in output


def test_a_store_that_is_cut_under_a_run_ends_it_with_a_message(workplace: Path) -> None:
    """Under a mapping the kernel would end the process by SIGBUS."""
    run = workplace / "runs" / "tiny"
    with Processes(workplace, 1, "--run.steps", "1000000", "--eval.every_steps", "0") as processes:
        processes.until(lambda: last_step(run) >= 3)
        os.truncate(workplace / SHARD, 16)
        (code,) = processes.join()
        output = processes.output()
    assert code == 1, output
    assert f"{SHARD}: has 16 bytes, the manifest says " in output
    assert (output.count("error: "), output.count("Traceback")) == (1, 0)
    (fault,) = [fault for fault in read_lines(run / "faults.jsonl") if fault["kind"] == "bad_batch"]
    assert f"error: batch of step {fault['step']}: sequence " in output


def test_bounds_and_tokens_that_can_not_be_are_said_with_their_place(workplace: Path) -> None:
    shard = workplace / SHARD
    with shard.open("r+b") as file:
        file.seek(2 * 7)
        file.write(np.array([300], dtype="<u2").tobytes())
    split = TokenStore.open(workplace / "store").split("train")
    assert len(split.read(0, 7)) == 7
    with pytest.raises(DataError, match=r"tokens-00000\.bin: token 7 = 300: must be below 300, the tokens of the"):
        split.read(3, 20)


# ---- file systems


def manifest_of(path: Path, *names: str) -> Manifest:
    return Manifest(step=1, files={name: write_whole(path / name, b"hemp") for name in names}, tensors={})


def test_a_file_that_comes_into_sight_late_is_waited_for(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, "a", "b")
    (tmp_path / "b").rename(tmp_path / "hidden")
    appear = threading.Timer(0.1, lambda: (tmp_path / "hidden").rename(tmp_path / "b"))
    appear.start()
    assert check_files(tmp_path, manifest, ["a", "b"]) == []
    appear.join()
    (tmp_path / "b").unlink()
    assert check_files(tmp_path, manifest, ["a", "b"]) == ["b is missing"]


def test_a_disk_without_inodes_is_refused_before_anything_is_written(
    tmp_path: Path, small_disk: Callable[..., Path]
) -> None:
    disk = small_disk(1000, "nr_inodes=12")
    require_space(disk, 1000, num_files=5)
    with pytest.raises(CheckpointError, match=r"needs 20 files, the disk has inodes for \d+ more \(nothing was wri"):
        require_space(disk, 1000, num_files=20)


def test_a_disk_too_small_for_what_is_to_be_kept_is_said_at_the_start(
    workplace: Path, small_disk: Callable[..., Path]
) -> None:
    small_disk(400)
    code, output = run_to_end(workplace, 1, *SHORT, "--run.dir", "disk", "--checkpoint.keep_last", "3")
    assert code == 0, output
    (line,) = [line for line in output.splitlines() if line.startswith("disk_space: ")]
    assert "GB free, and 4 more checkpoints take 0.000649" in line
    assert "Free some space, lower checkpoint.keep_last, or put run.dir on a larger disk" in line


@pytest.fixture
def read_only(workplace: Path) -> Iterator[Path]:
    """A run folder that root can't write either."""
    disk = workplace / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(disk)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"can't mount a read-only disk: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_read_only_disk_is_said_before_the_model_is_built(workplace: Path, read_only: Path) -> None:
    code, output = run_to_end(workplace, 2, "--run.dir", "disk")
    assert code == 1
    assert "error: disk/tiny: can't be written: Read-only file system. Make it writable" in output
    assert (output.count("error: "), output.count("parameters")) == (1, 0)
