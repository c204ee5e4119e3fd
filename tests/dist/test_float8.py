"""float8 linear layers, emulated on the CPU: names stay, results are near, and what a machine lacks is named."""

import logging
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from configs.check import resolve
from configs.errors import ConfigError
from models.llama import Llama
from parallel.float8 import check_float8, use_float8
from parallel.fsdp import shard
from parallel.materialise import materialise
from parallel.mesh import build_layout
from tests.ranks import run_ranks
from tests.training import layout_config

CPU = torch.device("cpu")
SHAPE = {"dim": 32, "ffn_dim": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}


def filled(local: torch.Tensor, name: str, shape: tuple[int, ...], offset: tuple[int, ...]) -> None:
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(sum(name.encode()))) / shape[-1] ** 0.5
    if len(shape) == 1:
        whole = torch.ones(shape)
    local.copy_(whole[tuple(slice(at, at + size) for at, size in zip(offset, local.shape, strict=True))])


def forward_and_names(kind: str) -> tuple[torch.Tensor, list[str], list[float]]:
    logging.disable(logging.WARNING)  # torchao speaks of kernels for GPUs
    warnings.simplefilter("ignore")
    config = resolve(layout_config(3, model=SHAPE, precision={"compute": "bf16", "master": "fp32"}), 1)
    layout = build_layout(config.parallel, CPU)
    with torch.device("meta"):
        model = Llama(config.model)
    blocks: list[nn.Module] = list(model.layers.values())
    use_float8(blocks, kind, emulate=True)
    shard(model, blocks, layout.shards, config.parallel, config.precision)
    materialise(model, CPU, filled)
    tokens = torch.arange(24)[None] % config.model.vocab_size
    hidden = model(tokens)
    hidden.float().square().mean().backward()
    norms = [p.grad.to_local().norm().item() for p in model.parameters() if p.grad is not None]  # pyright: ignore
    return hidden.detach().float(), [name for name, _ in model.named_parameters()], norms


@pytest.mark.parametrize("kind", ["tensorwise", "rowwise"])
def test_float8_rounds_and_renames_nothing(kind: str) -> None:
    (low, names, norms), (high, same_names, _) = (run_ranks(1, forward_and_names, one)[0] for one in (kind, "none"))
    assert names == same_names
    error = ((low - high).norm() / high.norm()).item()
    # Three bits of mantissa round by up to 1/16; two blocks of seven products add up to more.
    assert 0.01 < error < 0.3
    assert len(norms) == len(names) - 1  # the head was not used
    assert all(0 < norm < 1e3 for norm in norms)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (
            {"precision": {"compute": "bf16", "float8": "rowwise", "master": "fp32"}},
            ["precision.float8 = 'rowwise': needs a GPU of compute capability 8.9 or more, this is a CPU. Use 'none'."],
        ),
        (
            {"model": SHAPE | {"ffn_dim": 72}, "precision": {"compute": "fp32", "float8": "rowwise", "master": "fp32"}},
            [
                "precision.float8 = 'rowwise': needs a GPU of compute capability 8.9 or more, this is a CPU. Use "
                "'none'.",
                "precision.compute = 'fp32': must be bf16 under precision.float8. Use bf16, or precision.float8 = "
                "'none'.",
                "model.ffn_dim = 72: must be a multiple of 16 under precision.float8 (its kernels take no other "
                "sizes).",
            ],
        ),
    ],
)
def test_what_float8_lacks_is_named(sections: dict[str, Any], expected: list[str]) -> None:
    config = resolve(layout_config(3, **({"model": SHAPE} | sections)), 1)
    with pytest.raises(ConfigError) as caught:
        check_float8(config, CPU)
    assert caught.value.problems == expected


def test_without_float8_nothing_is_asked() -> None:
    check_float8(resolve(layout_config(3), 1), CPU)
