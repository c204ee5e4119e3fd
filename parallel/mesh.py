"""The mesh of ranks: its axes, outermost first, and what a rank's coordinates mean for the data.

    pp            ranks hold different layers of one model
    dp_replicate  ranks hold copies of each other and see other sequences
    dp_shard      ranks hold parts of one copy and see other sequences
    cp            ranks hold parts of one copy and see other parts of the same sequences
    tp            ranks hold parts of each matrix and see the same tokens; innermost, within a node

FSDP shards over dp_shard x cp together: to parameters the two are the same.
"""

from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from configs.schema import ParallelConfig

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True, slots=True)
class Layout:
    """The mesh, this rank's device, and its place on each axis."""

    mesh: DeviceMesh
    device: torch.device
    shards: DeviceMesh
    """What parameters are sharded over, (fsdp), or (dp_replicate, fsdp) where there are replicas."""
    tp: DeviceMesh
    """What matrices are cut over, of the same root as `shards`."""
    tokens: DeviceMesh
    """The ranks that share a batch's tokens: dp_replicate x dp_shard x cp."""
    losses: DeviceMesh
    """The ranks that may hold a part of a batch's loss: pp x dp_replicate x dp_shard x cp."""

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the mesh's axes, outermost first."""
        return AXES

    @property
    def shape(self) -> tuple[int, ...]:
        """Degrees of the axes."""
        return tuple(self.mesh.shape)

    def degree(self, axis: str) -> int:
        """Count the ranks along an axis."""
        return self.shape[AXES.index(axis)]

    def index(self, axis: str) -> int:
        """This rank's place along an axis."""
        return self.mesh.get_local_rank(axis)

    @property
    def rank(self) -> int:
        """This rank among all; 0 speaks for the run."""
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return dist.get_world_size()

    @property
    def dp_rank(self) -> int:
        """Place among the ranks that see different sequences."""
        return self.index("dp_replicate") * self.degree("dp_shard") + self.index("dp_shard")

    @property
    def dp_size(self) -> int:
        """Ranks that see different sequences."""
        return self.degree("dp_replicate") * self.degree("dp_shard")

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """Every process group that the run communicates in."""
        meshes = (self.mesh, self.shards, self.tp, self.tokens, self.losses)
        found = [group for mesh in meshes for group in mesh.get_all_groups()]
        return [dist.group.WORLD, *dict.fromkeys(found)] if dist.group.WORLD is not None else found

    def sum_over_tokens(self, value: torch.Tensor) -> torch.Tensor:
        """Sum, in place, what is counted of each rank's own tokens; the ranks of a pipeline or of tp count the same."""
        dist.all_reduce(value, group=self.tokens.get_group())
        return value

    def sum_over_losses(self, value: torch.Tensor) -> torch.Tensor:
        """Sum, in place, the losses of each rank's own tokens; ranks without the last stage bring zeros."""
        dist.all_reduce(value, group=self.losses.get_group())
        return value

    def norm_over_stages(self, norm: torch.Tensor) -> torch.Tensor:
        """Combine the norms of the stages' gradients into the norm of all of them."""
        if self.degree("pp") == 1:
            return norm
        square = norm.double().square()
        dist.all_reduce(square, group=self.mesh.get_group("pp"))
        return square.sqrt().to(norm.dtype)

    def max_over_ranks(self, values: list[float]) -> list[float]:
        """Take the largest of each value over all ranks; waits for the device."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()


def build_layout(parallel: ParallelConfig, device: torch.device) -> Layout:
    """Arrange all ranks of the default process group by the degrees of a resolved config."""
    degrees = {axis: getattr(parallel, axis) for axis in AXES}
    assert prod(degrees.values()) == dist.get_world_size(), f"degrees {degrees} for {dist.get_world_size()} ranks"
    # FSDP and tensor parallelism need axes of one mesh, and FSDP sees dp_shard and cp as one axis.
    shape = (parallel.pp, parallel.dp_replicate, parallel.dp_shard * parallel.cp, parallel.tp)
    root = init_device_mesh(device.type, shape, mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp"))
    if parallel.tp > 1:
        # Nobody holds it: DTensor looks it up, to sum a norm over both axes at once.
        root["fsdp", "tp"]._flatten("fsdp_tp")
    return Layout(
        # By index: torch 2.11 takes no name here.
        root._unflatten(AXES.index("dp_shard"), (parallel.dp_shard, parallel.cp), ("dp_shard", "cp")),
        device,
        shards=root["dp_replicate", "fsdp"] if parallel.dp_replicate > 1 else root["fsdp"],
        tp=root["tp"],
        tokens=root["dp_replicate", "fsdp"]._flatten("tokens"),
        losses=root["pp", "dp_replicate", "fsdp"]._flatten("losses"),
    )
