"""What a run says of what it trains, and where it keeps its base."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from configs.check import resolve
from configs.load import config_from_dict
from configs.schema import Config
from engine import memory
from engine.memory import choose_base, frozen_bytes, held_bytes
from engine.trained import trained_table
from models.adapters import attach
from models.llama import Llama

CPU = torch.device("cpu")
SHAPE = {"vocab_size": 100, "dim": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 96}


def make(world_size: int = 1, adapter: dict[str, Any] | None = None, **parallel: Any) -> Config:
    tree: dict[str, Any] = {
        "run": {"steps": 1},
        "model": SHAPE,
        "adapter": {"kind": "lora", "rank": 4} | (adapter or {}),
        "data": {"seq_len": 8, "global_batch_size": 24, "stores": [{"path": "x"}]},
        "parallel": parallel,
    }
    return resolve(config_from_dict(tree, "test"), world_size)


def counts(config: Config) -> tuple[int, int]:
    """Parameters that are trained, and all of them, of the real model."""
    model = Llama(config.model)
    attach(model, config.adapter)
    numbers = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in numbers if trained), sum(n for n, _ in numbers)


@pytest.mark.parametrize(
    "adapter",
    [{}, {"targets": ["q_proj", "lm_head"]}, {"kind": "prefix", "num_virtual_tokens": 3, "rank": 16},
     {"kind": "freeze", "last_layers": 1, "rank": 16}],
    ids=["lora", "some", "prefix", "freeze"],
)  # fmt: skip
def test_the_table_counts_the_real_model(adapter: dict[str, Any]) -> None:
    config = make(adapter=adapter)
    trained, total = counts(config)
    head, *modules, frozen = list(trained_table(config))
    assert (
        head == f"training {trained:,} of {total:,} parameters ({100 * trained / total:.3g}%) by {config.adapter.kind}"
    )
    assert sum(int(line.split(": ")[1].split(" in ")[0].replace(",", "")) for line in modules) == trained
    assert frozen.startswith(f"frozen: {total - trained:,} parameters, ")
    assert "(2 bytes each, bf16)" in frozen


def test_projections_that_stay_in_16_bits_are_named() -> None:
    lines = list(trained_table(make(adapter={"quantization": "nf4"})))
    said = "in 16 bits, since their inputs are no multiple of 64: down_proj, 2 projections in all"
    assert said in lines  # 96 inputs
    assert frozen_bytes(make(adapter={"quantization": "nf4"})) < frozen_bytes(make())


def test_a_base_is_replicated_where_half_of_the_memory_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(2)
    copy = frozen_bytes(config)
    for memory_bytes, base in ((2 * copy, "replicated"), (2 * copy - 1, "sharded")):
        monkeypatch.setattr(memory, "device_bytes", lambda device, ranks, has=memory_bytes: has)
        assert choose_base(config, CPU, 2).adapter.base == base
        # A lone data-parallel rank has nothing to gather from.
        assert choose_base(make(2, tp=2), CPU, 2).adapter.base == "replicated"
        asked = replace(config, adapter=replace(config.adapter, base="sharded"))
        assert choose_base(asked, CPU, 2) == asked
    whole, shared = (held_bytes(replace(config, adapter=replace(config.adapter, base=base))).state
                     for base in ("replicated", "sharded"))  # fmt: skip
    assert whole - shared == copy // 2
