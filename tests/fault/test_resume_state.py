"""Each item of state that a resume needs is dropped or reset once, and the comparison with the undisturbed run notices.

The checkpoint is rewritten on the disk with a manifest that agrees with it, so that no proof of bytes can help: what
must notice is a refusal that says what is wrong, or an end that is not the undisturbed run's. Without this, a
comparison that compares nothing would pass every other test of this folder.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from engine.checkpoint.checkpointer import open_checkpoint
from engine.checkpoint.manifest import MANIFEST, Manifest, list_steps, parse_manifest, read_manifest, step_folder
from engine.fault.record import read_lines
from engine.files import FileEntry, hash_file
from tests.runs import assert_same_end, make_workplace, run_to_end

RESUMED = 10
COMMAND = ("--checkpoint.keep_last", "9", "--fault.skip_limit", "1")
WENT_BACK = ("--fault.inject.kind", "nan_grad", "--fault.inject.step", "7", "--fault.inject.steps", "2")
SPIKED = ("--fault.spike_threshold", "20", "--fault.spike_window", "16", "--fault.inject.kind", "spike",
          "--fault.inject.step", "14")  # fmt: skip

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two undisturbed runs: one goes back from step 8 to 5 and leaves data out, one skips a spike in step 14."""
    workplace = make_workplace(tmp_path_factory.mktemp("workplace"))
    for name, options in (("back", WENT_BACK), ("spiked", SPIKED)):
        code, output = run_to_end(workplace, 1, "--run.name", name, *COMMAND, *options)
        assert code == 0, output
        kinds = [fault["kind"] for fault in read_lines(workplace / "runs" / name / "faults.jsonl")]
        assert kinds == {"back": ["non_finite", "non_finite", "roll_back"], "spiked": ["spike"]}[name], output
    return workplace


def taken_up(workplace: Path, whole: str, name: str) -> Path:
    """Copy a run as it would lie there had it been killed after step RESUMED, its logs as far as they came."""
    run = workplace / "runs" / name
    shutil.copytree(workplace / "runs" / whole, run)
    for step in list_steps(run / "checkpoints"):
        if step > RESUMED:
            shutil.rmtree(run / "checkpoints" / step_folder(step))
    if whole == "spiked":  # it comes after the resume, so it must come again
        (run / "injected.jsonl").unlink()
    return run


def rewrite(run: Path, tensors: Callable[[Tensors], None], meta: Callable[[dict[str, Any]], None]) -> None:
    """Change a checkpoint on the disk, and seal it as if it had been saved so."""
    folder = run / "checkpoints" / step_folder(RESUMED)
    manifest = parse_manifest(read_manifest(folder), MANIFEST)
    files, left = dict(manifest.files), set[str]()
    for name in [name for name in files if name.endswith(".safetensors")]:
        with safe_open(folder / name, "pt") as file:
            content = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            note = file.metadata()
        tensors(content)
        left |= set(content)
        save_file(content, folder / name, note)
        files[name] = FileEntry((folder / name).stat().st_size, hash_file(folder / name))
    changed = json.loads(json.dumps(manifest.meta))
    meta(changed)
    kept = {name: entry for name, entry in manifest.tensors.items() if name in left}
    write(folder, replace(manifest, files=files, tensors=kept, meta=changed))


def write(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST).write_text(manifest.to_text())


def unchanged(content: dict[str, Any]) -> None:
    """Leave all as it is."""


def reset(*endings: str) -> Callable[[Tensors], None]:
    """Set to zero what a name's ending says."""

    def change(content: Tensors) -> None:
        for name in content:
            if name.endswith(endings):
                content[name] = torch.zeros_like(content[name])

    return change


def drop(*endings: str) -> Callable[[Tensors], None]:
    """Leave out what a name's ending says."""

    def change(content: Tensors) -> None:
        for name in [name for name in content if name.endswith(endings)]:
            del content[name]

    return change


def resume(workplace: Path, run: Path, whole: str) -> tuple[int, str]:
    options = WENT_BACK if whole == "back" else SPIKED
    return run_to_end(workplace, 1, "--run.name", run.name, *COMMAND, *options)


@pytest.mark.parametrize("whole", ["back", "spiked"])
def test_a_copy_with_nothing_changed_ends_the_same(workplace: Path, whole: str) -> None:
    """And sealing a checkpoint again changes nothing; else the tests below could not fail."""
    run = taken_up(workplace, whole, f"{whole}-unchanged")
    rewrite(run, unchanged, unchanged)
    (run / "rollbacks.json").unlink(missing_ok=True)  # the checkpoint knows it as well
    code, output = resume(workplace, run, whole)
    assert code == 0, output
    assert f"continuing from runs/{run.name}/checkpoints/{step_folder(RESUMED)}\n" in output
    assert_same_end(run, workplace / "runs" / whole)


