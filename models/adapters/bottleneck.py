"""Bottleneck adapters: a small feed-forward layer with a residual after attention and after the feed-forward.

    y = x + up(gelu(down(x)))

It stands behind the projection's sum, where each rank of tensor parallelism has its own positions, so its parameters
are replicated and nothing is sent. `up` starts at zero: at first the model is the base. Source: arXiv:1902.00751.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from models.linear import Linear

PLACES = ("self_attn.o_proj", "mlp.down_proj")
PARTS = ("bottleneck_down", "bottleneck_up")


def attach_bottleneck(modules: Mapping[str, nn.Module], width: int) -> None:
    """Put a bottleneck of `width` behind both halves of each layer."""
    for name, module in modules.items():
        if name.endswith(PLACES) and isinstance(module, Linear):
            module.bottleneck_down = nn.Linear(module.out_features, width)
            module.bottleneck_up = nn.Linear(width, module.out_features)
            for part in PARTS:
                module.sides |= {f"{part}.weight": (None, None), f"{part}.bias": (None,)}
            module.after = bottleneck


def bottleneck(linear: Linear, x: Tensor) -> Tensor:
    """Return x and what the bottleneck adds to it."""
    down, up = (getattr(linear, part) for part in PARTS)
    inner = F.gelu(F.linear(x, linear.held(down.weight), linear.held(down.bias)))
    return x + F.linear(inner, linear.held(up.weight), linear.held(up.bias))
