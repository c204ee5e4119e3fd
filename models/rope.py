"""Rotary position embedding, half-split form, with Llama-3 frequency scaling.

The table is computed from the config at each forward, in at least fp32: there is no buffer that a move to another
device, a cast or a meta-device build could leave stale. Pair i of a head is (x[i], x[i + head_dim/2]), as in Hugging
Face's Llama, so weights need no permutation.

Source: arXiv:2104.09864 eq. 34; the scaling is Meta's `apply_scaling` for Llama 3.1.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from configs.schema import ModelConfig, RopeScalingConfig


def inverse_frequencies(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Float[Tensor, " half"]:
    """Return theta^(-2i/head_dim) for each pair i of a head, scaled when the config says so."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=dtype, device=device) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponent)
    return frequencies if config.rope_scaling is None else _scaled(frequencies, config.rope_scaling)


def _scaled(frequencies: Float[Tensor, " half"], scaling: RopeScalingConfig) -> Float[Tensor, " half"]:
    """Stretch long wavelengths by `factor`, leave short ones, and blend linearly between the two bounds."""
    wavelength = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = ((scaling.original_max_seq_len / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def rope_table(
    config: ModelConfig, positions: Int[Tensor, "rows seq"], dtype: torch.dtype
) -> tuple[Float[Tensor, "rows seq half"], Float[Tensor, "rows seq half"]]:
    """Return cosine and sine of each position and pair, in at least fp32; `dtype` is that of the activations."""
    dtype = torch.promote_types(dtype, torch.float32)
    angles = positions.to(dtype)[..., None] * inverse_frequencies(config, dtype, positions.device)
    return angles.cos(), angles.sin()


def apply_rope(
    x: Float[Tensor, "batch heads seq head_dim"],
    cos: Float[Tensor, "rows seq half"],
    sin: Float[Tensor, "rows seq half"],
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Turn each pair of x by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
