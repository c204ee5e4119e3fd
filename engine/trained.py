"""What a run trains and what it leaves frozen, as a person reads it at the start: counts, bytes, modules."""

from collections.abc import Iterator
from math import prod

from configs.layout import NF4_BLOCK
from configs.schema import Config
from configs.targets import projections
from engine.memory import GIB, frozen_bytes
from models.adapters import trained_shapes
from models.flops import num_params
from models.hf_weights import parameter_shapes
from models.quantized_formats import can_quantize
from parallel.fsdp import DTYPES

ADDED = ("lora_", "bottleneck_", "prefix_", "prompt_")
"""What the names of an adapter's own parts begin with."""


def trained_table(config: Config) -> Iterator[str]:
    """Yield the lines; the layers' numbers are left out of the modules' names. `config` is resolved."""
    model, adapter = config.model, config.adapter
    shapes, base = trained_shapes(model, adapter), parameter_shapes(model)
    trained = sum(prod(shape) for shape in shapes.values())
    total = num_params(model) + sum(prod(shape) for name, shape in shapes.items() if name not in base)
    yield f"training {trained:,} of {total:,} parameters ({100 * trained / total:.3g}%) by {adapter.kind}"
    of_module: dict[str, list[int]] = {}
    for name, shape in shapes.items():
        of_module.setdefault(_module(name), []).append(prod(shape))
    for module, sizes in of_module.items():
        yield f"  {module}: {sum(sizes):,} in {len(sizes)} tensors"
    if adapter.quantization != "none":
        yield from _left_in_16_bits(config)
    frozen = total - trained
    held = frozen_bytes(config)
    kind = config.precision.compute if adapter.quantization == "none" else adapter.quantization
    yield (
        f"frozen: {frozen:,} parameters, {held / GIB:.3g} GiB in all ({held / max(frozen, 1):.3g} bytes each, {kind}), "
        f"{adapter.base}; trained: {DTYPES[config.precision.master].itemsize} bytes each and the optimizer's state"
    )


def _left_in_16_bits(config: Config) -> Iterator[str]:
    """Name the projections whose shapes the format doesn't take."""
    shapes, kind = parameter_shapes(config.model), config.adapter.quantization
    names = [name for name in projections(config.model) if not can_quantize(kind, *shapes[f"{name}.weight"])]
    if names:
        kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
        yield f"in 16 bits, since their inputs are no multiple of {NF4_BLOCK}: {kinds}, {len(names)} projections in all"


def _module(name: str) -> str:
    """Name the module that a parameter belongs to, the same for all layers."""
    parts = [part for part in name.split(".") if not part.isdecimal() and part != "layers"]
    added = [at for at, part in enumerate(parts) if part.startswith(ADDED)]
    return ".".join(parts[: added[0] if added else -1])
