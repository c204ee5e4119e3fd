"""float8 linear layers: the blocks' matrix products in 8 bits with dynamic scales, by torchao (arXiv:2209.05433).

Master weights, their names, the collectives and the head stay what they were: only the factors of a block's products
are cast, each time anew, scaled to their own largest value: of a tensor, or of each row. What is not float8 is computed
in bf16. Scales follow what a rank holds, so layouts agree within float8's own error and no closer.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from configs.errors import ConfigError, problem
from configs.schema import Config
from models.linear import Marks

_CAPABILITY = (8, 9)
_MULTIPLE = 16


def check_float8(config: Config, device: torch.device) -> None:
    """Refuse float8 where the device or a package lacks it, or sizes that its kernels don't take."""
    if config.precision.float8 == "none":
        return
    problems = list(_problems(config, config.precision.float8, device))
    if problems:
        raise ConfigError(problems)


def has_float8(device: torch.device) -> bool:
    """Tell whether a device multiplies float8 matrices."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _CAPABILITY


def use_float8(blocks: Sequence[nn.Module], kind: str, *, emulate: bool) -> None:
    """Swap the linear layers of the blocks, in place, on the meta device and before anything else is done to them.

    `emulate` rounds to float8 and multiplies in full precision, on any device; a run on one that has no float8 is
    refused (`check_float8`), so that only tests of the parts below it come here with it.
    """
    if kind == "none":
        return
    from torchao.float8 import (  # pyright: ignore[reportMissingImports] - optional
        Float8LinearConfig,
        convert_to_float8_training,
    )
    from torchao.float8.float8_linear import Float8Linear  # pyright: ignore[reportMissingImports]

    class Float8Projection(Float8Linear):
        """Called as the decoder's own projections are. Adapters under float8 are refused: nothing joins the product."""

        beside = after = replaced = quantized = None

        def forward(self, input: Tensor, marks: Marks | None = None) -> Tensor:
            return super().forward(input)

    options = replace(Float8LinearConfig.from_recipe_name(kind), emulate=emulate)
    for block in blocks:
        convert_to_float8_training(block, config=options)
        for module in block.modules():
            if type(module) is Float8Linear:
                module.__class__ = Float8Projection


def _problems(config: Config, kind: str, device: torch.device) -> Iterator[str]:
    if not has_float8(device):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        expected = f"needs a GPU of compute capability {_CAPABILITY[0]}.{_CAPABILITY[1]} or more, this is {name}"
        yield problem("precision.float8", kind, expected, do="Use 'none'.")
    if importlib.util.find_spec("torchao") is None:
        do = "Install it with pip install -e '.[float8]', or use 'none'."
        yield problem("precision.float8", kind, "the package torchao is not installed", do=do)
    if config.precision.compute != "bf16":
        do = "Use bf16, or precision.float8 = 'none'."
        yield problem("precision.compute", config.precision.compute, "must be bf16 under precision.float8", do=do)
    for name, size in _sizes(config):
        if size % _MULTIPLE:
            expected = f"must be a multiple of {_MULTIPLE} under precision.float8"
            yield problem(name, size, expected, "its kernels take no other sizes")


def _sizes(config: Config) -> Iterator[tuple[str, int]]:
    """Give the widths and the tokens of the products that a rank computes; the config is resolved and has no tp."""
    model, data, cp = config.model, config.data, config.parallel.cp
    yield "model.dim", model.dim
    yield "model.ffn_dim", model.ffn_dim
    yield "model.num_heads * head_dim", model.num_heads * model.head_dim
    yield "model.num_kv_heads * head_dim", model.num_kv_heads * model.head_dim
    tokens = data.micro_batch_size * data.seq_len // cp
    yield "data.micro_batch_size * seq_len" + (" / parallel.cp" if cp > 1 else ""), tokens
