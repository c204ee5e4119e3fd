"""The state of a run as tensors by name: what is saved, its copy on the host, and where it is loaded to.

`model.<name>` for trainable parameters and persistent buffers, `optimizer.<name>.<key>` for what the optimizer keeps of
each parameter; names are those of the bare model, whatever wraps it. Parameter groups are not state: lr is a function
of the step, the rest is config. This file knows FSDP2 and optimizers; it knows nothing of files.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from engine.checkpoint.manifest import Manifest, TensorEntry
from engine.checkpoint.storage import DTYPES, Staged

WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}


def canonical_name(name: str) -> str:
    """Return a parameter's name without the segments that compilation and recomputation add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what a run changes, by canonical name: trainable parameters, tied ones once, and persistent buffers.

    Frozen parameters are the base's: they are filled from where it lies at every start, and are in no checkpoint.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):  # after an evaluation the root's parameters are still gathered
            module.reshard()
    tensors: dict[str, torch.Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    buffers = dict(model.named_buffers())
    if buffers:
        tensors |= {name: buffers[name] for name in model.state_dict() if name in buffers}
    return {canonical_name(name): tensor for name, tensor in tensors.items()}


def saved_tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint by its name there; live ones, not copies."""
    tensors = model_tensors(model)
    named = {f"model.{name}": tensor for name, tensor in tensors.items()}
    for parameter, name, _ in _trained(tensors, optimizer):
        assert optimizer is not None, "parameters without an optimizer"
        for key, value in optimizer.state.get(parameter, {}).items():
            assert isinstance(value, torch.Tensor), f"optimizer state {key!r} of {name} isn't a tensor"
            named[f"optimizer.{name}.{key}"] = value
    return named


def _trained(
    tensors: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer | None
) -> list[tuple[torch.Tensor, str, dict[str, Any]]]:
    """Each parameter of the optimizer with its name and its group."""
    if optimizer is None:
        return []
    names = {id(tensor): name for name, tensor in tensors.items()}
    trained = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert id(parameter) in names, "the optimizer holds a parameter that the model doesn't"
            trained.append((parameter, names[id(parameter)], group))
    return trained


class Staging:
    """Host copies of this rank's boxes; the memory is kept from one save to the next, since one is in flight at most.

    Pinned for CUDA: the copy is then one DMA a tensor. Kept: on CPUs first touching fresh pages costs more than the
    copy itself.
    """

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._buffers: dict[str, torch.Tensor] = {}

    def copy(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Staged]:
        """Return a snapshot that later steps can't change."""
        snapshot = {}
        kept = {}
        for name, (item, live) in _boxes(tensors).items():
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != live.shape or buffer.dtype != live.dtype:
                buffer = torch.empty(live.shape, dtype=live.dtype, pin_memory=live.is_cuda)
            buffer.copy_(live, non_blocking=True)
            kept[name] = buffer
            snapshot[name] = Staged(item, buffer)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.current_stream().synchronize()
        self._buffers = kept
        return snapshot


def live_snapshot(tensors: Mapping[str, torch.Tensor]) -> dict[str, Staged]:
    """Return a snapshot that shares the live memory: for a save that ends before the next step begins."""
    return {name: Staged(item, live) for name, (item, live) in _boxes(tensors).items()}


Box = tuple[str, tuple[int, ...], tuple[int, ...]]
"""What a part of a tensor is, whoever holds it: the tensor's name, where the part begins, its shape."""


def held_boxes(tensors: Mapping[str, torch.Tensor]) -> dict[Box, torch.Tensor]:
    """Return what this rank holds; ranks with the same box have copies of it."""
    held = {}
    for name, (item, live) in _boxes(tensors).items():
        held[name, tuple(item.index.offset or ()), tuple(live.shape)] = live
    return held


def _boxes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[WriteItem, torch.Tensor]]:
    """This rank's part of each tensor, with DCP's description of where it lies."""
    boxes = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            items = tensor.__create_write_items__(name, tensor)  # DCP's own protocol for sharded tensors
            assert len(items) <= 1, f"{name} has {len(items)} boxes on this rank"
            if items:
                boxes[name] = (items[0], tensor.to_local())
        else:
            origin = torch.Size([0] * tensor.dim())
            chunk = ChunkStorageMetadata(origin, tensor.size())
            data = TensorWriteData(chunk, TensorProperties(dtype=tensor.dtype), tensor.size())
            boxes[name] = (WriteItem(MetadataIndex(name, origin), WriteItemType.TENSOR, tensor_data=data), tensor)
    return boxes


