"""LoRA and QLoRA train the same run on every layout: losses, gradients of the adapter, and its weights after 3 steps.

The cases of one number of ranks are trained by the same processes, one after the other. What an adapter starts as zeros
is drawn here (`lively`), so that no gradient is zero. Every case accumulates; those of four ranks have no documents.
"""

import functools
from collections.abc import Set
from dataclasses import replace
from typing import Any

import pytest
import torch

from configs.check import resolve
from configs.schema import Config
from engine.weights import starting_weights
from models.hf_weights import parameter_shapes
from models.init import fill_local
from models.linear import Linear
from models.quantized import dequantize, quantize
from parallel.apply import build_model
from parallel.fsdp import fsdp_roots
from parallel.mesh import build_layout
from tests.ranks import run_ranks
from tests.training import Trained, assert_same, layout_config, train_each, whole

MODELS: dict[str, dict[str, Any]] = {
    "LoRA": {"num_layers": 2, "attention_bias": True, "mlp_bias": True},
    # 64 inputs share a scale, on each of 4 ranks of tp.
    "QLoRA": {"num_layers": 2, "dim": 64, "num_heads": 8, "head_dim": 32, "ffn_dim": 256},
}
QUANTIZATION = {"LoRA": "none", "QLoRA": "nf4"}

Layout = tuple[dict[str, Any], str, str]
"""(degrees, adapter.base, recompute.mode)."""

LAYOUTS: dict[str, dict[int, list[Layout]]] = {
    "LoRA": {
        2: [
            ({axis: 2}, base, "none")
            for axis in ("dp_replicate", "dp_shard", "cp", "tp", "pp")
            for base in ("sharded", "replicated")
        ],
        4: [
            ({"tp": 4}, "sharded", "none"),
            ({"tp": 4}, "replicated", "selective"),
            ({"dp_replicate": 2, "dp_shard": 2}, "sharded", "none"),
            ({"dp_replicate": 2, "cp": 2}, "replicated", "none"),
            ({"dp_replicate": 2, "tp": 2}, "sharded", "full"),
            ({"dp_replicate": 2, "pp": 2}, "replicated", "full"),
            ({"dp_shard": 2, "cp": 2}, "sharded", "selective"),
            ({"dp_shard": 2, "tp": 2}, "replicated", "full"),
            ({"dp_shard": 2, "pp": 2}, "sharded", "selective"),
            ({"cp": 2, "tp": 2}, "sharded", "full"),
            ({"cp": 2, "pp": 2}, "replicated", "selective"),
            ({"tp": 2, "pp": 2}, "sharded", "none"),
        ],
        8: [
            ({"dp_shard": 2, "tp": 2, "pp": 2}, "sharded", "full"),
            ({"dp_shard": 2, "cp": 2, "tp": 2}, "replicated", "selective"),
        ],
    },
    "QLoRA": {
        2: [
            ({"dp_replicate": 2}, "replicated", "none"),
            ({"dp_shard": 2}, "sharded", "full"),
            ({"cp": 2}, "sharded", "none"),
            ({"tp": 2}, "replicated", "selective"),
            ({"tp": 2}, "sharded", "none"),
            ({"pp": 2}, "sharded", "none"),
        ],
        4: [
            ({"tp": 4}, "sharded", "full"),
            ({"dp_replicate": 2, "dp_shard": 2}, "sharded", "none"),
            ({"dp_shard": 2, "tp": 2}, "sharded", "none"),
            ({"dp_shard": 2, "pp": 2}, "replicated", "none"),
            ({"tp": 2, "pp": 2}, "sharded", "selective"),
        ],
        8: [({"dp_shard": 2, "tp": 2, "pp": 2}, "sharded", "none")],
    },
}


def name_of(layout: Layout) -> str:
    degrees, base, mode = layout
    return " ".join([*(f"{axis}{degree}" for axis, degree in degrees.items()), base, mode])


def config_for(method: str, layout: Layout) -> Config:
    parallel, base, mode = layout
    adapter = {"kind": "lora", "rank": 4, "alpha": 6.0, "targets": ["all-linear", "embed_tokens", "lm_head"],
               "quantization": QUANTIZATION[method], "base": base}  # fmt: skip
    sections = {"model": MODELS[method], "data": {"micro_batch_size": 3}, "recompute": {"mode": mode}}
    return layout_config(3, adapter=adapter, parallel=parallel, **sections)


ONCE = {
    "LoRA": (
        *(f"{axis}2 sharded none" for axis in ("dp_replicate", "dp_shard", "cp", "tp", "pp")),
        *("dp_shard2 replicated none", "pp2 replicated none"),
        *("dp_shard2 tp2 replicated full", "dp_shard2 pp2 sharded selective"),
    ),
    "QLoRA": ("dp_shard2 sharded full", "tp2 sharded none", "pp2 sharded none", "dp_shard2 pp2 replicated none"),
}
"""What no other shows."""


