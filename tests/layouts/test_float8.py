"""float8 linear layers, emulated on the CPU: the run is near that of bf16, and what a machine lacks is named."""

import logging
import warnings
from typing import Any

import pytest
import torch

from configs.check import resolve
from configs.errors import ConfigError
from configs.schema import Config
from parallel.float8 import check_float8
from tests.ranks import run_ranks
from tests.training import GRAPHS, KERNELS, Trained, compile_to, layout_config, put_together, train_here

CPU = torch.device("cpu")
SHAPE = {"dim": 32, "ffn_dim": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}


def a_config(kind: str, mode: str = "none", compiled: bool = False) -> Config:
    return layout_config(
        3,
        model=SHAPE | {"attention": "sdpa"},
        precision={"compute": "bf16", "float8": kind, "master": "fp32"},
        recompute={"mode": mode},
        compile={"blocks": compiled},
        parallel={"dp_shard": 2},
    )


def train_all(configs: dict[str, Config], backend: str) -> dict[str, Trained | None]:
    logging.disable(logging.WARNING)  # torchao speaks of kernels for GPUs
    warnings.simplefilter("ignore")
    compile_to(backend)
    return {name: train_here(config, False) for name, config in configs.items()}


def trained(configs: dict[str, Config], backend: str) -> dict[str, Trained]:
    ranks = run_ranks(2, train_all, configs, backend, timeout_s=400)
    return {name: put_together([rank[name] for rank in ranks if rank[name]]) for name in configs}


@pytest.mark.parametrize(
    ("kind", "backend"),
    [("tensorwise", GRAPHS), ("rowwise", GRAPHS), pytest.param("rowwise", KERNELS, marks=pytest.mark.long)],
)
def test_float8_trains_near_bf16_under_the_same_names(kind: str, backend: str) -> None:
    configs = {
        "bf16": a_config("none"),
        "eager": a_config(kind),
        "full": a_config(kind, "full"),
        "compiled selective": a_config(kind, "selective", compiled=True),
    }
    if kind == "rowwise":
        configs |= {"selective": a_config(kind, "selective"), "compiled": a_config(kind, compiled=True)}
    found = trained(configs, backend)
    low, high = found["eager"], found["bf16"]
    assert low.grads.keys() == high.grads.keys() and low.weights.keys() == high.weights.keys()
    assert low.losses != high.losses, "nothing was rounded"
    assert low.losses == pytest.approx(high.losses, rel=1e-3)
    for name, grad in low.grads.items():
        # Three bits of mantissa round by up to 1/16; two blocks of seven products add up to more.
        assert (grad - high.grads[name]).norm() < 0.3 * high.grads[name].norm(), name
    for mode in {"selective", "full"} & found.keys():
        assert (found[mode].losses, found[mode].norms) == (low.losses, low.norms), "what is computed twice is the same"
    for name in {"compiled", "compiled selective"} & found.keys():
        assert found[name].losses == pytest.approx(low.losses, rel=3e-4)
        assert found[name].norms == pytest.approx(low.norms, rel=1e-2)


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
    assert problems_of(**sections) == expected
    sections["precision"]["float8"] = "none"
    assert problems_of(**sections) == []


def problems_of(**sections: Any) -> list[str]:
    try:
        check_float8(resolve(layout_config(3, **({"model": SHAPE} | sections)), 1), CPU)
    except ConfigError as error:
        return error.problems
    return []
