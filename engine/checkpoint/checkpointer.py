"""Checkpoints of a run: saved in the background, committed by one rename, proved before they are loaded.

A save copies this rank's shards to the host (the only time that the step waits), then a thread with a gloo group of
its own lets DCP write them into a temporary folder, rank 0 writes the manifest last and renames the folder. A reader
takes the newest folder whose every byte agrees with its manifest; the verdict is agreed by all ranks before the model
is touched. Whatever fails, fails on all ranks, as CheckpointError. docs/checkpoints.md has the format and the protocol.
"""

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from configs.errors import CheckpointError, problem
from configs.schema import CheckpointConfig
from engine.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    check_files,
    copy_tokenizer,
    discard,
    discard_newer,
    expired_steps,
    list_steps,
    parse_manifest,
    read_manifest,
    remove_stale,
    share_files,
    step_folder,
    temporary_name,
)
from engine.checkpoint.reader import CheckpointReader, open_checkpoint
from engine.checkpoint.state import Staging, differences, live_snapshot, load_targets, saved_tensors, table_of
from engine.checkpoint.storage import ManifestReader, Staged, StagedPlanner, StreamingWriter, prove_writable
from engine.files import FileEntry, sync_folder, write_whole
from engine.ranks import LOST_RANK, Ranks, describe

__all__ = ["STAGES", "CheckpointReader", "Checkpointer", "Found", "Written", "open_checkpoint"]

STAGES = ("before_shards", "in_shard", "between_shards", "before_manifest", "before_rename", "after_rename")
"""The points of a save at which `at` is called: in_shard after each tensor, the first three on every rank, the others
on rank 0."""
VISIBLE_WAIT_S = 30.0
"""How long rank 0 waits to see the files of the others: network file systems cache folders."""


@dataclass(frozen=True, slots=True)
class Found:
    """A proved checkpoint; `refused` are the newer ones that aren't, each with what is wrong with it."""

    step: int
    path: Path
    meta: dict[str, Any]
    refused: list[str]
    manifest: Manifest = field(repr=False)


@dataclass(frozen=True, slots=True)
class Written:
    """A committed save: the bytes of all ranks, and the seconds from the copy to the rename."""

    step: int
    path: Path
    num_bytes: int
    write_s: float


@dataclass(frozen=True, slots=True)
class _Save:
    """All that the background needs; nothing in it changes when the run goes on."""

    step: int
    snapshot: dict[str, Staged]
    meta: dict[str, Any]
    tokenizer_dir: Path | None
    heldout_loss: float | None
    must: bool
    keep_before: int | None


