"""Faults on purpose, by `[fault.inject]`: each is the real thing, done to this process or its files.

What struck is remembered in the run folder's injected.jsonl, on the disk before the blow falls, so that a fault happens
once in the life of the folder however often the run is started. Nothing here detects or mends anything, and nothing of
the engine may ask whether a fault was injected.
"""

import errno
import json
import logging
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from configs.errors import CheckpointError, ConfigError, problem
from configs.schema import Config
from engine.checkpoint.checkpointer import Checkpointer
from engine.checkpoint.manifest import MANIFEST, list_steps, step_folder
from engine.data.batches import Batches
from engine.data.members import MemberBatches
from engine.data.store import shard_name
from engine.fault.plan import Planned, plan_faults
from engine.fault.record import read_lines
from engine.files import hash_file
from engine.folder import RunFolder
from parallel.mesh import Layout

_log = logging.getLogger(__name__)

SIGNALS = {kind: getattr(signal, kind.upper()) for kind in ("sigterm", "sigusr1", "sigusr2", "sigint")}
IN_STEP = ("nan_loss", "nan_grad", "spike", "straggle")
BAD_DISK = {"disk_full": errno.ENOSPC, "read_only_disk": errno.EROFS}
IN_SAVE = ("kill_in_save", "slow_disk", *BAD_DISK)
DAMAGE = ("flip_checkpoint", "truncate_checkpoint", "remove_checkpoint_file", "swap_checkpoint_files")
SPIKE = 1000.0
FIRST_STEP_S = 0.05
"""How long a step is taken to be before one was seen."""

ForwardBackward = Callable[[Sequence[Any], Tensor], Tensor]


