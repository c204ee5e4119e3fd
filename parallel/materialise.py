"""Giving a model that was built on the meta device its memory and its values, each rank its own part only.

What a value is depends on the parameter's name and the place of an element in the whole parameter, never on the layout.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

Fill = Callable[[torch.Tensor, str, tuple[int, ...], tuple[int, ...]], None]
"""(local, name, global_shape, global_offset): write the rectangle of the named parameter that begins at the offset."""


def materialise(model: nn.Module, device: torch.device, fill: Fill) -> None:
    """Allocate this rank's part of every parameter on `device` and fill it."""
    tied = list(_tied(model))
    model.to_empty(device=device)
    for module, key, owner, owners_key in tied:  # to_empty gives each name of a plain parameter memory of its own
        setattr(module, key, getattr(owner, owners_key))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            local, offset = local_part(parameter)
            fill(local, name, tuple(parameter.shape), offset)


def _tied(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module, str]]:
    """Yield the further places of each parameter that has several, and its first."""
    first: dict[nn.Parameter, tuple[nn.Module, str]] = {}
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            owner, owners_key = first.setdefault(parameter, (module, key))
            if owner is not module:
                yield module, key, owner, owners_key


def local_part(parameter: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Return this rank's part of a parameter, which may be empty, and where it begins in the whole."""
    if not isinstance(parameter, DTensor):
        return parameter, (0,) * parameter.dim()
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), tuple(offset)
