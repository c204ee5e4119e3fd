"""Recompute: activations that the backward pass computes again instead of keeping them (arXiv:1604.06174).

`full` keeps a block's input. `selective` also keeps what costs most to compute for what it weighs: attention's output,
what leaves every other projection, and the results of tensor parallelism's reductions, which would cost a collective.
Gradients are the same bits as without: the same operations run on the same numbers, and dropout's masks are functions
of the position.

A block's class is swapped for a subclass, so that parameters keep their names, all blocks share one graph when they are
compiled afterwards, and hooks and methods put on the block's parts stay. Recompute first, then compile, then shard.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from configs.schema import RecomputeConfig
from models.adapters.lora import Lora
from models.linear import Linear

_MATMULS = frozenset({"aten::mm", "aten::addmm", "aten::linear"})
_KEPT = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_attention_math",
        "flash_attn::_flash_attn_forward",
        "flash_attn::_flash_attn_varlen_forward",
        "torch_attn::_varlen_attn",
        "flex_attention",
        # A compiled function in a block that is not compiled: only attention's is.
        "inductor_compiled_code",
        "ropewalk::blocked_attention",
        "_c10d_functional::reduce_scatter_tensor",
    }
)


def recompute(blocks: Sequence[nn.Module], config: RecomputeConfig) -> None:
    """Make every n-th block compute its activations again in the backward pass; in place, before compiling."""
    if config.mode == "none":
        return
    for block in blocks[:: config.every_blocks]:
        block.__class__ = _recomputed(type(block), _turns(block) if config.mode == "selective" else ())


def _turns(block: nn.Module) -> tuple[bool, ...]:
    """Say of a block's matrix products, in the order they are computed, which are kept.

    Of every second projection, keys, output and up, what leaves it: with LoRA beside it that is the last of three
    products. The other half would hold the last projection, which no gradient needs and the backward pass stops before.
    """
    turns: list[bool] = []
    for index, linear in enumerate(module for module in block.modules() if isinstance(module, Linear)):
        turn, lora = index % 2 == 1, linear.beside
        if not isinstance(lora, Lora):
            turns.append(turn)
        elif lora.dora:
            turns += [False] * (6 if lora.dropout else 4)
        else:
            # Several members are batched products, which are not counted.
            turns += [False, False, turn] if len(lora.scales) == 1 else [False]
        turns += [False] * (2 if linear.after is not None else 0)
    return tuple(turns) or (False, True)


@functools.cache
def _recomputed(kind: type[nn.Module], turns: tuple[bool, ...]) -> type[nn.Module]:
    """Make the subclass of a block's class whose forward keeps little; one for all blocks of one kind.

    Without turns nothing but the input is kept.
    """
    # No random numbers are drawn, so there is no state to set back.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if turns:
        options["context_fn"] = functools.partial(_contexts, turns)

    class Recomputed(kind):
        def forward(self, *inputs: Any) -> Any:
            if not torch.is_grad_enabled():
                return super().forward(*inputs)
            return checkpoint(super().forward, *inputs, **options)

    Recomputed.__name__ = Recomputed.__qualname__ = f"Recomputed{kind.__name__}"
    return Recomputed


def _contexts(turns: tuple[bool, ...]) -> tuple[Any, Any]:
    """Make the modes under which one block runs forward, and again in the backward pass; they share what is kept."""
    counts: Counter[bool] = Counter()

    def policy(context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
        name = operation.name()
        if name in _MATMULS:
            keep = turns[counts[context.is_recompute] % len(turns)]
            counts[context.is_recompute] += 1
        else:
            keep = name in _KEPT or (name == "aten::cat" and _joins_attention(arguments))
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _joins_attention(arguments: tuple[Any, ...]) -> bool:
    """Tell whether a graph being traced puts parts of attention's output together.

    Only there: blocked attention is then many operations, and what leads to a kept result is dropped from the graph,
    while uncompiled it would all run again. Nothing else of a block is joined along the third dim from the front.
    """
    return get_proxy_mode() is not None and arguments[1:] == (2,)