class Injector:
    """Does to this rank what the config asks for, at its step; without a fault to come each call returns at once."""

    def __init__(self, config: Config, layout: Layout, folder: RunFolder) -> None:
        """Draw what is left to chance, and leave out what has struck already."""
        self._config, self._device = config.fault.inject, layout.device
        self._folder, self._record = folder, folder.path / "injected.jsonl"
        self._store = Path(config.data.stores[0].path)
        plan = plan_faults(self._config, config.run.steps, layout.world_size)
        struck = [entry.get("planned") for entry in read_lines(self._record)] if plan else []
        mine = [planned for planned in plan if planned.rank == layout.rank]
        self._waiting = [planned for planned in mine if self._config.repeat or asdict(planned) not in struck]
        self._step, self._began, self._laps, self._step_s = 0, 0.0, 0, FIRST_STEP_S
        self._left: dict[str, int] = {}
        """Steps or saves that each lasting fault still spoils."""
        self._spoiled: set[str] = set()
        """What is wrong with the disk during the save under way."""

    def meet(self, model: nn.Module, checkpointer: Checkpointer, data: Batches | MemberBatches) -> None:
        """Learn what there is to damage; raise ConfigError where it is not there."""
        self._model, self._checkpointer, self._data = model, checkpointer, data
        if any(planned.kind == "flip_parameter" for planned in self._waiting) and self._replicated() is None:
            why = "a flipped bit is found by comparing ranks that hold the same"
            do = "Use parallel.dp_replicate 2 or parallel.tp 2."
            raise ConfigError(problem("fault.inject.kind", "flip_parameter", "no two ranks hold the same", why, do))

    def before_step(self, step: int) -> None:
        """Strike, if it is this step's turn."""
        if not self._waiting:
            return
        now = time.monotonic()
        # A step that was disturbed says nothing of the next, and the first of a start always is.
        if self._laps > 1:
            lap = now - self._began
            self._step_s = lap if self._laps == 2 else min(self._step_s, lap)
        self._step, self._began, self._laps = step, now, self._laps + 1
        for planned in [planned for planned in self._waiting if planned.kind not in IN_SAVE]:
            # Again only when its very steps come again; once, at whatever step a start comes to first.
            lasts = self._config.steps if planned.kind in IN_STEP else 1
            if planned.step <= step and (step < planned.step + lasts or not self._config.repeat):
                self._strike(planned)

    def at_stage(self, stage: str) -> None:
        """Strike in a save, if it is its turn; the checkpoint's thread calls it."""
        if not self._waiting and not self._left:
            return
        if stage == "before_shards":
            self._begin_save()
        for planned in [planned for planned in self._waiting if planned.kind == "kill_in_save"]:
            if planned.stage == stage and planned.step <= self._step:
                self._remember(planned)
                _kill()
        if stage in ("before_shards", "between_shards") and "slow_disk" in self._spoiled:
            time.sleep(self._config.seconds)
        for kind, code in BAD_DISK.items():
            if stage == "in_shard" and kind in self._spoiled:
                raise OSError(code, os.strerror(code))

    def around(self, forward_backward: ForwardBackward) -> ForwardBackward:
        """Return forward_backward with what delays it and what poisons losses and gradients."""
        if not any(planned.kind in IN_STEP for planned in self._waiting):
            return forward_backward

        def spoiled(microbatches: Sequence[Any], num_tokens: Tensor) -> Tensor:
            if self._takes("straggle"):
                time.sleep(self._config.seconds)
            loss_sum = forward_backward(microbatches, num_tokens)
            if self._takes("nan_loss"):
                loss_sum = loss_sum * float("nan")
            if self._takes("nan_grad"):
                next(self._gradients())[0] = float("nan")
            if self._takes("spike"):
                loss_sum = loss_sum * SPIKE
                for gradient in self._gradients():
                    gradient.mul_(SPIKE)
            return loss_sum

        return spoiled

    # -------------------- the blows

    def _strike(self, planned: Planned) -> None:
        kind = planned.kind
        if kind == "kill":
            self._kill_within_step(planned)
        elif kind in DAMAGE:
            self._damage_checkpoint(planned)
        else:
            self._remember(planned)
            if kind in IN_STEP:
                self._left[kind] = 1 if self._config.repeat else self._config.steps
            elif kind in SIGNALS:
                os.kill(os.getpid(), SIGNALS[kind])
            else:
                getattr(self, f"_{kind}")()

    def _stop_file(self) -> None:
        self._folder.stop.touch()

    def _exception(self) -> None:
        raise RuntimeError("an exception of fault.inject")

    def _out_of_memory(self) -> None:
        torch.empty(1 << 60, dtype=torch.uint8, device=self._device)

    def _hang(self) -> None:
        threading.Event().wait()

    def _freeze(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def _flip_parameter(self) -> None:
        local = self._replicated()
        assert local is not None, "meet has found one"
        # The second byte from the top: mantissa of fp32 and fp64, so that the number stays finite.
        local.view(-1)[:1].view(torch.uint8)[local.element_size() - 2] ^= 0x10

    def _corrupt_batch(self) -> None:
        for store in self._data.stores:
            store.split("train").rot()

    def _truncate_store(self) -> None:
        os.truncate(self._store / "train" / shard_name(0), 0)

    def _kill_within_step(self, planned: Planned) -> None:
        def kill() -> None:
            self._remember(planned)
            _kill()

        self._waiting.remove(planned)
        moment = threading.Timer(random.Random(planned.seed).uniform(0, self._step_s), kill)
        moment.daemon = True
        moment.start()

    def _damage_checkpoint(self, planned: Planned) -> None:
        """Damage the newest checkpoint once there is another good one, and die, so that the next start meets it."""
        with suppress(CheckpointError):
            self._checkpointer.wait()
        # A step may have been saved again since; its manifest, which nothing here touches, is another then.
        damaged = {entry.get("manifest") for entry in read_lines(self._record)}
        folders = [self._folder.checkpoints / step_folder(step) for step in list_steps(self._folder.checkpoints)]
        manifests = {folder: hash_file(folder / MANIFEST) for folder in folders}
        good = [folder for folder in folders if manifests[folder] not in damaged]
        if len(good) < 2:
            return
        draw, folder = random.Random(planned.seed), good[0]
        first, second = draw.sample(sorted(folder.glob("*.safetensors")), 2)
        self._remember(planned, file=str(first), manifest=manifests[folder])
        if planned.kind == "remove_checkpoint_file":
            first.unlink()
        elif planned.kind == "truncate_checkpoint":
            os.truncate(first, draw.randrange(first.stat().st_size))
        elif planned.kind == "swap_checkpoint_files":
            aside = folder / "aside"
            for source, target in ((first, aside), (second, first), (aside, second)):
                os.rename(source, target)
        else:
            with first.open("r+b") as file:
                place = draw.randrange(first.stat().st_size)
                file.seek(place)
                byte = file.read(1)[0]
                file.seek(place)
                file.write(bytes([byte ^ 1 << draw.randrange(8)]))
        _kill()

    # -------------------- what the blows need

    def _begin_save(self) -> None:
        """See what is wrong with the disk in the save that begins."""
        for planned in [planned for planned in self._waiting if planned.kind in IN_SAVE]:
            if planned.kind != "kill_in_save" and planned.step <= self._step:
                self._remember(planned)
                self._left[planned.kind] = 1 if planned.kind == "slow_disk" else self._config.steps
        self._spoiled = {kind for kind in IN_SAVE if self._takes(kind)}

    def _takes(self, kind: str) -> bool:
        """Use up one of the steps or saves that a lasting fault spoils."""
        left = self._left.get(kind, 0)
        self._left[kind] = max(0, left - 1)
        return left > 0

    def _gradients(self) -> Any:
        """Go through this rank's own gradients, flat, without the empty ones."""
        for parameter in self._model.parameters():
            gradient = _local(parameter.grad) if parameter.grad is not None else None
            if gradient is not None and gradient.numel():
                yield gradient.view(-1)

    def _replicated(self) -> Tensor | None:
        """Find this rank's part of a trained parameter that other ranks hold as well."""
        for parameter in self._model.parameters():
            if isinstance(parameter, DTensor) and parameter.requires_grad and parameter.to_local().numel():
                sizes = parameter.device_mesh.shape
                held = zip(parameter.placements, sizes, strict=True)
                if any(isinstance(placement, Replicate) and size > 1 for placement, size in held):
                    return parameter.to_local().detach()
        return None

    def _remember(self, planned: Planned, **more: Any) -> None:
        """Write down, on the disk, that a fault strikes now."""
        if not self._config.repeat and planned in self._waiting:
            self._waiting.remove(planned)
        _log.warning("fault.inject: %s in step %d", planned.kind, self._step)
        entry = {"time": time.time(), "kind": planned.kind, "rank": planned.rank, "step": self._step, **more}
        with self._record.open("a") as file:
            file.write(json.dumps({**entry, "planned": asdict(planned)}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
