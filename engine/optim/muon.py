"""Muon for hidden matrices, AdamW for everything else, as one optimizer on any layout.

Muon steps along the momentum made orthogonal by Newton-Schulz (kellerjordan.github.io/posts/muon), scaled by
0.2 * sqrt(max(rows, columns)) so that AdamW's learning rate and weight decay serve both (arXiv:2502.16982 eq. 4). The
arithmetic is torch.optim.Muon's with adjust_lr_fn="match_rms_adamw". That one computes in bf16 and gathers each sharded
matrix product by product; here a matrix is gathered once, one rank makes it orthogonal, and each takes its part of the
result, so that the ranks share the work. In fp64 all of it stays fp64.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial

from engine.optim.shards import gradient_of, local_part, skip_flag

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that takes small singular values up fastest, and ends between about 0.7 and 1.2."""
_NEWTON_SCHULZ_STEPS = 5


class Muon(torch.optim.Optimizer):
    """Both rules behind one list of groups and one state."""

    def __init__(
        self,
        matrices: list[torch.nn.Parameter],
        rest: torch.optim.AdamW | None,
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
    ) -> None:
        """Take the matrices for Muon, and AdamW over the other parameters; its groups and state become ours."""
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "state_keys": ("momentum_buffer",)}
        super().__init__(matrices, defaults)
        self._muon, self._rest = self.param_groups[0], rest
        if rest is not None:
            self.param_groups += rest.param_groups
            rest.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse: it would part the two rules' state; checkpoints write into `state` (engine/checkpoint/state.py)."""
        raise NotImplementedError("Muon's state is loaded by engine/checkpoint/state.py")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient; every rank of a mesh takes part."""
        assert closure is None, "the train step computes the loss, not the optimizer"
        if self._rest is not None:
            self._rest.found_inf = getattr(self, "found_inf", None)  # pyright: ignore[reportAttributeAccessIssue]
            self._rest.step()
        by_mesh: dict[DeviceMesh | None, list[Tensor]] = {}
        for parameter in self._muon["params"]:
            if parameter.grad is not None:
                by_mesh.setdefault(_mesh_of(parameter), []).append(parameter)
        for mesh, parameters in by_mesh.items():
            for batch in _rounds(parameters, 1 if mesh is None else mesh.size()):
                self._update(batch, 0 if mesh is None else _place(mesh))

    def _update(self, batch: list[Tensor], mine: int) -> None:
        """Update a matrix for each rank of the mesh; this rank orthogonalises number `mine`, if there are so many."""
        skip = skip_flag(self, batch[0].device)
        own: Tensor | None = None
        for index, parameter in enumerate(batch):
            direction = self._direction(parameter, skip)
            # All ranks gather all matrices, each keeps its own.
            whole = direction.full_tensor() if isinstance(direction, DTensor) else direction
            own = whole if index == mine else own
            del direction, whole
        if own is not None:
            own = orthogonalize(own)
        for index, parameter in enumerate(batch):
            part = _share(own if index == mine else None, parameter)
            lr, rows_or_columns = self._muon["lr"], max(parameter.shape)
            weight = local_part(parameter.detach())
            updated = weight.mul(1 - lr * self._muon["weight_decay"])
            updated.add_(part, alpha=-lr * 0.2 * math.sqrt(rows_or_columns))
            weight.copy_(torch.where(skip, weight, updated))

    def _direction(self, parameter: Tensor, skip: Tensor) -> Tensor:
        """Move the momentum on and return what is to be orthogonalised, laid out like the parameter."""
        state, grad, momentum = self.state[parameter], gradient_of(parameter), self._muon["momentum"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer, local = local_part(state["momentum_buffer"]), local_part(grad)
        buffer.copy_(torch.where(skip, buffer, buffer.lerp(local, 1 - momentum)))
        direction = local.lerp(buffer, momentum)  # Nesterov's
        if direction.dtype != torch.float64:
            direction = direction.bfloat16()  # before it is gathered: half the bytes, and the same numbers
        if _mesh_of(parameter) is None or not isinstance(parameter, DTensor):
            return direction
        return DTensor.from_local(
            direction, parameter.device_mesh, parameter.placements,
            run_check=False, shape=parameter.shape, stride=parameter.stride(),
        )  # fmt: skip


def orthogonalize(matrix: Tensor) -> Tensor:
    """Take a matrix's singular values to about 1 by five steps of a Newton-Schulz iteration, in the matrix's dtype."""
    a, b, c = _COEFFICIENTS
    wide = matrix if matrix.size(0) <= matrix.size(1) else matrix.T  # the gram matrix is then the smaller one
    wide = wide / wide.norm().clamp(min=1e-7)  # no singular value above 1, where the iteration would diverge
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if matrix.size(0) <= matrix.size(1) else wide.T


def _rounds(parameters: list[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Deal the matrices out, one a rank and round; alike in cost, so that few ranks wait."""
    ordered = sorted(parameters, key=lambda parameter: -parameter.numel() * min(parameter.shape))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _share(own: Tensor | None, parameter: Tensor) -> Tensor:
    """Return this rank's part of the matrix that one rank of the mesh brings; the others bring None."""
    mesh = _mesh_of(parameter)
    if mesh is None:
        assert own is not None, "a matrix on one rank belongs to it"
        return own
    assert isinstance(parameter, DTensor), "only DTensors have a mesh"
    if own is None:
        dtype = parameter.dtype if parameter.dtype == torch.float64 else torch.bfloat16
        own = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
    # A sum with zeros: exact, and one reduce-scatter for any placement, where a scatter would know only even shards.
    summed = DTensor.from_local(own.contiguous(), mesh, [Partial()] * mesh.ndim, run_check=False)
    return local_part(summed.redistribute(placements=parameter.placements))


def _mesh_of(parameter: Tensor) -> DeviceMesh | None:
    """The ranks that share a parameter; None where this one holds it alone."""
    if not isinstance(parameter, DTensor) or parameter.device_mesh.size() == 1:
        return None
    return parameter.device_mesh


def _place(mesh: DeviceMesh) -> int:
    """This rank's number among those of a mesh."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "the rank is outside of the mesh of its own parameter"
    place = 0
    for index, size in zip(coordinate, mesh.shape, strict=True):
        place = place * size + index
    return place
