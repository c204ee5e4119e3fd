"""A check, before any memory is taken, that what a layout holds on each rank for sure can fit.

A lower bound, so that nothing that fits is refused: an even share of what the layout divides (the fullest stage of a
pipeline has no less), without activations, gathered parameters and what libraries keep, which depend on the kernels.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from configs.errors import ConfigError, problem
from configs.schema import Config
from engine.optim import STATE_TENSORS
from models.flops import num_matmul_params, num_params
from parallel.fsdp import DTYPES

GIB = 2**30
_CGROUP_LIMITS = ("memory.max", "memory.limit_in_bytes")
_SHARING_AXES = ("dp_shard", "cp", "tp", "pp")


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes that a rank holds at once, whatever the batch."""

    state: int
    """Shards: masters, gradients and optimizer state; in host memory under parallel.cpu_offload."""
    whole: int
    """On the device: gradients kept whole by parallel.accumulate, or else the head's while the loss is computed."""


def held_bytes(config: Config) -> Held:
    """Count what a rank of a resolved config holds for sure."""
    model, parallel = config.model, config.parallel
    size = DTYPES[config.precision.master].itemsize
    params, head = num_params(model), model.vocab_size * model.dim
    hidden = num_matmul_params(model) - head
    per_hidden, per_other = STATE_TENSORS[config.optim.kind]
    moments = hidden * per_hidden + (params - hidden) * per_other
    copies = parallel.tp * parallel.pp
    ranks = parallel.dp_shard * parallel.cp * copies
    lasting, gradients = (params + moments) * size // ranks, params * size // ranks
    if parallel.accumulate == "unsharded":
        return Held(lasting + gradients, params * size // copies)
    # The loss makes one whole gradient of the head, before a step's first gradients are there; the last stage may
    # have fewer layers than the others.
    if parallel.pp == 1 and head * size // parallel.tp > gradients:
        return Held(lasting, head * size // parallel.tp)
    return Held(lasting + gradients, 0)


def device_bytes(device: torch.device, ranks_on_node: int) -> int:
    """Memory of one rank: its GPU's, or its share of what the machine has and its cgroups grant."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([installed, *cgroup_limits()]) // ranks_on_node


def cgroup_limits(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """List the memory limits of this process's control groups and all that they are in; none off Linux."""
    if not own.exists():
        return []
    limits: list[int] = []
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        group = base / path.lstrip("/")
        # In a container the path may be the host's; the group seen as the root is then one's own.
        for folder in (group, *group.parents):
            if not folder.is_relative_to(base):
                break
            limits += [limit for name in _CGROUP_LIMITS if (limit := _limit(folder / name))]
    return limits


def check_memory(config: Config, device: torch.device, ranks_on_node: int) -> None:
    """Refuse a resolved config whose weights, gradients and optimizer state alone exceed the memory."""
    held, parallel = held_bytes(config), config.parallel
    offloaded = parallel.cpu_offload and device.type != "cpu"
    on_host = held.state if offloaded else 0
    _refuse(config, on_host, torch.device("cpu"), ranks_on_node, "of weights, gradients and optimizer state a rank")
    what = "of whole gradients a rank" if offloaded else "of weights, gradients and optimizer state a rank"
    _refuse(config, held.whole + held.state - on_host, device, ranks_on_node, what)


def _refuse(config: Config, needed: int, device: torch.device, ranks_on_node: int, what: str) -> None:
    there, parallel = device_bytes(device, ranks_on_node), config.parallel
    if needed <= there:
        return
    unsharded = parallel.accumulate == "unsharded"
    axes = [axis for axis in _SHARING_AXES if getattr(parallel, axis) > 1] or ["dp_shard"]
    degrees = " * ".join(str(getattr(parallel, axis)) for axis in axes)
    where = "parallel.accumulate = 'unsharded'" if unsharded else f"parallel.{' * '.join(axes)} = {degrees}"
    do = "Use parallel.accumulate = 'sharded', or shard over more ranks." if unsharded else "Shard over more ranks."
    got = f"{needed / GIB:.1f} GiB {what}"
    raise ConfigError(problem(f"{where}: {got}", "", f"must fit the {there / GIB:.1f} GiB of {device.type}", "", do))


def _limit(file: Path) -> int | None:
    """Read a limit; None where there is none."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
