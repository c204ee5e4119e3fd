"""Saves that end badly for real: processes killed at every stage, file size limits, a full disk.

After each the newest good checkpoint is the one that was good before (or the new one, once it is committed), whole, and
what the dead save left is gone at the next start.
"""

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from configs.errors import CheckpointError
from configs.schema import CheckpointConfig
from engine.checkpoint.checkpointer import STAGES, Checkpointer, open_checkpoint
from tests.ranks import RanksFailed, ranks, run_ranks

CONFIG = CheckpointConfig(keep_last=5, keep_best=False)
KILLS = [(stage, rank) for stage in STAGES[:3] for rank in (0, 1)] + [(stage, 0) for stage in STAGES[3:]]


def build(value: float) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model that has made one step; on ranks each of them holds half of it."""
    model = torch.nn.Sequential(torch.nn.Linear(300, 100), torch.nn.Linear(100, 7))
    torch.nn.init.constant_(model[0].weight, value)  # type: ignore[arg-type]
    if dist.is_initialized():
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
        model.set_gradient_divide_factor(1.0)  # type: ignore[attr-defined]
        model.set_force_sum_reduction_for_comms(True)  # type: ignore[attr-defined]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    model(torch.ones(1, 300)).sum().backward()
    optimizer.step()
    return model, optimizer


def save_100(folder: Path) -> None:
    model, optimizer = build(100.0)
    with Checkpointer(folder, CONFIG) as checkpointer:
        checkpointer.save(100, model, optimizer, {"step": 100})


def die_in_200(folder: Path, stage: str, victim: int) -> None:
    def at(reached: str) -> None:
        if reached == stage and dist.get_rank() == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    model, optimizer = build(200.0)
    with Checkpointer(folder, CONFIG, at=at) as checkpointer:
        checkpointer.save(200, model, optimizer, {"step": 200})


@pytest.fixture(scope="module")
def one_step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    run_ranks(2, save_100, folder)
    return folder


@pytest.mark.parametrize(("stage", "victim"), KILLS)
def test_killed_at_any_stage_the_last_committed_checkpoint_is_loaded(
    tmp_path: Path, one_step: Path, stage: str, victim: int
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(one_step, folder)
    with pytest.raises(RanksFailed, match=f"rank {victim} of 2 was killed by SIGKILL"):
        run_ranks(2, die_in_200, folder, stage, victim)
    if victim == 0 and stage != "after_rename":  # nobody was left to clean up
        assert [name for name in os.listdir(folder) if re.fullmatch(r"\.tmp-step-00000200-[0-9a-f]{8}", name)]
    step = 200 if stage == "after_rename" else 100
    assert open_checkpoint(folder).step == step  # a reader neither needs nor does the cleaning
    model, optimizer = build(1.0)
    with Checkpointer(folder, CONFIG) as checkpointer:
        assert sorted(os.listdir(folder)) == [f"step-{s:08d}" for s in (100, 200) if s <= step]
        found = checkpointer.find_latest()
        assert found is not None
        assert (found.step, found.meta, found.refused) == (step, {"step": step}, [])
        checkpointer.load(found, model, optimizer)
        assert model[0].weight.unique().tolist() == [float(step)]  # type: ignore[index, operator]
        checkpointer.save(300, model, optimizer, {"step": 300})  # and the run goes on
    assert open_checkpoint(folder).step == 300


def test_a_rank_that_dies_fails_the_save_on_those_that_live(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match="rank 1 of 2 was killed by SIGKILL") as failure:
        run_ranks(2, _die_and_report, tmp_path)
    assert "rank 0: " in str(failure.value)
    assert "checkpoint of step 200: " in str(failure.value)
    assert (tmp_path / "reported").read_text().startswith("checkpoint of step 200: ")
    assert sorted(os.listdir(tmp_path / "checkpoints")) == []


def _die_and_report(folder: Path) -> None:
    try:
        die_in_200(folder / "checkpoints", "in_shard", 1)
    except CheckpointError as error:
        (folder / "reported").write_text(str(error))
        raise


@ranks(2)
def test_a_file_that_may_not_grow_fails_the_save_by_name_and_spares_the_others(tmp_path: Path) -> None:
    save_100(tmp_path)
    model, optimizer = build(200.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpointer(tmp_path, CONFIG) as checkpointer:
        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        checkpointer.save(200, model, optimizer, {"step": 200})
        with pytest.raises(CheckpointError) as failure:
            checkpointer.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert re.fullmatch(
            r"checkpoint of step 200: rank 1: .*/\.tmp-step-00000200-[0-9a-f]{8}/model-rank-00001\.safetensors: "
            rf"File too large \(errno {errno.EFBIG}\) \(earlier checkpoints are untouched\)",
            str(failure.value),
        )
        dist.barrier()
        assert os.listdir(tmp_path) == ["step-00000100"]
        found = checkpointer.find_latest()
        assert found is not None
        assert found.step == 100


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB; only root may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True, text=True)
    if mount.returncode != 0:
        pytest.skip(f"can't mount a small disk: {mount.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_fills_up_while_writing_is_said_as_such(small_disk: Path) -> None:
    def at(stage: str) -> None:
        if stage == "before_shards":
            with open(small_disk / "somebody-else", "wb", buffering=0) as file, pytest.raises(OSError, match="28"):
                while True:
                    file.write(bytes(4096))

    folder = small_disk / "checkpoints"
    save_100(folder)
    model, optimizer = build(200.0)
    with pytest.raises(CheckpointError) as failure, Checkpointer(folder, CONFIG, at=at) as checkpointer:
        checkpointer.save(200, model, optimizer, {"step": 200})
    assert "model-rank-00000.safetensors: No space left on device (errno 28)" in str(failure.value)
    assert os.listdir(folder) == ["step-00000100"]
    assert open_checkpoint(folder).step == 100


def test_a_disk_without_room_is_refused_before_anything_is_written(small_disk: Path) -> None:
    folder = small_disk / "checkpoints"
    stages: list[str] = []
    model, optimizer = build(200.0)
    (small_disk / "somebody-else").write_bytes(bytes(4_000_000))
    with pytest.raises(CheckpointError) as failure, Checkpointer(folder, CONFIG, at=stages.append) as checkpointer:
        checkpointer.save(200, model, optimizer, {"step": 200})
    assert re.search(
        r"the checkpoint needs 388\d\d\d bytes, the disk has \d+ free \(nothing was written\)", str(failure.value)
    )
    assert stages == []
    assert os.listdir(folder) == []
