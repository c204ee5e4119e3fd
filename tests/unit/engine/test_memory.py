"""What a layout holds for sure, by hand, and its refusal."""

import os
from dataclasses import replace

import pytest
import torch

from configs.check import resolve
from configs.errors import ConfigError
from configs.load import config_from_dict
from configs.schema import Config
from engine import memory
from engine.memory import GIB, check_memory, device_bytes, state_bytes
from models.llama import Llama

CPU = torch.device("cpu")


def make(world_size: int = 1, layers: int = 2, dim: int = 8, **parallel: object) -> Config:
    tree = {
        "run": {"steps": 1},
        "model": {"vocab_size": 11, "dim": dim, "num_layers": layers, "num_heads": 2, "ffn_dim": 12},
        "data": {"seq_len": 4, "global_batch_size": 8, "micro_batch_size": 1, "stores": [{"path": "x"}]},
        "parallel": parallel,
    }
    return resolve(config_from_dict(tree, "test"), world_size)


def params(config: Config) -> int:
    return sum(p.numel() for p in Llama(config.model).parameters())


def test_masters_gradients_and_two_moments_are_counted() -> None:
    config = make()
    assert state_bytes(config) == 4 * 4 * params(config)
    precise = replace(config, precision=replace(config.precision, master="fp64", compute="fp64"))
    assert state_bytes(precise) == 4 * 8 * params(config)


def test_shards_share_and_replicas_do_not() -> None:
    whole = 16 * params(make())
    assert state_bytes(make(4)) == whole // 4
    assert state_bytes(make(4, dp_replicate=2)) == whole // 2


def test_unsharded_gradients_are_whole_on_each_rank() -> None:
    config = make(4, accumulate="unsharded")
    assert state_bytes(config) == 4 * params(config) + 4 * params(config)


def test_the_ranks_of_a_machine_share_its_memory() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert (device_bytes(CPU, 1), device_bytes(CPU, 3)) == (total, total // 3)


def test_what_fits_is_not_refused() -> None:
    check_memory(make(), CPU, 1)


@pytest.mark.parametrize(
    ("parallel", "text"),
    [
        (
            {},
            r"parallel\.dp_shard = 2: [\d.]+ GiB of weights, gradients and optimizer state a rank: must fit the "
            r"[\d.]+ GiB of cpu\. Shard over more ranks\.",
        ),
        (
            {"accumulate": "unsharded"},
            r"parallel\.accumulate = 'unsharded': [\d.]+ GiB of weights, gradients and optimizer state a rank: must "
            r"fit the [\d.]+ GiB of cpu\. Use parallel\.accumulate = 'sharded', or shard over more ranks\.",
        ),
    ],
)
def test_what_can_not_fit_is_refused_with_both_sizes(parallel: dict[str, str], text: str) -> None:
    config = make(2, layers=10**6, dim=1024, **parallel)
    with pytest.raises(ConfigError, match=f"^{text}$") as refusal:
        check_memory(config, CPU, 2)
    assert f" {state_bytes(config) / GIB:.1f} GiB" in str(refusal.value)
    assert f" {memory.device_bytes(CPU, 2) / GIB:.1f} GiB" in str(refusal.value)
