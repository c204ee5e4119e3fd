"""Compiled blocks with adapters train the eager run, by one graph for all blocks."""

from typing import Any

import pytest
import torch

from configs.check import resolve
from configs.schema import Config
from models.adapters import attach
from models.adapters.lora import SITE, kept, site_numbers
from models.linear import Linear, Marks
from models.llama import Llama
from models.quantized import quantize_frozen
from models.rope import rope_table
from parallel.recompute import recompute
from tests.ranks import run_ranks
from tests.training import GRAPHS, KERNELS, assert_same, layout_config, put_together, train_and_count, train_on

WIDE = {"num_layers": 3, "dim": 64, "num_heads": 4, "head_dim": 32, "ffn_dim": 128}
LORA = {"kind": "lora", "rank": 4}


pytestmark = pytest.mark.usefixtures("compiler")


def a_config(adapter: dict[str, Any], mode: str, compiled: bool, **parallel: Any) -> Config:
    return layout_config(
        2,
        model=WIDE | {"attention": "sdpa"},
        adapter=LORA | adapter,
        precision={"compute": "fp32", "master": "fp32"},
        data={"micro_batch_size": 3},
        recompute={"mode": mode},
        compile={"blocks": compiled},
        parallel=parallel,
    )


@pytest.mark.long
@pytest.mark.parametrize("backend", [GRAPHS, KERNELS])
def test_compiled_blocks_train_the_eager_run_by_one_graph(backend: str) -> None:
    adapter = {"dropout": 0.2, "quantization": "nf4"}
    eager = train_on(2, a_config(adapter, "none", False, tp=2))
    found = run_ranks(2, train_and_count, a_config(adapter, "selective", True, tp=2), backend, timeout_s=400)
    # The block without gradients, and with them; and the first one, whose input nobody asks a gradient of.
    assert [graphs for _, graphs in found] == [3] * 2
    assert_same(put_together([of_rank for of_rank, _ in found if of_rank]), eager, 1e-4)


FORMS: dict[str, dict[str, Any]] = {
    "dora nf4": {"dora": True, "quantization": "nf4"},
    "bottleneck": {"kind": "bottleneck"},
    "prefix": {"kind": "prefix", "num_virtual_tokens": 3},
}


def blocks_twice(form: str, mode: str) -> tuple[int, list[tuple[torch.Tensor, ...]]]:
    """The number of graphs of two blocks, and their output and gradients, eager and compiled."""
    import torch._dynamo.utils as dynamo

    torch.compiler.reset()
    dynamo.counters.clear()
    adapter = (LORA if "kind" not in FORMS[form] else {}) | FORMS[form]
    data = {"packing": "best_fit"}
    precision = {"compute": "fp32", "master": "fp32"}
    config = resolve(layout_config(1, model=WIDE, adapter=adapter, data=data, precision=precision), 1)
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Llama(config.model)
        attach(model, config.adapter)
        quantize_frozen(model, config.adapter.quantization)
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                torch.nn.init.normal_(parameter, 0.5 if "constants" in name else 0.0, 0.1)
            else:
                parameter.data.fill_(77)
        for module in model.modules():
            if isinstance(module, Linear) and hasattr(module, SITE):
                getattr(module, SITE).fill_(99)
        blocks = list(model.layers.values())[:2]
        recompute(blocks, config.recompute.__class__(mode=mode))  # pyright: ignore[reportArgumentType]
        results.append(_pass(model, blocks, compiled))
    return dynamo.counters["stats"]["unique_graphs"], results


def _pass(model: Llama, blocks: list[torch.nn.Module], compiled: bool) -> tuple[torch.Tensor, ...]:
    x = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    cos, sin = rope_table(model.config, torch.arange(24)[None], torch.float32)
    places = torch.arange(48).view(2, 24)
    virtual = torch.where(torch.arange(24) < 3, torch.arange(24), -1).expand(2, 24)
    y = x
    for block in blocks:
        if compiled:
            # Whether it is one graph is dynamo's part; kernels take a minute to build.
            block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
        y = block(y, cos, sin, None, None, Marks(places, virtual))
    y.square().sum().backward()
    trained = [p.grad for block in blocks for p in block.parameters() if p.requires_grad]
    assert x.grad is not None and all(grad is not None for grad in trained)
    return (y.detach(), x.grad, *(grad for grad in trained if grad is not None))


def test_every_form_is_one_graph_without_a_break() -> None:
    modes = dict(zip(FORMS, ["selective", "full", "none"], strict=True))
    for form, (graphs, (eager, compiled)) in run_ranks(1, _all_forms, modes, timeout_s=200)[0].items():
        assert graphs == 1, form
        for mine, theirs in zip(compiled, eager, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def _all_forms(modes: dict[str, str]) -> dict[str, Any]:
    return {form: blocks_twice(form, mode) for form, mode in modes.items()}


def masks_of(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    places, site = torch.arange(32).view(2, 16) + 7, site_numbers([0], "layers.0.mlp.up_proj")
    x = torch.ones(2, 16, width)

    def dropped(x: torch.Tensor) -> torch.Tensor:
        return torch.where(kept(places, site, 0, width, 0.3), x / 0.7, 0)

    return dropped(x), torch.compile(dropped, fullgraph=True, dynamic=False)(x)


def compiled_masks() -> bool:
    return all(torch.equal(*masks_of(width)) for width in (24, 64))


def test_compiled_masks_are_the_eager_ones_whatever_the_width() -> None:
    """The compiler's own code for the hash is wrong where a row doesn't fill its vectors."""
    assert run_ranks(1, compiled_masks) == [True]