# -------------------- loading


def load_targets(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, manifest: Manifest
) -> tuple[dict[str, torch.Tensor], Callable[[], None]]:
    """Return the tensors that a checkpoint is read into, and what makes the optimizer own its part of them.

    An optimizer that has not stepped yet has no state: it is made from the manifest, placed like its parameter, and
    handed over only after the load.
    """
    tensors = model_tensors(model)
    targets = {f"model.{name}": tensor.detach() for name, tensor in tensors.items()}
    saved_keys: dict[str, list[str]] = {}
    for name in manifest.tensors:
        if name.startswith("optimizer."):
            parameter_name, _, key = name.removeprefix("optimizer.").rpartition(".")
            saved_keys.setdefault(parameter_name, []).append(key)
    fresh: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []
    for parameter, name, group in _trained(tensors, optimizer):
        assert optimizer is not None, "parameters without an optimizer"
        state = dict(optimizer.state.get(parameter, {}))
        if not state:
            entries = {key: manifest.tensors[f"optimizer.{name}.{key}"] for key in saved_keys.get(name, ())}
            # What the checkpoint lacks is wanted all the same, and so refused: fresh moments would go unnoticed.
            state = {key: torch.zeros(()) for key in group.get("state_keys", ())}
            state |= {key: _empty_state(parameter, key, entry, group) for key, entry in entries.items()}
            fresh.append((parameter, state))
        targets |= {f"optimizer.{name}.{key}": value for key, value in state.items()}

    def install() -> None:
        for parameter, state in fresh:
            if state and optimizer is not None:
                optimizer.state[parameter] = state

    return targets, install


def _empty_state(parameter: torch.Tensor, key: str, entry: TensorEntry, group: Mapping[str, Any]) -> torch.Tensor:
    """Optimizer state to read into: of the parameter's shape placed like it, anything else whole on every rank."""
    dtype = DTYPES.get(entry.dtype, torch.float32)
    if key != "step" and entry.shape == tuple(parameter.shape):
        return torch.zeros_like(parameter.detach(), dtype=dtype)
    # torch.optim keeps a parameter's step on the host unless a kernel on the device reads it.
    on_device = key != "step" or group.get("fused") or group.get("capturable")
    return torch.zeros(entry.shape, dtype=dtype, device=parameter.device if on_device else "cpu")


def table_of(targets: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and whole shape by name."""
    return {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in targets.items()}


def differences(manifest: Manifest, wanted: Mapping[str, tuple[str, tuple[int, ...]]], weights_only: bool) -> list[str]:
    """Return every way in which a checkpoint doesn't fit, one a line; without the optimizer's part if weights_only."""
    saved = {name: e for name, e in manifest.tensors.items() if not weights_only or name.startswith("model.")}
    lines = []
    for name in sorted(saved.keys() | wanted.keys()):
        if name not in wanted:
            lines.append(f"{name}: in the checkpoint, but not in the run")
        elif name not in saved:
            lines.append(f"{name}: in the run, but not in the checkpoint")
        elif (saved[name].dtype, saved[name].shape) != (wanted[name][0], tuple(wanted[name][1])):
            here = f"{wanted[name][0]} {list(wanted[name][1])}"
            lines.append(f"{name}: {saved[name].dtype} {list(saved[name].shape)} in the checkpoint, {here} in the run")
    return lines
