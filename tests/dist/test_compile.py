"""Compiled blocks and a compiled loss train the same run as eager ones, by one graph for all blocks."""

from typing import Any

import pytest
import torch

from configs.errors import ConfigError
from configs.schema import CompileConfig
from engine.compiler import check_compiler
from engine.loss import chunk_cross_entropy, compiled_chunk_loss
from tests.dist.test_step import a_config, assert_same, train_here
from tests.ranks import run_ranks


def train_and_count(config: Any) -> dict[str, Any]:
    """Train, and count what was compiled in all and after the second step."""
    import torch._dynamo.utils as dynamo

    chunk_loss = compiled_chunk_loss() if config.compile.loss else chunk_cross_entropy
    found = train_here(config, -1, False, chunk_loss)
    found["frames"] = dynamo.counters["stats"]["unique_graphs"]
    return found


def test_compiled_equals_eager_on_two_ranks() -> None:
    try:
        check_compiler(CompileConfig(blocks=True), torch.device("cpu"))
    except ConfigError as error:
        pytest.skip(str(error))
    eager = run_ranks(2, train_and_count, a_config(3))[0]
    compiled = run_ranks(2, train_and_count, a_config(3, compile={"blocks": True, "loss": True}), timeout_s=300)[0]
    assert eager["frames"] == 0
    # The block, and the cross entropy of a whole and of a last, shorter chunk: not one graph a layer.
    assert 2 <= compiled["frames"] <= 3
    assert compiled["losses"] == pytest.approx(eager["losses"], rel=1e-5)
    assert_same(compiled, eager, "grads", 1e-4)
    assert_same(compiled, eager, "weights", 1e-4)
