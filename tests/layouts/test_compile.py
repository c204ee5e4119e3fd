"""Compiled blocks and a compiled loss train the same run as eager ones, by one graph for all blocks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.check import resolve
from configs.errors import ConfigError
from configs.schema import CompileConfig, Config, RecomputeConfig
from engine.compiler import check_compiled_context
from engine.pipelined import check_schedule
from models.llama import Llama
from parallel.recompute import recompute
from tests.ranks import run_ranks
from tests.training import (
    GRAPHS,
    KERNELS,
    Trained,
    assert_same,
    layout_config,
    put_together,
    train_and_count,
    train_here,
    train_on,
)

pytestmark = pytest.mark.usefixtures("compiler")


def a_config(mode: str, compiled: bool, **parallel: Any) -> Config:
    return layout_config(
        3,
        precision={"compute": "fp32", "master": "fp32"},
        # Blocks of chunks would be a long graph to build.
        model={"attention": "sdpa" if "cp" in parallel else "blocked", "num_layers": 2 * parallel.get("pp", 1)},
        data={"micro_batch_size": 3},
        recompute={"mode": mode},
        compile={"blocks": compiled, "loss": compiled and mode == "none"},
        parallel=parallel,
    )


LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("none", {"dp_shard": 2}),
    ("selective", {"dp_shard": 2}),
    ("selective", {"tp": 2}),
    ("full", {"cp": 2}),
    ("selective", {"pp": 2, "schedule": "DualPipeV"}),
]


def named(mode: str, parallel: dict[str, Any], backend: str, *marks: pytest.MarkDecorator) -> Any:
    layout = " ".join(f"{axis}={degree}" for axis, degree in parallel.items())
    return pytest.param(mode, parallel, backend, id=f"{mode} {layout} {backend}", marks=marks)


@pytest.mark.parametrize(
    ("mode", "parallel", "backend"),
    [
        *(named(mode, parallel, GRAPHS) for mode, parallel in (LAYOUTS[0], *LAYOUTS[2:4])),
        *(named(mode, parallel, GRAPHS, pytest.mark.long) for mode, parallel in (LAYOUTS[1], LAYOUTS[4])),
        named("none", {"dp_shard": 2}, KERNELS, pytest.mark.long),
        # Kernels under tp are test_tensor.py's and test_lora_compile.py's.
        *(named(mode, parallel, KERNELS, pytest.mark.long) for mode, parallel in LAYOUTS[3:]),
    ],
)
def test_compiled_blocks_train_the_eager_run_by_one_graph(mode: str, parallel: dict[str, Any], backend: str) -> None:
    if {"schedule", "cp"} & parallel.keys() and is_refused(a_config(mode, True, **parallel)):
        pytest.skip(f"refused under torch {torch.__version__}, see test_pipeline.py and test_compiler.py")
    eager = train_on(2, a_config("none", False, **parallel))
    found = run_ranks(2, train_and_count, a_config(mode, True, **parallel), backend, timeout_s=300)
    # The block, without and with gradients; and the cross entropy of a whole and of a last, shorter chunk.
    assert [graphs for _, graphs in found] == [4 if mode == "none" else 2] * 2
    assert_same(put_together([of_rank for of_rank, _ in found if of_rank]), eager, 1e-4)


def is_refused(config: Config) -> bool:
    """Tell whether this torch gets compiled halves, or compiled parts of a sequence, wrong, and is refused for it."""
    try:
        check_schedule(resolve(config, 2))
        check_compiled_context(config)
    except ConfigError:
        return True
    return False


def train_with_cache(config: Config, folder: Path) -> Trained | None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / f"rank-{torch.distributed.get_rank()}")
    return train_here(config, False)


@pytest.mark.long
def test_a_schedule_takes_no_graph_from_the_cache_that_another_left(tmp_path: Path) -> None:
    """1F1B's graphs overwrite what they saved; zero bubble reads it twice. Both have the same blocks."""
    for schedule, stages in (("1F1B", {}), ("InterleavedZeroBubble", {"stages_per_rank": 1})):
        config = a_config("none", False, pp=2, schedule=schedule, **stages)
        config = replace(config, model=replace(config.model, attention="sdpa"))  # a small graph
        eager = train_on(2, config)
        compiled = replace(config, compile=CompileConfig(blocks=True))
        if is_refused(compiled):
            return
        found = run_ranks(2, train_with_cache, compiled, tmp_path, timeout_s=300)
        assert_same(put_together([of_rank for of_rank in found if of_rank]), eager, 1e-4)


@contextmanager
def saved_bytes(blocks: list[torch.nn.Module]) -> Iterator[list[int]]:
    """Count what compiled blocks save for their backward pass, parameters apart."""
    own = {parameter.data_ptr() for block in blocks for parameter in block.parameters()}
    counts = [0]

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            counts[0] += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield counts


def count_saved(mode: str) -> int:
    torch.compiler.reset()
    model = {"dim": 32, "num_layers": 2, "num_heads": 2, "head_dim": 16, "num_kv_heads": 1, "ffn_dim": 64}
    config = resolve(layout_config(1, model=model, precision={"compute": "fp32", "master": "fp32"}), 1).model
    blocks = list(Llama(config, "blocked").layers.values())
    recompute(blocks, RecomputeConfig(mode=mode))  # pyright: ignore[reportArgumentType]
    x = torch.randn(1, 160, 32, requires_grad=True)
    table = torch.randn(1, 160, 8)
    for block in blocks:
        # The compiler's choice of what to save, without its kernels: those take a minute to build.
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager_decomp_partition")
    with saved_bytes(blocks) as counts:
        for block in blocks:
            x = block(x, table, table, None)
    return counts[0]


def test_a_compiled_block_saves_what_its_mode_keeps() -> None:
    none, selective, full = run_ranks(1, lambda: [count_saved(mode) for mode in ("none", "selective", "full")])[0]
    stream, tables = 160 * 32 * 4, 160 * 8 * 4 * 2
    assert none > selective > full
    if torch.__version__ < "2.13":  # compared as versions; torch 2.11 keeps half more than what the mode names
        assert full <= 4 * (stream + tables)
        return
    assert full <= 2 * (stream + tables)
    # A key head of half the width, attention's output, the output projection, and twice the width inside.
    assert selective - full == pytest.approx(2 * stream * (0.5 + 1 + 1 + 2), abs=2 * tables)
