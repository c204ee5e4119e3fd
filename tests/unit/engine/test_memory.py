"""What a layout holds for sure, by hand, and its refusal."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.check import resolve
from configs.errors import ConfigError
from configs.load import config_from_dict
from configs.schema import Config
from engine import memory
from engine.memory import GIB, Held, cgroup_limits, check_memory, device_bytes, held_bytes
from models.llama import Llama

CPU = torch.device("cpu")


def make(world_size: int = 1, layers: int = 2, dim: int = 8, **parallel: object) -> Config:
    tree = {
        "run": {"steps": 1},
        "model": {"vocab_size": 12, "dim": dim, "num_layers": layers, "num_heads": 2, "ffn_dim": 12},
        "data": {"seq_len": 4, "global_batch_size": 8, "micro_batch_size": 1, "stores": [{"path": "x"}]},
        "parallel": parallel,
    }
    return resolve(config_from_dict(tree, "test"), world_size)


def params(config: Config) -> int:
    return sum(p.numel() for p in Llama(config.model).parameters())


def test_masters_gradients_and_two_moments_are_counted() -> None:
    config = make()
    assert held_bytes(config) == Held(4 * 4 * params(config), 0)
    precise = replace(config, precision=replace(config.precision, master="fp64", compute="fp64"))
    assert held_bytes(precise) == Held(4 * 8 * params(config), 0)


def test_an_optimizer_of_one_moment_holds_less() -> None:
    config = make()
    lion = replace(config, optim=replace(config.optim, kind="lion"))
    assert held_bytes(lion).state == 3 * 4 * params(config)
    muon = replace(config, optim=replace(config.optim, kind="muon"))
    matrices = sum(p.numel() for p in Llama(config.model).layers.parameters() if p.ndim == 2)
    assert held_bytes(muon).state == 4 * (4 * params(config) - matrices)


@pytest.mark.parametrize(("axis", "sharing"), [("dp_shard", 2), ("cp", 2), ("tp", 2), ("pp", 2), ("dp_replicate", 1)])
def test_every_axis_but_replicas_shares_the_state(axis: str, sharing: int) -> None:
    config = make(2, **{axis: 2})
    assert held_bytes(config).state == 16 * params(config) // sharing


def test_unsharded_gradients_are_whole_on_each_rank_of_a_stage() -> None:
    config = make(4, accumulate="unsharded")
    assert held_bytes(config) == Held(4 * params(config), 4 * params(config))
    config = make(4, accumulate="unsharded", pp=2)
    assert held_bytes(config) == Held(4 * params(config), 4 * params(config) // 2)


def test_a_large_head_is_held_whole_by_the_loss() -> None:
    config = make(4)
    config = replace(config, model=replace(config.model, vocab_size=1000))
    assert held_bytes(config) == Held(3 * params(config), 4 * 8 * 1000)


def test_the_ranks_of_a_machine_share_its_memory() -> None:
    total = min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *cgroup_limits()])
    assert (device_bytes(CPU, 1), device_bytes(CPU, 3)) == (total, total // 3)


def test_the_limits_of_all_enclosing_cgroups_count(tmp_path: Path) -> None:
    own, root = tmp_path / "own", tmp_path / "cgroup"
    (root / "job" / "step").mkdir(parents=True)
    (root / "memory" / "old").mkdir(parents=True)
    (root / "job" / "memory.max").write_text("4096\n")
    (root / "job" / "step" / "memory.max").write_text("max\n")
    (root / "memory" / "old" / "memory.limit_in_bytes").write_text("8192\n")
    own.write_text("4:memory:/old\n3:cpuset:/job\n0::/job/step\n")
    assert cgroup_limits(root, own) == [8192, 4096]
    assert cgroup_limits(root, tmp_path / "none") == []


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
    held = held_bytes(config)
    with pytest.raises(ConfigError, match=f"^{text}$") as refusal:
        check_memory(config, CPU, 2)
    assert f" {(held.state + held.whole) / GIB:.1f} GiB" in str(refusal.value)
    assert f" {memory.device_bytes(CPU, 2) / GIB:.1f} GiB" in str(refusal.value)
