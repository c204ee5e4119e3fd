"""tools/prepare.py as a user starts it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.load import load_config
from engine.data.store import TokenStore
from tools import prepare as command

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path: Path, texts: list[str]) -> Path:
    folder = tmp_path / "my texts"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:03d}.txt").write_text(text)
    return folder


def start(*arguments: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "prepare.py"), *arguments],
        env=os.environ | {"PYTHONPATH": path},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def test_a_folder_becomes_a_store_and_the_next_command_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "empty.txt").write_text("")
    (folder / "picture.png").write_bytes(b"x")
    out = tmp_path / "out" / "store"
    code = command.main([str(folder), "--out", str(out), "--train-tokenizer", "300", "--on-bad-record", "skip"])
    printed = capsys.readouterr().out
    assert code == 0
    store = TokenStore.open(out, verify="full")
    train, heldout = store.split("train"), store.split("heldout")
    assert train.num_documents + heldout.num_documents == 120
    for number in (train.num_tokens, heldout.num_tokens, train.num_bytes, heldout.num_bytes):
        assert f" {number:,} " in printed
    bytes_a_token = (train.num_bytes + heldout.num_bytes) / (train.num_tokens + heldout.num_tokens)
    assert f"sentencepiece, 300 tokens, {bytes_a_token:.2f} bytes a token, stored as uint16" in printed
    assert "left out: 1 .png" in printed
    assert f"bad records left out: 1 empty; the first:\n    empty: {folder}/empty.txt:1: no text\n" in printed
    assert f'[[data.stores]]\n  path = "{out}"' in printed


def test_the_next_command_is_a_valid_one(tmp_path: Path) -> None:
    lines = command._how_to_go_on(tmp_path / "my store", 300)
    import shlex

    words = shlex.split(lines[-1])
    assert Path(words[0]).is_file()  # found without an active .venv
    at = words.index("configs/quickstart.toml")
    config = load_config(ROOT / words[at], words[at + 1 :])
    assert [store.path for store in config.data.stores] == [str(tmp_path / "my store")]
    assert (config.model.vocab_size, config.run.name) == (300, "my-store")


def test_refusals_are_one_line_without_a_traceback(folder: Path, tmp_path: Path) -> None:
    cases = {
        ("nowhere", "--out", str(tmp_path / "s"), "--train-tokenizer", "300"): (
            1,
            "error: nowhere: no such file or folder. Give files or folders that are there.\n",
        ),
        (str(folder), "--out", str(tmp_path / "s"), "--train-tokenizer", "3"): (
            2,
            "error: --train-tokenizer = 3: must be at least 260 (3 special tokens and 256 bytes come first).\n",
        ),
        (str(folder), "--out", str(folder), "--train-tokenizer", "300"): (
            1,
            f"error: {folder}: exists already (nothing is written over). Remove it or choose another folder.\n",
        ),
    }
    running = {arguments: start(*arguments) for arguments in cases}
    for arguments, process in running.items():
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == cases[arguments]
        assert out == ""
    assert not (tmp_path / "s").exists()


def test_help_explains_every_option() -> None:
    process = start("--help")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    parsed = set(re.findall(r"^  (--[a-z-]+)", out, re.MULTILINE))
    assert parsed == {
        "--out", "--tokenizer", "--train-tokenizer", "--text-field", "--on-bad-record", "--heldout-fraction",
        "--workers", "--max-bytes", "--eos-token", "--bos", "--dtype", "--format", "--prompt-field",
        "--completion-field", "--messages-field", "--chat-template", "--chat", "--seq-len", "--on-long-example",
    }  # fmt: skip


def test_a_reader_that_has_seen_enough_is_no_error(folder: Path, tmp_path: Path) -> None:
    with start(str(folder), "--out", str(tmp_path / "store"), "--train-tokenizer", "300") as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait(timeout=60)) == ("", 0)
    TokenStore.open(tmp_path / "store", verify="full")


@pytest.fixture
def busy(folder: Path, tmp_path: Path) -> subprocess.Popen[str]:
    """A preparation with two workers that is writing tokens; `tmp_path`/store is its target."""
    big = tmp_path / "big.jsonl"
    line = '{"text": "' + "laid rope strand hall twist " * 40 + '"}\n'
    big.write_text(line * 60_000)
    out = str(tmp_path / "store")
    process = start(str(folder), str(big), "--out", out, "--train-tokenizer", "300", "--workers", "2")
    tokens = tmp_path / ".store.preparing" / "train" / "tokens-00000.bin"
    deadline = time.monotonic() + 60
    while not (tokens.exists() and tokens.stat().st_size) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        os.sched_yield()
    return process


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.long),
    ],
)
def test_an_interrupted_preparation_leaves_nothing_to_trust(
    busy: subprocess.Popen[str], tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    workers = children_of(busy.pid)
    assert len(workers) >= 2
    os.kill(busy.pid, sent) if sent == signal.SIGKILL else os.killpg(busy.pid, sent)
    _, err = busy.communicate(timeout=60)
    assert busy.returncode == code
    assert "Traceback" not in err
    assert not (tmp_path / "store").exists()
    assert (tmp_path / ".store.preparing").exists() == (sent == signal.SIGKILL)
    deadline = time.monotonic() + 30
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline, "workers outlive their parent"
        os.sched_yield()


def test_a_worker_that_dies_ends_the_preparation(busy: subprocess.Popen[str], tmp_path: Path) -> None:
    worker = next(pid for pid in children_of(busy.pid) if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text())
    os.kill(worker, signal.SIGKILL)
    _, err = busy.communicate(timeout=60)
    why = "killed, perhaps for want of memory"
    assert err == f"error: workers: one of them is gone ({why}). Use fewer: --workers 1.\n"
    assert busy.returncode == 1
    assert not (tmp_path / "store").exists() and not (tmp_path / ".store.preparing").exists()


def children_of(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
