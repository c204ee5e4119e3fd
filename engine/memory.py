"""A check, before any memory is taken, that what a layout holds on each rank for sure can fit."""

import os

import torch

from configs.errors import ConfigError, problem
from configs.schema import Config
from models.flops import num_params
from parallel.fsdp import DTYPES

GIB = 2**30


def state_bytes(config: Config) -> int:
    """Bytes a rank holds whatever the batch: masters, gradients, two moments, and gradients kept whole if asked.

    Activations and gathered parameters come on top; they depend on the kernels.
    """
    size = DTYPES[config.precision.master].itemsize
    params = num_params(config.model)
    whole = params * size if config.parallel.accumulate == "unsharded" else 0
    return 4 * size * params // config.parallel.dp_shard + whole


def device_bytes(device: torch.device, ranks_on_node: int) -> int:
    """Memory of one rank: its GPU's, or its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks_on_node


def check_memory(config: Config, device: torch.device, ranks_on_node: int) -> None:
    """Refuse a resolved config whose weights, gradients and optimizer state alone exceed the device."""
    needed, there = state_bytes(config), device_bytes(device, ranks_on_node)
    if needed <= there:
        return
    got = f"{needed / GIB:.1f} GiB of weights, gradients and optimizer state a rank"
    whole = config.parallel.accumulate == "unsharded"
    where = "parallel.accumulate = 'unsharded'" if whole else f"parallel.dp_shard = {config.parallel.dp_shard}"
    do = "Use parallel.accumulate = 'sharded', or shard over more ranks." if whole else "Shard over more ranks."
    raise ConfigError(problem(f"{where}: {got}", "", f"must fit the {there / GIB:.1f} GiB of {device.type}", "", do))
