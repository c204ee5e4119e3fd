"""The mesh of ranks: its axes, outermost first, and what a rank's coordinates mean for the data.

Ranks that differ in `dp_replicate` hold copies of each other; ranks that differ in `dp_shard` hold parts of one copy.
Both see different sequences: together they are the data-parallel ranks.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from configs.schema import ParallelConfig

AXES = ("dp_replicate", "dp_shard")


@dataclass(frozen=True, slots=True)
class Layout:
    """The mesh, this rank's device, and its place among the data-parallel ranks."""

    mesh: DeviceMesh
    device: torch.device
    dp_rank: int
    dp_size: int

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the mesh's axes, outermost first."""
        return AXES

    @property
    def shape(self) -> tuple[int, ...]:
        """Degrees of the axes."""
        return tuple(self.mesh.shape)

    def sum_over_dp(self, value: torch.Tensor) -> torch.Tensor:
        """Sum over the data-parallel ranks, in place; today they are all ranks of the run."""
        dist.all_reduce(value)
        return value

    def max_over_dp(self, values: list[float]) -> list[float]:
        """Take the largest of each value over the data-parallel ranks; waits for the device."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()


def build_layout(parallel: ParallelConfig, device: torch.device) -> Layout:
    """Arrange all ranks of the default process group by the degrees of a resolved config."""
    shape = (parallel.dp_replicate, parallel.dp_shard)
    assert shape[0] * shape[1] == dist.get_world_size(), f"degrees {shape} for {dist.get_world_size()} ranks"
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=AXES)
    return Layout(mesh, device, dp_rank=dist.get_rank(), dp_size=dist.get_world_size())
