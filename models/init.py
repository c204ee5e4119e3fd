"""Initial weights as a function of (seed, parameter name, global element index).

A counter-based generator (Philox, doi:10.1145/2063384.2063405) is keyed by the seed and the name and indexed by the
element's place in the whole parameter, so a rank draws only its shard and every layout starts from the same bits.
Uniforms are float64 and kept off 0 and 1 (float32 ones hit 0: an infinite weight). The inverse normal is built from
operations that IEEE 754 rounds one way only, so the bits depend neither on slice borders, vector width or thread count
nor on the make of the processor, as those of a library's erfinv or log may. The cast to the master format comes last.
No torch.distributed here: the caller says where its shard lies.
"""

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from configs.schema import ModelConfig

DRAWN_AT_ONCE = 1 << 15  # elements; the arrays of one round stay in the processor's cache
FILLED_AT_ONCE = 1 << 22  # elements of whole rows that fill_local holds at once (32 MiB)
WORDS_PER_COUNT = 4  # 64-bit words that one count of Philox yields

_ADAPTERS = {
    "lora_A.": ("uniform", None),
    "lora_B.": ("constant", 0.0),
    "lora_embedding_A": ("constant", 0.0),
    "lora_embedding_B": ("normal", 1.0),
    "bottleneck_down.weight": ("normal", 0.01),
    "bottleneck_up.weight": ("constant", 0.0),
}
"""Distributions of adapters' parameters by a part of their names; no size means 1 / sqrt(inputs)."""

RESIDUAL_PROJECTIONS = ("o_proj.weight", "down_proj.weight")

# Algorithm AS 241, PPND16 (Wichura 1988, doi:10.2307/2347330): three rational approximations, numerator over
# denominator, lowest power first; relative error below 1e-15.
_CENTRE = (
    (3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
     4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3),
    (1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
     2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3),
)  # fmt: skip
_TAIL = (
    (1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0,
     1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4),
    (1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
     1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9),
)  # fmt: skip
_FAR_TAIL = (
    (6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0, 2.96560571828504891230e-1,
     2.65321895265761230930e-2, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7),
    (1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2,
     7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15),
)  # fmt: skip
_LOG_SERIES = tuple(2.0 / (2 * k + 1) for k in range(11))


def initial_std(config: ModelConfig, name: str) -> float:
    """Give the standard deviation of a matrix: smaller for the projections back into the residual stream.

    Source: GPT-2 (Radford et al. 2019, section 2.3): 1 / sqrt(number of residual additions), here 2 * num_layers.
    """
    if name.endswith(RESIDUAL_PROJECTIONS):
        return config.init_std / math.sqrt(2 * config.num_layers)
    return config.init_std


def distribution(config: ModelConfig, name: str, shape: Sequence[int]) -> tuple[str, float]:
    """Give what a parameter is drawn from: (constant, value), (normal, standard deviation) or (uniform, bound).

    One factor of each of an adapter's products is zero, so that it starts as the base's own function; LoRA's A starts
    as torch's linear layers do, like PEFT's.
    """
    for part, (kind, size) in _ADAPTERS.items():
        if f".{part}" in name:
            return kind, 1 / math.sqrt(shape[-1]) if size is None else size
    if name.endswith("norm.weight"):
        return "constant", 1.0
    return ("constant", 0.0) if name.endswith(".bias") else ("normal", initial_std(config, name))


def initial_rows(
    config: ModelConfig, seed: int, name: str, shape: Sequence[int], start: int, stop: int, dtype: torch.dtype
) -> torch.Tensor:
    """Draw rows start..stop (of dim 0) of the parameter `name`, whose whole shape is `shape`, from its distribution."""
    assert 0 <= start <= stop <= shape[0], f"rows {start}..{stop} of {name}, which has {shape[0]}"
    rows = (stop - start, *shape[1:])
    kind, size = distribution(config, name, shape)
    if kind == "constant":
        return torch.full(rows, size, dtype=dtype)
    row_numel = math.prod(shape[1:])
    words = _normals if kind == "normal" else _uniforms
    values = words(seed, name, start * row_numel, stop * row_numel)
    values *= size
    return torch.from_numpy(values).to(dtype).view(rows)


