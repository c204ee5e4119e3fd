"""A run folder: one owner at a time, whole files, and errors that say what to do."""

import errno
import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from configs.check import resolve
from configs.errors import RunError
from configs.load import config_from_dict, config_to_dict
from configs.schema import Config, RunConfig
from engine.folder import RunFolder


def make(tmp_path: Path, name: str = "r") -> RunFolder:
    return RunFolder(RunConfig(name=name, dir=str(tmp_path / "runs"), steps=1))


def make_config() -> Config:
    model = {"vocab_size": 8, "dim": 4, "num_layers": 1, "num_heads": 1, "ffn_dim": 4}
    data = {"seq_len": 4, "global_batch_size": 1, "stores": [{"path": "x"}]}
    return resolve(config_from_dict({"run": {"steps": 1}, "model": model, "data": data}, "test"), 1)


def test_paths_are_the_documented_ones(tmp_path: Path) -> None:
    folder = make(tmp_path)
    names = ("config", "resolved", "metrics", "tensorboard", "checkpoints", "logs")
    assert [str(getattr(folder, name).relative_to(tmp_path / "runs" / "r")) for name in names] == [
        "config.toml", "config.resolved.json", "metrics.jsonl", "tensorboard", "checkpoints", "logs",
    ]  # fmt: skip
    assert not (tmp_path / "runs").exists(), "naming a run makes nothing"


def test_a_claimed_folder_is_refused_to_another_until_it_is_released(tmp_path: Path) -> None:
    first, second = make(tmp_path), make(tmp_path)
    first.claim()
    owner = (first.path / ".lock").read_text().strip()
    assert owner.startswith(f"process {os.getpid()} on ")
    with pytest.raises(RunError) as refusal:
        second.claim()
    assert str(refusal.value) == (
        f"{first.path}: in use by {owner} (one run writes a folder). "
        "Wait for it, stop it, or choose another --run.name."
    )
    other = make(tmp_path, "another")
    other.claim()
    other.release()
    first.release()
    second.claim()
    second.release()


def test_the_claim_of_a_killed_process_is_gone_with_it(tmp_path: Path) -> None:
    code = (
        "import os, signal; from configs.schema import RunConfig; from engine.folder import RunFolder; "
        f"RunFolder(RunConfig(name='r', dir={str(tmp_path / 'runs')!r}, steps=1)).claim(); "
        "print('claimed', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert (done.stdout, done.returncode) == ("claimed\n", -9), done.stderr
    folder = make(tmp_path)
    folder.claim()
    assert f"process {os.getpid()} on " in (folder.path / ".lock").read_text()
    folder.release()


def test_a_run_that_was_refused_leaves_no_folder_but_keeps_what_is_in_one(tmp_path: Path) -> None:
    folder, waiting = make(tmp_path), make(tmp_path)
    folder.claim()
    folder.give_up()
    assert list((tmp_path / "runs").iterdir()) == []
    folder.claim()
    folder.write_configs("# as given\n", make_config())
    folder.give_up()
    assert folder.config.exists()
    waiting.claim()
    with pytest.raises(RunError, match="in use by"):
        folder.claim()
    folder.give_up()
    assert (folder.path / ".lock").exists(), "it is another's"
    waiting.release()


def test_where_there_are_no_locks_nobody_takes_a_folder_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be another start's, which is at work in it."""

    def refuse(file: IO[str], how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("engine.folder.fcntl.flock", refuse)
    first, second = make(tmp_path), make(tmp_path)
    first.claim()
    second.claim()
    second.give_up()
    assert first.logs.is_dir() and (first.path / ".lock").exists()
    first.release()


def test_giving_up_a_folder_that_is_gone_hides_no_refusal(tmp_path: Path) -> None:
    folder = make(tmp_path)
    folder.claim()
    shutil.rmtree(folder.path)
    folder.give_up()
    assert not folder.path.exists()
    folder.claim()
    folder.release()


def test_a_lock_that_was_taken_away_meanwhile_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the file and locking it, the refused owner has removed it: two would each hold one."""
    folder, lock, removed = make(tmp_path), fcntl.flock, []

    def late(file: IO[str], how: int) -> None:
        if not removed:
            removed.append((folder.path / ".lock").unlink())
        lock(file, how)

    monkeypatch.setattr("engine.folder.fcntl.flock", late)
    folder.claim()
    assert removed
    with pytest.raises(RunError, match="in use by"):
        make(tmp_path).claim()
    folder.release()


def test_a_folder_that_is_taken_away_while_it_is_made_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make(tmp_path), make(tmp_path)
    first.claim()
    chmod, gone = Path.chmod, []

    def late(path: Path, mode: int) -> None:
        if not gone:
            gone.append(first.give_up())
        chmod(path, mode)

    monkeypatch.setattr(Path, "chmod", late)
    second.claim()
    assert gone and (second.path / ".lock").exists() and second.logs.is_dir()
    second.release()


def test_a_folder_that_can_not_be_made_is_said_as_such(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    expected = "can't be written: Not a directory. Make it writable, make room, or choose another --run.dir."
    with pytest.raises(RunError) as refusal:
        make(tmp_path).claim()
    assert str(refusal.value) == f"{tmp_path}/runs/r: {expected}"
    with pytest.raises(RunError) as refusal:
        make(tmp_path).log_of(0)
    assert str(refusal.value) == f"{tmp_path}/runs/r/logs: {expected}"


def test_configs_are_kept_as_given_and_as_resolved(tmp_path: Path) -> None:
    folder, config = make(tmp_path), make_config()
    folder.claim()
    folder.write_configs("# as given\n", config)
    folder.write_configs("# as given, later\n", config)
    assert folder.config.read_text() == "# as given, later\n"
    assert json.loads(folder.resolved.read_text()) == config_to_dict(config)
    assert sorted(os.listdir(folder.path)) == [".lock", "config.resolved.json", "config.toml", "logs"]
    folder.release()


def test_any_saved_step_is_seen(tmp_path: Path) -> None:
    folder = make(tmp_path)
    assert not folder.has_checkpoints()
    (folder.checkpoints / ".tmp-step-00000001-00000000").mkdir(parents=True)
    assert not folder.has_checkpoints()
    (folder.checkpoints / "step-00000001").mkdir()
    assert folder.has_checkpoints()


def test_each_rank_has_a_log_that_later_starts_continue(tmp_path: Path) -> None:
    folder = make(tmp_path)
    for text in ("first", "second"):
        handler = folder.log_of(12)
        handler.emit(logging.LogRecord("x", logging.INFO, "", 0, text, None, None))
        handler.close()
    lines = (folder.logs / "rank-00012.log").read_text().splitlines()
    assert [line.split(" INFO ")[1] for line in lines] == ["first", "second"]