def is_long(method: str, n: int, layout: Layout) -> bool:
    return n > 1 and name_of(layout) not in ONCE[method]


@functools.cache
def trained(method: str, n: int, documents: bool, long: bool = False) -> dict[str, Trained]:
    layouts = LAYOUTS[method][n] if n > 1 else [({}, "sharded", "none")]
    configs = {name_of(layout): config_for(method, layout) for layout in layouts if is_long(method, n, layout) == long}
    return train_each(n, configs, documents)


CASES = [
    pytest.param(
        *(method, n, name_of(layout), is_long(method, n, layout)),
        id=f"{method} {name_of(layout)}",
        marks=[pytest.mark.long] if is_long(method, n, layout) else [],
    )
    for method, of_ranks in LAYOUTS.items()
    for n, layouts in of_ranks.items()
    for layout in layouts
]


@pytest.mark.parametrize(("method", "n", "layout", "long"), CASES)
def test_an_adapter_trains_the_same_run_on_any_layout(method: str, n: int, layout: str, long: bool) -> None:
    documents = n != 4
    found, (truth,) = trained(method, n, documents, long)[layout], trained(method, 1, documents).values()
    assert_same_adapter(found, truth)
    factors = [name for name, grad in truth.grads.items() if grad.norm() > 1e-6]
    assert len(factors) == len(truth.grads) == 2 * (2 * 7 + 2), "two factors beside each projection and both ends"


def assert_same_adapter(found: Trained, truth: Trained) -> None:
    """The base bit by bit, and then the rest to 1e-10; what is frozen has no gradient."""
    frozen = truth.weights.keys() - truth.grads.keys()
    for name in frozen:
        assert torch.equal(found.weights[name], truth.weights[name]), name
    assert_same(without(found, frozen), without(truth, frozen), 1e-10)


def without(found: Trained, names: Set[str]) -> Trained:
    return replace(found, weights={name: weight for name, weight in found.weights.items() if name not in names})


def dense_parts(config: Config) -> dict[str, tuple[torch.Tensor, int, int, dict[str, torch.Tensor]]]:
    """What this rank multiplies with, where it begins in the whole, and the whole's codes, by projection."""
    layout = build_layout(config.parallel, torch.device("cpu"))
    model = build_model(config, layout, starting_weights(config))
    quantized = [(name, m) for name, m in model.named_modules() if isinstance(m, Linear) and m.quantized is not None]
    codes = {
        name: {key: whole(p) for key, p in m.get_submodule("quantized").named_parameters()} for name, m in quantized
    }
    for root in fsdp_roots(model):
        for module in root.modules():  # pyright: ignore[reportAttributeAccessIssue]
            if hasattr(module, "unshard"):
                module.unshard()
    parts = {name: (linear, linear.dense(torch.float64)) for name, linear in quantized}
    return {
        name: (part, linear.first_output(part.shape[0]), linear.first_input(part.shape[1]), codes[name])
        for name, (linear, part) in parts.items()
    }


@pytest.mark.parametrize(
    "parallel",
    [{"tp": 4}, {"dp_shard": 2, "tp": 2}, {"dp_shard": 4}, {"dp_shard": 2, "pp": 2}],
    ids=lambda parallel: " ".join(f"{axis}{degree}" for axis, degree in parallel.items()),
)
def test_the_dequantised_base_is_the_same_bits_on_any_layout(parallel: dict[str, Any]) -> None:
    """Against the matrix quantised whole, here: a rank's slice of it is what the rank multiplies with."""
    seen: set[str] = set()
    for of_rank in run_ranks(4, dense_parts, resolved(parallel)):
        for name, (part, row, column, codes) in of_rank.items():
            expected = quantized_base()[name]
            assert codes.keys() == expected.keys()
            assert all(torch.equal(codes[key], expected[key]) for key in expected), name
            dense = dequantize("nf4", expected, torch.float64)
            assert torch.equal(part, dense[row : row + part.shape[0], column : column + part.shape[1]]), name
            seen.add(name)
    assert seen == quantized_base().keys() and len(seen) == 2 * 7


def resolved(parallel: dict[str, Any]) -> Config:
    return resolve(config_for("QLoRA", (parallel, "sharded", "none")), 4)


@functools.cache
def quantized_base() -> dict[str, dict[str, torch.Tensor]]:
    """Each projection of the same base, drawn whole and quantised."""
    config, found = resolved({"dp_shard": 4}), {}
    for name, shape in parameter_shapes(config.model).items():
        if name.startswith("layers.") and name.endswith("proj.weight"):
            matrix = torch.empty(shape, dtype=torch.float64)
            fill_local(matrix, config.model, config.run.seed, name, shape, (0, 0))
            found[name.removesuffix(".weight")] = quantize("nf4", matrix)
    return found
