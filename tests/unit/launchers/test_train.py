"""The command line's codes and words, in this process; whole runs are in tests/fault and tests/layouts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import CheckpointError, ConfigError
from launchers import train
from launchers.env import Launch
from launchers.train import main

ROOT = Path(__file__).parents[3]
CONFIG = """
[run]
name = "tiny"
steps = 2
[model]
vocab_size = 300
dim = 16
num_layers = 1
num_heads = 2
ffn_dim = 16
[data]
seq_len = 16
global_batch_size = 4
[[data.stores]]
path = "store"
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(CONFIG)
    return tmp_path


def launch(rank: int, local_rank: int) -> Launch:
    return Launch(
        started_by="torchrun", rank=rank, local_rank=local_rank, world_size=8, local_world_size=4,
        master_addr="a", master_port=1,
    )  # fmt: skip


def test_every_problem_is_said_at_once_and_nothing_is_made(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiny.toml", "--run.steps", "0", "--data.seq_len", "4096"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        "error: run.steps = 0: must be at least 1.\n"
        "data.seq_len = 4096: must be at most model.max_seq_len = 2048. Use data.seq_len 2048 or less, or raise "
        "model.max_seq_len.\n"
    )
    assert os.listdir(folder) == ["tiny.toml"]


def test_missing_files_are_a_wrong_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiny.toml", "--model.init_from", "hf"]) == 2
    assert capsys.readouterr().err == (
        "error: model.init_from = 'hf': no Hugging Face model there. Give a folder with config.json and "
        "*.safetensors.\n"
        "data.stores.0.path = 'store': no such token store. Make it with tools/prepare.py, or set "
        "data.stores.0.sources and a tokenizer.\n"
    )


def test_a_started_run_does_not_need_what_it_started_from(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/tiny/checkpoints/step-00000001").mkdir(parents=True)
    assert main(["tiny.toml", "--model.init_from", "hf"]) == 2
    assert "init_from" not in capsys.readouterr().err


def test_a_half_set_environment_is_a_failure_on_each_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["tiny.toml"]) == 1
    assert capsys.readouterr().err.startswith("error: environment: RANK set but LOCAL_RANK, WORLD_SIZE, ")


def test_help_lists_every_field_and_starts_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "--checkpoint.every_steps" in capsys.readouterr().out
    assert os.listdir(folder) == ["tiny.toml"]


def test_a_wrong_config_is_refused_without_importing_torch() -> None:
    code = (
        "import sys; from launchers.train import main; code = main(['tiny.toml']); "
        "assert 'torch' not in sys.modules, 'seconds to refuse a typing mistake'; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: data.stores.0.path = 'store'")


def test_rank_0_speaks_at_once_and_the_others_in_turn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun ends who still waits, so that what all found is said once; who is left names itself."""
    waited: list[float] = []
    monkeypatch.setattr(train.time, "sleep", waited.append)
    for rank, local_rank in ((0, 0), (4, 0), (5, 1)):
        assert train._report(CheckpointError("broken"), launch(rank, local_rank)) == 1
    assert train._report(ConfigError(["one", "two"]), None) == 2
    assert capsys.readouterr().err == ("error: broken\nrank 4: error: broken\nrank 5: error: broken\nerror: one\ntwo\n")
    assert waited == [train.TURN_S, 2 * train.TURN_S]
