"""A checkpoint is proved before it is used: every file, every kind of damage, what stays, and readers not ours."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from configs.errors import CheckpointError
from engine.checkpoint.checkpointer import Checkpointer, open_checkpoint
from engine.checkpoint.storage import SAFETENSORS_DTYPES
from tests.layouts.test_checkpoint import PLAIN, build, config, hash_of, load_newest, save_steps, solo, train
from tests.ranks import ranks, run_ranks


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Steps 100 and 200 of a run on two ranks, with a tokenizer; the hash of the state of each."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    (tokenizer / "tokenizer.json").write_text('{"model": {}}')
    (tokenizer / "tokenizer_config.json").write_text("{}")
    return folder, run_ranks(2, save_steps, folder, (2,), [100, 200], tokenizer)[0]


FILES = [f"{kind}-rank-{rank:05d}.safetensors" for kind in ("model", "optimizer") for rank in range(2)]
FILES += ["tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "manifest.json"]


def test_a_checkpoint_holds_these_files_and_no_pickle(two_steps: tuple[Path, list[str]]) -> None:
    path = two_steps[0] / "step-00000200"
    assert sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()) == sorted(FILES)
    for name in FILES:
        data = (path / name).read_bytes()
        if name.endswith(".safetensors"):
            load_file(path / name)
        else:
            json.loads(data)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_flipped_bit_anywhere_refuses_the_checkpoint_by_name(
    two_steps: tuple[Path, list[str]], tmp_path: Path, name: str, place: str
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps[0], folder)
    data = bytearray((folder / "step-00000200" / name).read_bytes())
    data[{"first": 0, "middle": len(data) // 2, "last": -1}[place]] ^= 4
    (folder / "step-00000200" / name).write_bytes(data)
    hashed, step, refused = load_newest(folder, PLAIN)
    assert (hashed, step) == (two_steps[1][0], 100)
    assert len(refused) == 1
    assert refused[0].startswith(f"step-00000200: {name} ")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("left", ["none", "half", "all but one", "missing"])
def test_a_truncated_or_missing_file_refuses_the_checkpoint_by_name(
    two_steps: tuple[Path, list[str]], tmp_path: Path, name: str, left: str
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps[0], folder)
    path = folder / "step-00000200" / name
    size = path.stat().st_size
    if left == "missing":
        path.unlink()
    else:
        os.truncate(path, {"none": 0, "half": size // 2, "all but one": size - 1}[left])
    hashed, step, refused = load_newest(folder, PLAIN)
    assert (hashed, step) == (two_steps[1][0], 100)
    assert refused[0].startswith(f"step-00000200: {name} ")
    if left == "missing":
        assert refused == [f"step-00000200: {name} is missing"]
    elif name != "manifest.json":
        assert refused == [f"step-00000200: {name} has {path.stat().st_size} bytes, the manifest says {size}"]


def test_ranks_agree_on_what_is_bad_before_they_touch_the_model(
    two_steps: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps[0], folder)
    os.truncate(folder / "step-00000200" / FILES[1], 100)
    os.truncate(folder / "step-00000200" / FILES[2], 100)
    results = run_ranks(3, load_newest, folder, (3,))
    assert len({(hashed, step, tuple(refused)) for hashed, step, refused in results}) == 1
    hashed, step, refused = results[0]
    assert (hashed, step) == (two_steps[1][0], 100)
    assert FILES[1] in refused[0]
    assert FILES[2] in refused[0]


def test_when_all_are_bad_the_run_does_not_start_over(two_steps: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps[0], folder)
    (folder / "step-00000200" / "manifest.json").unlink()
    (folder / "step-00000100" / FILES[0]).unlink()
    with pytest.raises(CheckpointError) as failure, Checkpointer(folder, config()) as checkpointer:
        checkpointer.find_latest()
    assert str(failure.value) == (
        f"{folder}: no checkpoint can be loaded:\n"
        "  step-00000200: manifest.json is missing\n"
        f"  step-00000100: {FILES[0]} is missing\n"
        "Restore one of them from a copy, or move the folder away to start the run from its beginning."
    )


def test_a_folder_under_the_name_of_another_step_is_refused(two_steps: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps[0], folder)
    os.rename(folder / "step-00000100", folder / "step-00000300")
    assert load_newest(folder, PLAIN)[1:] == (
        200,
        ["step-00000300: manifest.json is of step 100: the folder was renamed"],
    )


def test_a_link_out_of_the_folder_is_refused(two_steps: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps[0], folder)
    path = folder / "step-00000200" / FILES[0]
    os.rename(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert load_newest(folder, PLAIN)[1:] == (100, [f"step-00000200: {FILES[0]} is no regular file of the folder"])


def test_a_new_run_has_no_checkpoint(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "checkpoints", config()) as checkpointer:
        assert checkpointer.find_latest() is None


# -------------------- the same step again, retention, disks


def test_a_good_step_is_not_written_again(tmp_path: Path) -> None:
    solo(tmp_path, [100])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    model, optimizer = build(PLAIN, seed=9)
    with Checkpointer(tmp_path, config()) as checkpointer:
        checkpointer.save(100, model, optimizer, {})
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_bad_step_is_replaced(tmp_path: Path) -> None:
    solo(tmp_path, [50, 100])
    os.truncate(tmp_path / "step-00000100" / "model-rank-00000.safetensors", 10)
    run_ranks(2, save_steps, tmp_path, (2,), [100])
    assert load_newest(tmp_path, PLAIN)[1:] == (100, [])
    assert sorted(os.listdir(tmp_path)) == ["step-00000050", "step-00000100"]


def test_retention_keeps_the_newest_the_multiples_and_the_best(tmp_path: Path) -> None:
    model, optimizer = build(PLAIN, seed=1)
    losses = {10: 3.0, 20: 1.5, 30: 2.0, 40: 2.5, 50: float("nan"), 60: None}
    keep = config(keep_last=2, keep_every=40, keep_best=True)
    for steps in ([10, 20, 30], [40, 50, 60]):  # two starts: the second learns of the first's from their manifests
        with Checkpointer(tmp_path, keep) as checkpointer:
            for step in steps:
                checkpointer.save(step, model, optimizer, {}, heldout_loss=losses[step])
    assert sorted(os.listdir(tmp_path)) == [f"step-000000{step}" for step in (20, 40, 50, 60)]
    assert open_checkpoint(tmp_path, best=True).step == 20
    assert open_checkpoint(tmp_path).step == 60


def test_a_refused_checkpoint_does_not_push_out_a_good_one(tmp_path: Path) -> None:
    solo(tmp_path, [100, 200, 300])
    os.truncate(tmp_path / "step-00000300" / "model-rank-00000.safetensors", 10)
    model, optimizer = build(PLAIN, seed=1)
    with Checkpointer(tmp_path, config(keep_last=2)) as checkpointer:
        found = checkpointer.find_latest()
        assert found is not None
        assert found.step == 200
        checkpointer.load(found, model, optimizer)
        checkpointer.save(250, model, optimizer, {"step": 250, "num_tokens": 7 * 250})
    assert sorted(os.listdir(tmp_path)) == ["step-00000200", "step-00000250", "step-00000300"]
    assert load_newest(tmp_path, PLAIN)[1] == 250


def test_a_disk_without_room_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solo(tmp_path, [1])
    real = os.statvfs(tmp_path)
    full = os.statvfs_result((real.f_bsize, 1, real.f_blocks, 100, 100, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    model, optimizer = build(PLAIN, seed=1)
    train(model, optimizer)
    with pytest.raises(CheckpointError) as failure, Checkpointer(tmp_path, config()) as checkpointer:
        checkpointer.save(2, model, optimizer, {})
    assert "bytes, the disk has 100 free (nothing was written)" in str(failure.value)
    assert os.listdir(tmp_path) == ["step-00000001"]


@ranks(2)
def test_a_folder_that_cannot_be_written_is_told_on_all_ranks_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    dist.barrier()
    with pytest.raises(CheckpointError, match=r"file/checkpoints: can't be written: Not a directory \(errno 20\)"):
        Checkpointer(tmp_path / "file" / "checkpoints", config())


# -------------------- reading by others


def test_torch_and_safetensors_read_it_without_ropewalk(two_steps: tuple[Path, list[str]]) -> None:
    path = two_steps[0] / "step-00000200"
    reader = open_checkpoint(path)
    names = reader.names("")
    theirs = {name: torch.zeros(reader.shape(name), dtype=reader.dtype(name)) for name in names}
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp_load(theirs, storage_reader=HuggingFaceStorageReader(str(path)))
    assert hash_of(theirs) == two_steps[1][1]
    by_hand = [load_file(path / FILES[rank])["model.short.weight"] for rank in range(2)]
    assert torch.equal(torch.cat(by_hand), reader.read("model.short.weight"))


def test_a_reader_assembles_any_box_of_a_tensor(two_steps: tuple[Path, list[str]]) -> None:
    reader = open_checkpoint(two_steps[0].parent)
    name = "model.embed_tokens.weight"
    full = reader.read(name)
    assert full.shape == reader.shape(name) == (11, 6)
    assert reader.dtype(name) == torch.float32
    for rows in [slice(0, 11), slice(2, 3), slice(5, 7), slice(-2, None), slice(4, 4)]:
        assert torch.equal(reader.read(name, (rows,)), full[rows])
        assert torch.equal(reader.read(name, (rows, slice(1, 4))), full[rows, 1:4])
    step = reader.read("optimizer.embed_tokens.weight.step")
    assert step.shape == ()
    assert step.item() == 4
    assert reader.tokenizer_dir == reader.path / "tokenizer"
    assert reader.meta == {"step": 200, "num_tokens": 1400}


def test_the_documented_way_to_read_it_works(two_steps: tuple[Path, list[str]]) -> None:
    document = Path(__file__).parents[2] / "docs" / "checkpoints.md"
    code = document.read_text().split("```python\n")[1].split("```")[0]
    path = two_steps[0] / "step-00000100"
    code = code.replace('Path("runs/debug/checkpoints/step-00000100")', f"Path({str(path)!r})")
    result: dict[str, Any] = {}
    exec(code, result)
    reader = open_checkpoint(path)
    assert sorted(f"model.{name}" for name in result["weights"]) == reader.names()
    assert all(torch.equal(tensor, reader.read(f"model.{name}")) for name, tensor in result["weights"].items())


class Zoo(nn.Module):
    """One tensor of every kind that a file can hold."""

    def __init__(self, value: int) -> None:
        super().__init__()
        for dtype in SAFETENSORS_DTYPES:
            name = str(dtype).replace("torch.", "of_")
            self.register_buffer(name, torch.full((3, 5), value).to(dtype))
        self.register_buffer("scalar", torch.tensor(float(value)))
        self.register_buffer("empty", torch.zeros(0, 5))
        self.register_buffer("strided", torch.arange(12.0).reshape(3, 4).t() * value)
        self.register_buffer("passing", torch.tensor(float(value)), persistent=False)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_every_dtype_and_shape_comes_back(tmp_path: Path, asynchronous: bool) -> None:
    zoo, other = Zoo(1), Zoo(0)
    with Checkpointer(tmp_path, config(asynchronous=asynchronous)) as checkpointer:
        checkpointer.save(1, zoo, None, {})
        found = checkpointer.find_latest()
        assert found is not None
        checkpointer.load(found, other, None)
    assert hash_of(other.state_dict()) == hash_of(zoo.state_dict())
    assert other.get_buffer("passing").item() == 0.0
    path = found.path / "model-rank-00000.safetensors"
    saved = load_file(path)
    assert hash_of(saved) == hash_of({f"model.{name}": tensor for name, tensor in zoo.state_dict().items()})
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":  # aligned, so that readers may map the file
            assert entry["data_offsets"][0] % saved[name].element_size() == 0


def test_opening_names_what_is_there_and_what_is_wrong(two_steps: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps[0], folder)
    assert open_checkpoint(tmp_path, step=100).step == 100
    with pytest.raises(CheckpointError, match=r"step = 150: this run has checkpoints of steps 100, 200\."):
        open_checkpoint(tmp_path, step=150)
    with pytest.raises(CheckpointError, match="no checkpoint here has a held-out loss"):
        open_checkpoint(tmp_path, best=True)
    (folder / "step-00000300").mkdir()  # without a manifest
    assert open_checkpoint(tmp_path).refused == ["step-00000300: manifest.json is missing"]
    with pytest.raises(CheckpointError, match="no checkpoint here has a held-out loss"):
        open_checkpoint(tmp_path, best=True)
    (folder / "step-00000300").rmdir()
    os.truncate(folder / "step-00000200" / FILES[2], 10)
    assert open_checkpoint(tmp_path, weights_only=True).step == 200  # the optimizer's file isn't asked for
    fallback = open_checkpoint(tmp_path)
    assert fallback.step == 100
    assert fallback.refused[0].startswith(f"step-00000200: {FILES[2]} has 10 bytes, the manifest says ")
    with pytest.raises(CheckpointError, match=f"step-00000200: {FILES[2]} has 10 bytes"):
        open_checkpoint(tmp_path, step=200)
    with pytest.raises(CheckpointError, match=r"tensor = 'model\.nothing': not in this checkpoint"):
        fallback.shape("model.nothing")
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        open_checkpoint(tmp_path / "nowhere")