def fill_local(
    local: torch.Tensor,
    config: ModelConfig,
    seed: int,
    name: str,
    global_shape: Sequence[int],
    global_offset: Sequence[int],
) -> None:
    """Write into `local` the rectangle of the parameter that begins at `global_offset`, in chunks of bounded memory.

    Any dim may be sharded; `local` may be empty and may lie on any device.
    """
    assert len(global_shape) == len(global_offset) == local.dim(), f"{name}: shape, offset and shard differ in dims"
    if local.numel() == 0:
        return
    columns = tuple(slice(o, o + n) for o, n in zip(global_offset[1:], local.shape[1:], strict=True))
    rows_at_once = max(1, FILLED_AT_ONCE // math.prod(global_shape[1:]))
    with torch.no_grad():
        for first in range(0, local.shape[0], rows_at_once):
            last = min(first + rows_at_once, local.shape[0])
            start, stop = global_offset[0] + first, global_offset[0] + last
            rows = initial_rows(config, seed, name, global_shape, start, stop, local.dtype)
            local[first:last].copy_(rows[(slice(None), *columns)])


def _normals(seed: int, name: str, start: int, stop: int) -> np.ndarray:
    """Elements start..stop of the parameter's endless row of standard normals, in float64."""
    return _drawn(seed, name, start, stop, lambda words: _inverse_normal(_open_uniform(words)))


def _uniforms(seed: int, name: str, start: int, stop: int) -> np.ndarray:
    """Elements start..stop of the parameter's endless row of uniforms in (-1, 1), in float64."""
    return _drawn(seed, name, start, stop, lambda words: 2 * _open_uniform(words) - 1)


def _drawn(seed: int, name: str, start: int, stop: int, values: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    key = np.frombuffer(hashlib.sha256(f"{seed}\n{name}".encode()).digest()[:16], dtype="<u8")
    generator = np.random.Philox(key=key, counter=start // WORDS_PER_COUNT)
    generator.random_raw(start % WORDS_PER_COUNT)
    out = np.empty(stop - start)
    for first in range(0, len(out), DRAWN_AT_ONCE):
        part = out[first : first + DRAWN_AT_ONCE]
        part[:] = values(generator.random_raw(len(part)))
    return out


def _open_uniform(words: np.ndarray) -> np.ndarray:
    """Map words to (0, 1): 52 bits and a half are exact in float64, so nothing is rounded to 0 or 1."""
    return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def _inverse_normal(p: np.ndarray) -> np.ndarray:
    q = p - 0.5
    z = q * _ratio(_CENTRE, 0.180625 - q * q)
    outer = np.flatnonzero(np.abs(q) > 0.425)
    tail = np.minimum(p[outer], 1.0 - p[outer])
    r = np.sqrt(-_log(tail))
    z[outer] = np.copysign(np.where(r <= 5.0, _ratio(_TAIL, r - 1.6), _ratio(_FAR_TAIL, r - 5.0)), q[outer])
    return z


def _log(x: np.ndarray) -> np.ndarray:
    """log(m * 2^e) = e log(2) + 2 atanh(s), s = (m - 1) / (m + 1), with m within sqrt(2) of 1."""
    m, e = np.frexp(x)
    low = m < math.sqrt(0.5)
    m = np.where(low, 2.0 * m, m)
    s = (m - 1.0) / (m + 1.0)
    return (e - low) * math.log(2.0) + s * _polynomial(_LOG_SERIES, s * s)


def _ratio(coefficients: tuple[Sequence[float], Sequence[float]], x: np.ndarray) -> np.ndarray:
    return _polynomial(coefficients[0], x) / _polynomial(coefficients[1], x)


def _polynomial(coefficients: Sequence[float], x: np.ndarray) -> np.ndarray:
    """Horner's scheme, one rounded operation at a time."""
    y = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        y *= x
        y += coefficient
    return y
