"""The weights that a run starts from, each rank its own part: drawn from the seed, or read from files.

A base comes from a Hugging Face folder or the seed, an adapter from a PEFT folder or the seed; a quantised projection
is read whole, quantised, and cut after that, one at a time, so that its codes are the same on every layout.
"""

from pathlib import Path

import torch
from torch import Tensor

from configs.errors import CheckpointError, problem
from configs.schema import Config
from models.hf_weights import HfWeights, parameter_shapes
from models.init import fill_local
from models.peft_format import AdapterWeights, split_member
from models.quantized import dequantize, quantize
from models.quantized_formats import can_quantize
from parallel.fsdp import DTYPES
from parallel.materialise import Fill

QUANTIZED = ".quantized."
MAGNITUDE = ".lora_magnitude_vector"


def starting_weights(config: Config) -> Fill:
    """Return what fills the parameters of a resolved config at step 0; refuses a folder that doesn't fit at once."""
    base = _Base(config)
    adapter = _Adapter(config, base)

    def fill(local: Tensor, name: str, shape: tuple[int, ...], offset: tuple[int, ...]) -> None:
        if not local.numel():
            return
        source = adapter if adapter.has(name) else base
        source.fill(local, name, shape, offset)

    return fill


class _Base:
    """The model itself."""

    def __init__(self, config: Config) -> None:
        self.shapes = parameter_shapes(config.model)
        self.weights = _folder(config) if config.model.init_from else None
        self._config, self._kind = config, config.adapter.quantization
        # The projection whose codes were last asked for: its parts follow each other.
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def fill(self, local: Tensor, name: str, shape: tuple[int, ...], offset: tuple[int, ...]) -> None:
        part = _rectangle(local, offset)
        if QUANTIZED in name:
            module, _, key = name.partition(QUANTIZED)
            local.copy_(self._codes(module)[key][part])
        elif self.weights is None:
            fill_local(local, self._config.model, self._config.run.seed, name, shape, offset)
        else:
            local.copy_(self.weights.read(name, part))

    def row_norms(self, module: str) -> Tensor:
        """Return the length of each row of a projection's weight, as it is multiplied with."""
        precise = torch.promote_types(DTYPES[self._config.precision.compute], torch.float32)
        out, width = self.shapes[f"{module}.weight"]
        if can_quantize(self._kind, out, width):
            weight = dequantize(self._kind, self._codes(module), precise)
        else:
            weight = self._whole(module)
        return weight.to(precise).square().sum(dim=1).sqrt()

    def _codes(self, module: str) -> dict[str, Tensor]:
        if self._last[0] != module:
            self._last = ("", {})  # before the next one takes memory
            self._last = (module, quantize(self._kind, self._whole(module), f"{module}.weight"))
        return self._last[1]

    def _whole(self, module: str) -> Tensor:
        """Return a weight in the format that frozen weights are held in."""
        name = f"{module}.weight"
        whole = torch.empty(self.shapes[name], dtype=DTYPES[self._config.precision.compute])
        self.fill(whole, name, self.shapes[name], (0, 0))
        return whole


class _Adapter:
    """What is trained beside the model."""

    def __init__(self, config: Config, base: _Base) -> None:
        self._base, self._config = base, config
        self._seeds = {
            member.name: config.run.seed if member.seed < 0 else member.seed for member in config.adapter.members
        }
        self._weights: AdapterWeights | None = None
        self._read: set[str] = set()
        if config.adapter.init_from:
            self._weights = AdapterWeights(Path(config.adapter.init_from), config.model)
            self._weights.check(config.adapter, base=base.weights)
            self._read = set(self._weights.names())

    def has(self, name: str) -> bool:
        """Say whether a parameter comes from here; biases may."""
        return name in self._read or (name not in self._base.shapes and QUANTIZED not in name)

    def fill(self, local: Tensor, name: str, shape: tuple[int, ...], offset: tuple[int, ...]) -> None:
        part = _rectangle(local, offset)
        if self._weights is not None:
            local.copy_(self._weights.read(name, part))
        elif name.endswith(MAGNITUDE):
            local.copy_(self._base.row_norms(name.removesuffix(MAGNITUDE))[part])
        else:
            # A member starts as it would alone.
            name, member = split_member(name, list(self._seeds))
            seed = self._seeds.get(member, self._config.run.seed)
            fill_local(local, self._config.model, seed, name, shape, offset)


def _rectangle(local: Tensor, offset: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(begin, begin + size) for begin, size in zip(offset, local.shape, strict=True))


def _folder(config: Config) -> HfWeights:
    weights = HfWeights(Path(config.model.init_from))
    for field in ("rope_theta", "rope_scaling", "norm_eps"):
        ours, theirs = getattr(config.model, field), getattr(weights.config, field)
        if ours != theirs:
            # Shapes would fit, and every number would be a little wrong.
            why = f"{config.model.init_from} was trained with {theirs!r}"
            raise CheckpointError(problem(f"model.{field}", ours, "differs from the model it starts from", why))
    weights.check(parameter_shapes(config.model))
    return weights
