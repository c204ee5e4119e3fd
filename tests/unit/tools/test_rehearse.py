"""tools/rehearse.py: what it compares it sees, and what can't be rehearsed is refused before anything is started.

A whole rehearsal takes minutes: `make rehearse`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from engine.checkpoint.manifest import MANIFEST, parse_manifest, read_manifest
from engine.files import FileEntry, hash_file
from tests.runs import ROOT, STEPS, make_workplace, processes_naming, run_to_end, until
from tools.rehearse import main
from tools.restarted import Rehearsal, Training, differences


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workplace = make_workplace(tmp_path_factory.mktemp("workplace"))
    code, output = run_to_end(workplace, 1, "--run.name", "whole")
    assert code == 0, output
    return workplace / "runs" / "whole"


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def test_a_copy_is_no_difference(whole: Path, copy: Path) -> None:
    assert differences(copy, whole) == []


def test_a_number_in_the_metrics_is_a_difference(whole: Path, copy: Path) -> None:
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    number = next(index for index, line in enumerate(lines) if line["kind"] == "step" and line["step"] == 7)
    lines[number]["step_time_s"] *= 2  # that may be
    lines[number]["loss"] += 1e-15
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found,) = differences(copy, whole)
    assert "'step': 7" in found
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    assert f"metrics.jsonl: {len(lines) - 1} lines and not {len(lines)}" in differences(copy, whole)


def test_one_bit_of_a_moment_is_a_difference(whole: Path, copy: Path) -> None:
    folder, name = copy / "checkpoints" / f"step-{STEPS:08d}", "optimizer-rank-00000.safetensors"
    with safe_open(folder / name, "pt") as file:
        content, note = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    key = next(key for key in sorted(content) if key.endswith(".exp_avg_sq"))
    content[key].view(-1)[:1].nextafter_(content[key].new_tensor(1.0))
    save_file(content, folder / name, note)
    manifest = parse_manifest(read_manifest(folder), MANIFEST)
    manifest.files[name] = FileEntry((folder / name).stat().st_size, hash_file(folder / name))
    (folder / MANIFEST).write_text(manifest.to_text())
    assert differences(copy, whole) == [key]


def test_lost_steps_and_the_time_to_be_back_are_read_from_outside(tmp_path: Path) -> None:
    """A made-up history: killed at 100.5 s in step 9, started again at 103 s from step 5, in step 6 at 104 s."""
    rehearsal = Rehearsal(config=tmp_path / "x.toml", overrides=[], ranks=2, seed=0, out=tmp_path, steps=20)
    seen = [(99.0, 7), (100.0, 9), (103.5, 5), (104.0, 6), (110.0, 20)]
    training = Training(rehearsal, "faults", seen=seen)
    training.folder.mkdir()
    starts = [{"event": "start", "time": 98.0, "from_step": 0}, {"event": "start", "time": 103.0, "from_step": 5}]
    (training.folder / "attempts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    assert training.after(100.5) == (4, 3.5)
    assert training.after(104.5) == (0, None)
    assert training.lost_steps() == 4


def test_what_can_not_be_rehearsed_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, text in (
        (["--kinds", "kil"], "error: fault.inject.kinds = 'kil': no such fault. Did you mean 'kill'?\n"),
        (["--run.stepps", "3"], "error: --run.stepps: unknown option"),
        (["nothing.toml"], "error: nothing.toml: "),
    ):
        assert main([*argv, "--out", str(tmp_path / "out")]) == 2
        assert text in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("output-*")), "nothing was started"


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
def test_a_sigterm_ends_it_with_all_that_it_has_started(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "tools/rehearse.py", "--out", str(out), "--kills", "0", "--run.steps", "100000"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: sum(" -u launchers/train.py" in line for line in processes_naming(out).values()) == 2)
        os.kill(process.pid, signal.SIGTERM)
        errors = process.communicate(timeout=60)[1]
    assert (process.returncode, errors) == (130, "")
    assert processes_naming(out) == {}
