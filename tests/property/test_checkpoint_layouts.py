"""What is saved on one layout is, bit for bit, what is loaded on another: random pairs of layouts."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor

from configs.check import resolve
from configs.schema import Config, ParallelConfig
from engine.checkpoint.checkpointer import Checkpointer
from engine.checkpoint.state import saved_tensors
from engine.optim import build_optimizer
from engine.weights import starting_weights
from parallel.apply import build_model
from parallel.mesh import build_layout
from tests.ranks import run_ranks
from tests.training import layout_config

DEGREES = {
    "one process": {},
    "fsdp 3": {"dp_shard": 3},
    "hsdp 2x2": {"dp_replicate": 2, "dp_shard": 2},
    "fsdp 2 tp 2": {"dp_shard": 2, "tp": 2},
    "tp 4": {"tp": 4},
    "cp 2 tp 2": {"cp": 2, "tp": 2},
    "pp 2": {"pp": 2},
    "pp 2 looped, fsdp 2": {"pp": 2, "dp_shard": 2, "schedule": "Interleaved1F1B"},
    "pp 2 V, tp 2": {"pp": 2, "tp": 2, "schedule": "DualPipeV"},
}


def drawn(seed: int) -> Any:
    """A fill that tells each element of each tensor apart."""

    def fill(local: torch.Tensor, name: str, shape: tuple[int, ...], offset: tuple[int, ...]) -> None:
        generator = torch.Generator().manual_seed(seed + sum(name.encode()))
        whole = torch.randn(shape, generator=generator, dtype=local.dtype)
        local.copy_(whole[tuple(slice(at, at + size) for at, size in zip(offset, local.shape, strict=True))])

    return fill


def save_or_load(config: Config, folder: Path, save: bool) -> dict[str, torch.Tensor]:
    """Fill model and moments with numbers and save them, or start from others and load; return what is there now."""
    config = resolve(config, dist.get_world_size())
    layout = build_layout(config.parallel, torch.device("cpu"))
    model = build_model(config, layout, drawn(1) if save else starting_weights(config))
    optimizer = build_optimizer(model, config.optim)
    with Checkpointer(folder, replace(config.checkpoint, asynchronous=False)) as checkpointer:
        if save:
            for parameter in model.parameters():
                parameter.grad = parameter.detach().clone()
            optimizer.step()
            checkpointer.save(1, model, optimizer, {"step": 1})
        else:
            found = checkpointer.find_latest()
            assert found is not None
            checkpointer.load(found, model, optimizer)
    tensors = saved_tensors(model, optimizer)
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for name, t in tensors.items()}


@pytest.mark.long
@settings(max_examples=6, deadline=None)
@given(st.sampled_from(sorted(DEGREES)), st.sampled_from(sorted(DEGREES)), st.booleans())
def test_saved_on_one_layout_is_loaded_on_another(before: str, after: str, tied: bool) -> None:
    tied = tied and "DualPipeV" not in (DEGREES[before].get("schedule"), DEGREES[after].get("schedule"))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, save in ((before, True), (after, False)):
            parallel = ParallelConfig(**DEGREES[name])
            ranks = parallel.dp_replicate * max(parallel.dp_shard, 1) * parallel.cp * parallel.tp * parallel.pp
            config = replace(layout_config(3, model={"tie_embeddings": tied, "num_layers": 4}), parallel=parallel)
            whole: dict[str, torch.Tensor] = {}
            for of_rank in run_ranks(ranks, save_or_load, config, Path(folder), save):
                whole |= of_rank
            found.append(whole)
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name