class Checkpointer:
    """Saves and loads the state of one run; every method but the properties is collective over all ranks."""

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        *,
        timeout_s: float = 1800.0,
        at: Callable[[str], None] = lambda stage: None,
        failed: Callable[[int, CheckpointError, int, bool], None] = lambda step, error, in_a_row, ends_run: None,
    ) -> None:
        """Make `folder` (a run's checkpoints/), prove that it can be written, and clear what killed saves left.

        `timeout_s` bounds how long a rank waits for the others in the checkpoint's own group; `at` is called at each of
        STAGES and is there for faults on purpose. `failed` is told of a failed save at once, by the thread that made
        it: the step, the error, how many have failed in a row, and whether that ends the run.
        """
        self.folder, self.config, self.at, self._failed = folder, config, at, failed
        self.written: Written | None = None
        self._ranks = Ranks(timeout_s)
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        self._failures, self._ends_run = 0, False
        self._refused: set[int] = set()
        self._losses: dict[int, float | None] = {}
        try:
            self._ranks.lead(self._open_folder)
        except CheckpointError:
            self._ranks.close()
            raise

    @property
    def ranks(self) -> Ranks:
        """The run's ranks in the checkpoint's own group, for what else is proved of files before a load."""
        return self._ranks

    def __enter__(self) -> "Checkpointer":
        """Use as `with Checkpointer(...) as checkpointer:`, which closes it in any case."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Close; a failed save is raised, or noted on the error that is already on its way."""
        try:
            self.close()
        except CheckpointError as failed:
            if error is None:
                raise
            error.add_note(f"the last checkpoint failed as well: {failed}")

    def _open_folder(self) -> list[str]:
        # First: what a killed save left may be what fills the disk.
        stale = remove_stale(self.folder) if self.folder.is_dir() else []
        prove_writable(self.folder)
        return stale

    # -------------------- saving

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        meta: dict[str, Any],
        tokenizer_dir: Path | None = None,
        heldout_loss: float | None = None,
        *,
        must: bool = True,
        keep_before: int | None = None,
    ) -> float:
        """Save the state after `step`; return the seconds that the caller waited.

        Asynchronous: returns when the state is copied, after waiting for an earlier save that is still being written.
        A step that is saved already and proved good is left as it is. `meta` is JSON with finite numbers; a held-out
        loss that is not finite counts as none. Raises CheckpointError when this save (blocking) or the one before it
        (asynchronous) failed, on every rank; of saves that aren't a `must`, when config.max_failures of them did in a
        row. The newest checkpoint from before step `keep_before` stays, whatever the config keeps.
        """
        begin = time.perf_counter()
        self.settle()
        tensors = saved_tensors(model, optimizer)
        snapshot = self._staging.copy(tensors) if self.config.asynchronous else live_snapshot(tensors)
        frozen_meta = json.loads(json.dumps(meta, allow_nan=False))
        loss = heldout_loss if heldout_loss is not None and abs(heldout_loss) < float("inf") else None
        job = _Save(step, snapshot, frozen_meta, tokenizer_dir, loss, must, keep_before)
        if self.config.asynchronous:
            self._thread = threading.Thread(target=self._run, args=(job,), name=f"checkpoint-{step}")
            self._thread.start()
        else:
            self._run(job)
            self.settle()
        return time.perf_counter() - begin

    def wait(self) -> None:
        """Wait for the save in flight; raise CheckpointError, once and on every rank, when it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def settle(self) -> None:
        """Wait for the save in flight; raise CheckpointError, on every rank, when it failed and that ends the run."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._ends_run:
            self.wait()
        self._error = None

    def close(self) -> None:
        """Wait for the save in flight and leave the group; call it before the run's process group is destroyed."""
        try:
            self.wait()
        finally:
            self._ranks.close()

    def _run(self, job: _Save) -> None:
        """Write and commit; never raises, since nobody would see it in a thread."""
        begin = time.perf_counter()
        try:
            path, num_bytes = self._write(job)
            self.written = Written(job.step, path, num_bytes, time.perf_counter() - begin)
            self._failures = 0
        except BaseException as error:  # DCP's CheckpointException is no Exception
            self._error = failure = CheckpointError(f"checkpoint of step {job.step}: {describe(error)}")
            failure.__cause__ = error
            self._failures += 1
            lost = LOST_RANK in str(failure)
            self._ends_run = job.must or lost or self._failures >= self.config.max_failures
            if not lost and "KeyboardInterrupt" not in str(failure):  # no failures of the save; told by who finds them
                self._failed(job.step, failure, self._failures, self._ends_run)

    def _write(self, job: _Save) -> tuple[Path, int]:
        """The protocol, from an empty temporary folder to the rename; returns the folder and its bytes."""
        ranks, target = self._ranks, self.folder / step_folder(job.step)
        if ranks.lead(lambda: os.path.lexists(target)):
            manifest, problems = self._prove(target)
            if manifest is not None and not problems:
                return target, sum(entry.size for entry in manifest.files.values())
            ranks.lead(lambda: discard(target))
        temporary = self.folder / ranks.lead(lambda: self._make_temporary(job.step))
        try:
            writer = StreamingWriter(temporary, ranks.index, self.at)
            planner = StagedPlanner()
            group = ranks.group
            save(job.snapshot, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
            num_bytes = ranks.lead(lambda: self._commit(job, temporary, target, writer))
        except BaseException as error:
            if ranks.index == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            told = describe(error).rstrip(".")
            raise CheckpointError(f"{told} (earlier checkpoints are untouched)") from error
        ranks.lead(lambda: self._expire(job.step, job.keep_before))
        return target, num_bytes

    def _make_temporary(self, step: int) -> str:
        name = temporary_name(step)
        (self.folder / name).mkdir(parents=True)
        return name

    def _commit(self, job: _Save, temporary: Path, target: Path, writer: StreamingWriter) -> int:
        """Make a checkpoint of the written files: tokenizer, manifest, rename. Rank 0 only."""
        _await_files(temporary, writer.files)
        files = dict(sorted(writer.files.items()))
        if job.tokenizer_dir is not None:
            files |= copy_tokenizer(job.tokenizer_dir, temporary)
        manifest = Manifest(
            step=job.step, files=files, tensors=writer.tensors, meta=job.meta, heldout_loss=job.heldout_loss
        )
        sync_folder(temporary)  # the names of the files before the name of the manifest
        self.at("before_manifest")
        write_whole(temporary / MANIFEST, manifest.to_text().encode())
        sync_folder(temporary)
        self.at("before_rename")
        os.rename(temporary, target)
        sync_folder(self.folder)
        self.at("after_rename")
        self._refused.discard(job.step)
        self._losses[job.step] = job.heldout_loss
        return sum(entry.size for entry in files.values())

    def _expire(self, newest: int, keep_before: int | None) -> None:
        """Delete what the config doesn't keep. Refused folders neither count nor go: they may be all that is left."""
        steps = [step for step in list_steps(self.folder) if step not in self._refused]
        for step in steps:
            if step not in self._losses:
                path = self.folder / step_folder(step)
                try:
                    self._losses[step] = parse_manifest(read_manifest(path), MANIFEST).heldout_loss
                except CheckpointError:
                    self._refused.add(step)
        losses = {step: self._losses[step] for step in steps if step not in self._refused}
        config = self.config
        gone = expired_steps(
            losses, newest, keep_last=config.keep_last, keep_every=config.keep_every, keep_best=config.keep_best,
            keep_before=keep_before,
        )  # fmt: skip
        try:
            for step in gone:
                discard(self.folder / step_folder(step))
        except OSError as error:
            raise CheckpointError(f"saved, but an older checkpoint can't be deleted: {describe(error)}") from error

    # -------------------- loading

    def find_latest(self, before: int | None = None) -> Found | None:
        """Return the newest checkpoint, or the newest from `before` a step, that is proved good; None without any.

        Raises CheckpointError when there are checkpoints and none is good: to start over is not this code's decision.
        """
        self.settle()
        refused: list[str] = []
        for step in self._ranks.lead(lambda: list_steps(self.folder)):
            if before is not None and step >= before:
                continue
            path = self.folder / step_folder(step)
            manifest, problems = self._prove(path)
            if manifest is not None and not problems:
                return Found(step, path, manifest.meta, refused, manifest)
            self._refused.add(step)
            refused.append(f"{path.name}: {'; '.join(problems)}")
        if not refused:
            return None
        lines = [f"{self.folder}: no checkpoint can be loaded:", *(f"  {line}" for line in refused)]
        lines.append("Restore one of them from a copy, or move the folder away to start the run from its beginning.")
        raise CheckpointError("\n".join(lines))

    def discard_after(self, step: int) -> None:
        """Delete all checkpoints that are newer."""
        self.settle()
        self._ranks.lead(lambda: discard_newer(self.folder, step))

    def _prove(self, path: Path) -> tuple[Manifest | None, list[str]]:
        """The manifest of a folder and all that is wrong with it, the same on every rank; each hashes its share."""
        try:
            text = self._ranks.lead(lambda: _checked_manifest(path))
        except CheckpointError as error:
            return None, [str(error)]
        manifest = parse_manifest(text, MANIFEST)
        mine = share_files(manifest.files, self._ranks.index, self._ranks.size)
        found = self._ranks.exchange(check_files(path, manifest, mine))
        return manifest, sorted(line for of_rank in found for line in of_rank)

    def load(self, found: Found, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        """Read a proved checkpoint into the model and the optimizer, on any number of ranks.

        Without an optimizer only the weights are read. Raises CheckpointError with every difference in names, shapes
        and dtypes before the first tensor is touched.
        """
        self.settle()
        targets, install = load_targets(model, optimizer, found.manifest)
        wanted = self._union(table_of(targets))
        lines = differences(found.manifest, wanted, weights_only=optimizer is None)
        if lines:
            head = f"{found.path}: the checkpoint doesn't fit this run, {len(lines)} differences:"
            raise CheckpointError("\n".join([head, *(f"  {line}" for line in lines)]))
        reader = ManifestReader(found.path, found.manifest)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        group = self._ranks.group
        try:
            load(dict(targets), storage_reader=reader, planner=planner, process_group=group, no_dist=group is None)
        except CheckpointException as error:
            raise CheckpointError(f"{found.path}: loading failed: {describe(error)}") from error
        install()

    def _union(self, mine: dict[str, Any]) -> dict[str, Any]:
        """The entries of all ranks; only a digest travels while they are the same, as they are without pipelines."""
        digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()
        if len(set(self._ranks.exchange(digest))) == 1:
            return mine
        return {name: entry for of_rank in self._ranks.exchange(mine) for name, entry in of_rank.items()}


def _checked_manifest(path: Path) -> str:
    """The text of a folder's manifest, well-formed and of the step that the folder is named for."""
    text = read_manifest(path)
    manifest = parse_manifest(text, MANIFEST)
    if step_folder(manifest.step) != path.name:
        raise CheckpointError(f"{MANIFEST} is of step {manifest.step}: the folder was renamed")
    return text


def _await_files(folder: Path, files: dict[str, FileEntry]) -> None:
    """Wait until rank 0 sees every rank's files whole; CheckpointError when it never does."""
    end = time.monotonic() + VISIBLE_WAIT_S
    while True:
        seen = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
        missing = sorted(name for name, entry in files.items() if seen.get(name) != entry.size)
        if not missing:
            return
        if time.monotonic() >= end:
            where, why = f"{folder}: files of other ranks", "every rank wrote its own"
            expected = "rank 0 can't see them whole; the folder must be on a file system that all nodes share"
            raise CheckpointError(problem(where, ", ".join(missing[:8]), expected, why))
        time.sleep(0.2)