RESET: dict[str, tuple[str, Callable[[Tensors], None], Callable[[dict[str, Any]], None]]] = {
    "a weight": ("back", reset("q_proj.weight"), unchanged),
    "exp_avg": ("back", reset(".exp_avg"), unchanged),
    "exp_avg_sq": ("back", reset(".exp_avg_sq"), unchanged),
    "the optimizer's step": ("back", reset(".step"), unchanged),
    "num_tokens": ("back", unchanged, lambda meta: meta.update(num_tokens=0)),
    "the roll backs": ("back", unchanged, lambda meta: meta.update(rollbacks=[])),
    "the guard's memory": ("spiked", unchanged, lambda meta: meta.update(guard={})),
}


@pytest.mark.parametrize("item", RESET)
def test_what_is_reset_shows_in_the_end(workplace: Path, item: str) -> None:
    whole, tensors, meta = RESET[item]
    run = taken_up(workplace, whole, re.sub(r"\W+", "-", item))
    before = (run / "checkpoints" / step_folder(RESUMED) / MANIFEST).read_text()
    rewrite(run, tensors, meta)
    assert (run / "checkpoints" / step_folder(RESUMED) / MANIFEST).read_text() != before, "the mutation is real"
    if item == "the roll backs":
        (run / "rollbacks.json").unlink()
    code, output = resume(workplace, run, whole)
    assert f"continuing from runs/{run.name}/checkpoints/{step_folder(RESUMED)}\n" in output
    with pytest.raises(AssertionError):
        assert code == 0
        assert_same_end(run, workplace / "runs" / whole)


def test_metrics_that_are_lost_show_in_the_end(workplace: Path) -> None:
    run = taken_up(workplace, "back", "metrics")
    (run / "metrics.jsonl").unlink()
    assert resume(workplace, run, "back")[0] == 0
    with pytest.raises(AssertionError):
        assert_same_end(run, workplace / "runs" / "back")


def altered_fingerprint(meta: dict[str, Any]) -> None:
    meta["data"] = ["0" * 64]


DROPPED: dict[str, tuple[int, Callable[[Tensors], None], Callable[[dict[str, Any]], None], str]] = {
    "a weight": (1, drop("norm.weight"), unchanged, "the checkpoint doesn't fit this run, "),
    "exp_avg": (1, drop(".exp_avg"), unchanged, "optimizer.embed_tokens.weight.exp_avg: in the run, but not in the ch"),
    "all of the optimizer": (1, drop(".exp_avg", ".exp_avg_sq", ".step"), unchanged, "the checkpoint doesn't fit this"),
    "data": (2, unchanged, altered_fingerprint, "data.stores.0: the checkpoint was trained on other data"),
    "tokenizer": (2, unchanged, lambda meta: meta.update(tokenizer=""), "data.stores: made with another tokenizer"),
    "seed": (2, unchanged, lambda meta: meta["config"]["run"].update(seed=7), "run.seed: the checkpoint has 7"),
}


@pytest.mark.parametrize("item", DROPPED)
def test_what_is_dropped_is_refused(workplace: Path, item: str) -> None:
    expected, tensors, meta, text = DROPPED[item]
    run = taken_up(workplace, "back", f"without-{item.replace(' ', '-')}")
    rewrite(run, tensors, meta)
    code, output = resume(workplace, run, "back")
    assert (code, output.count("error:"), output.count("Traceback")) == (expected, 1, 0), output
    assert text in output, output


def test_a_step_under_another_name_is_refused(workplace: Path) -> None:
    """Its data and its learning rate would be another step's; the one before it is taken."""
    run = taken_up(workplace, "back", "step")
    folder = run / "checkpoints" / step_folder(RESUMED)
    write(folder, replace(parse_manifest(read_manifest(folder), MANIFEST), step=RESUMED + 1))
    code, output = resume(workplace, run, "back")
    assert code == 0, output
    assert f"refused {step_folder(RESUMED)}: " in output
    assert f"continuing from runs/{run.name}/checkpoints/{step_folder(5)}\n" in output
    assert (
        open_checkpoint(run / "checkpoints").step == open_checkpoint(workplace / "runs" / "back" / "checkpoints").step
    )
