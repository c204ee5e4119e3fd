"""A check, before any memory is taken, that what a layout holds on each rank for sure can fit.

A lower bound, so that nothing that fits is refused: an even share of what the layout divides (the fullest stage of a
pipeline has no less), without activations, gathered parameters and what libraries keep, which depend on the kernels.
"""

import os
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

from configs.errors import ConfigError, problem
from configs.schema import Config
from configs.targets import projections
from engine.optim import STATE_TENSORS
from models.adapters import trained_shapes
from models.flops import num_matmul_params, num_params
from models.hf_weights import parameter_shapes
from models.quantized import held_bytes as quantized_bytes
from models.quantized_formats import can_quantize
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
    if config.adapter.kind != "none":
        return _held_beside_a_base(config)
    model, parallel = config.model, config.parallel
    size = DTYPES[config.precision.master].itemsize
    params, head = num_params(model), model.vocab_size * model.dim
    copies = parallel.tp * parallel.pp
    ranks = parallel.dp_shard * parallel.cp * copies
    lasting, gradients = saved_bytes(config) // ranks, params * size // ranks
    if parallel.accumulate == "unsharded":
        return Held(lasting + gradients, params * size // copies)
    # The loss makes one whole gradient of the head, before a step's first gradients are there; the last stage may
    # have fewer layers than the others.
    if parallel.pp == 1 and head * size // parallel.tp > gradients:
        return Held(lasting, head * size // parallel.tp)
    return Held(lasting + gradients, 0)


def saved_bytes(config: Config) -> int:
    """Count the bytes of a checkpoint of a resolved config: masters and optimizer state of what is trained."""
    size = DTYPES[config.precision.master].itemsize
    per_hidden, per_other = STATE_TENSORS[config.optim.kind]
    if config.adapter.kind != "none":
        return _trained_params(config) * (1 + per_other) * size
    params, head = num_params(config.model), config.model.vocab_size * config.model.dim
    hidden = num_matmul_params(config.model) - head
    return (params + hidden * per_hidden + (params - hidden) * per_other) * size


def frozen_bytes(config: Config) -> int:
    """Count the bytes of all frozen parameters of a resolved config, on one rank that has them whole."""
    model, adapter = config.model, config.adapter
    trained = trained_shapes(model, adapter)
    size = DTYPES[config.precision.compute].itemsize
    shapes = parameter_shapes(model)
    total = sum(prod(shape) * size for name, shape in shapes.items() if name not in trained)
    if adapter.quantization == "none":
        return total
    for name in projections(model):
        height, width = shapes[f"{name}.weight"]
        if can_quantize(adapter.quantization, height, width):
            total += quantized_bytes(adapter.quantization, height, width) - height * width * size
    return total


def choose_base(config: Config, device: torch.device, ranks_on_node: int) -> Config:
    """Settle adapter.base of a resolved config: replicated where a copy takes no more than half of a rank's memory.

    The other half is for activations. On a single data-parallel rank there is nothing to gather from, and FSDP would
    hold everything twice.
    """
    adapter, parallel = config.adapter, config.parallel
    if adapter.kind == "none" or adapter.base != "auto":
        return config
    copy = frozen_bytes(config) // (parallel.tp * parallel.pp)
    alone = parallel.dp_shard * parallel.cp == 1
    fits = alone or 2 * copy <= device_bytes(device, ranks_on_node)
    base = "replicated" if fits and not parallel.cpu_offload else "sharded"
    return replace(config, adapter=replace(adapter, base=base))


def _held_beside_a_base(config: Config) -> Held:
    parallel = config.parallel
    copies = parallel.tp * parallel.pp
    shards = parallel.dp_shard * parallel.cp
    trained = _trained_params(config) * DTYPES[config.precision.master].itemsize
    lasting = saved_bytes(config) // (copies * shards)
    frozen = frozen_bytes(config) // (copies * (1 if config.adapter.base == "replicated" else shards))
    gradients = trained // (copies if parallel.accumulate == "unsharded" else copies * shards)
    return Held(lasting + frozen, gradients)


def _trained_params(config: Config) -> int:
    return sum(prod(shape) for shape in trained_shapes(config.model, config.adapter).values())


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
