"""FSDP2 and HSDP: every block is a group that is gathered for its turn and freed again; the rest is the root group.

The head stays in the root group, gathered from the first block's forward to the last block's backward: in a group of
its own each chunk of the loss would gather it again. Gradients are summed, never averaged: the loss is already divided
by the global count of targets.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param

from configs.schema import ParallelConfig, PrecisionConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def shard(
    model: nn.Module,
    blocks: list[nn.Module],
    mesh: DeviceMesh,
    config: ParallelConfig,
    formats: PrecisionConfig,
    replicated: set[nn.Parameter] | None = None,
) -> None:
    """Turn the parameters into shards over `mesh`: (fsdp), or (dp_replicate, fsdp); in place, once a stage.

    `replicated` stay out, whole on each rank; the few others then make one group, gathered and reduced once a step.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[formats.compute],
        reduce_dtype=DTYPES[formats.master],
        # The rotary table enters each block in fp32; casting it would blur the positions of long sequences.
        cast_forward_inputs=False,
    )
    # Pinned, so that copies to and from the device overlap with its work.
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if config.cpu_offload else OffloadPolicy()
    # One rank gathers from nobody: freeing its copy would only have it made twice a step.
    free = config.reshard_after_forward and mesh.size() > 1
    groups = [] if replicated else blocks
    with _integer_parameters(model):
        for block in groups:
            fully_shard(block, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=free)
        fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload, ignored_params=replicated)
    if mesh.size() > 1:
        for module in (*groups, model):
            group = cast(FSDPModule, module)
            group.set_gradient_divide_factor(1.0)
            # Without this FSDP asks for a scaled sum, which gloo doesn't have.
            group.set_force_sum_reduction_for_comms(True)
    _prefetch(cast(list[FSDPModule], groups), config.prefetch_blocks)


def parameter_device(config: ParallelConfig, device: torch.device) -> torch.device:
    """Say where shards, their gradients and the optimizer's state live."""
    return torch.device("cpu") if config.cpu_offload else device


def reduce_gradients_at(model: nn.Module, *, last: bool, accumulate: str) -> None:
    """Say before a microbatch's forward what its backward communicates; `model` is one FSDP root or holds several.

    sharded: each microbatch is reduce-scattered into the shard and replicas are summed once, with the last one.
    unsharded: nothing until the last one, at the price of whole gradients on each rank.
    """
    for root in fsdp_roots(model):
        root.set_is_last_backward(last)
        if accumulate == "unsharded":
            root.set_requires_gradient_sync(last)
        else:
            root.set_requires_all_reduce(last)


def finish_backward(model: nn.Module) -> None:
    """Reduce and free after a backward pass that didn't come through the model's outputs, where FSDP2 waits for it."""
    for root in fsdp_roots(model):
        cast(Any, fully_shard).state(root)._root_post_backward_final_callback()


def fsdp_roots(model: nn.Module) -> list[FSDPModule]:
    """List the outermost FSDP modules: the model itself, or each stage in a container of stages."""
    if isinstance(model, FSDPModule):
        return [model]
    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    # The container may list a stage's blocks before the stage itself.
    nested = {inner for group in groups for inner in group.modules() if inner is not group}
    return [group for group in groups if group not in nested]


def free_gathered(model: nn.Module) -> None:
    """Free what a forward without a backward left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            cast(Any, module).reshard()


def _prefetch(blocks: list[FSDPModule], ahead: int) -> None:
    """Have each block gather the parameters of the next ones, of the pass at hand, as its own turn begins."""
    if ahead == 0:
        return
    for index, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[index + 1 : index + 1 + ahead])
        block.set_modules_to_backward_prefetch(blocks[max(index - ahead, 0) : index][::-1])


@contextmanager
def _integer_parameters(model: nn.Module) -> Iterator[None]:
    """Let `fully_shard` take codes: torch 2.11 makes each shard require gradients for a moment, which integers can't.

    Newer versions pass requires_grad for each shard; there this changes nothing.
    """
    if all(parameter.is_floating_point() for parameter in model.parameters()):
        yield
        return
    theirs = _fsdp_param.nn
    _fsdp_param.nn = SimpleNamespace(Parameter=_parameter, Module=nn.Module)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        _fsdp_param.nn = theirs


def _parameter(data: Tensor, requires_grad: bool = True) -> nn.Parameter:
    return nn.Parameter(data, requires_grad=requires_grad and data.is_floating_point())
