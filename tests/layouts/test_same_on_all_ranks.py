"""What must be the same on all ranks, on every kind of layout: judgements of bad steps, and state that several hold."""

import json
import random
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from configs.check import resolve
from configs.faults import FaultConfig
from configs.schema import Config
from engine.build import build_passes
from engine.checkpoint.state import saved_tensors
from engine.fault.guard import Guard
from engine.fault.replicas import CHUNK, Replicas
from engine.optim import build_optimizer
from engine.step import train_step
from engine.weights import starting_weights
from parallel.apply import build_model
from parallel.mesh import build_layout
from tests.ranks import run_ranks
from tests.training import adapted_batch, layout_config, lively, my_microbatches

STEPS, NAN_LOSS, NAN_GRAD, SPIKE = 9, 5, 6, 8
FAULT = {"spike_threshold": 8.0, "spike_window": 8}
LORA = {"adapter": {"kind": "lora", "rank": 2, "targets": ["q_proj", "o_proj", "down_proj"]}}
TIED = {"model": {"tie_embeddings": True}}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "fsdp": (2, {"parallel": {"dp_shard": 2}}),
    "replicas": (2, {"parallel": {"dp_replicate": 2, "dp_shard": 1}}),
    "context": (2, {"parallel": {"cp": 2, "dp_shard": 1}}),
    "tensor": (2, {"parallel": {"tp": 2, "dp_shard": 1}}),
    "tensor, lora": (2, {"parallel": {"tp": 2, "dp_shard": 1}, **LORA}),
    "stages, tied": (2, {"parallel": {"pp": 2, "dp_shard": 1}, "data": {"micro_batch_size": 6}, **TIED}),
    "replicas of shards": (4, {"parallel": {"dp_replicate": 2, "dp_shard": 2}}),
    "three replicas": (3, {"parallel": {"dp_replicate": 3, "dp_shard": 1}}),
    "replicas of tensor": (4, {"parallel": {"dp_replicate": 2, "dp_shard": 1, "tp": 2}}),
}


def configs_for(n: int) -> dict[str, Config]:
    return {
        name: layout_config(STEPS, precision={"compute": "fp32", "master": "fp32"}, fault=FAULT, **sections)
        for name, (ranks, sections) in LAYOUTS.items()
        if ranks == n
    }


def train_poisoned(config: Config) -> dict[str, Any]:
    """Train with the last rank's losses and gradients spoiled; then flip bits of what it shares."""
    config = resolve(config, dist.get_world_size())
    layout = build_layout(config.parallel, torch.device("cpu"))
    group: Any = dist.new_group(backend="gloo")
    model = build_model(config, layout, lively(starting_weights(config), config))
    optimizer = build_optimizer(model, config.optim, stage=config.parallel.pp > 1)
    _, forward_backward = build_passes(config, layout, model)
    guard, step = Guard(config.fault, 0, layout.device), 0
    last = layout.rank == layout.world_size - 1

    def poisoned(*given: Any) -> Tensor:
        loss_sum = forward_backward(*given)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if last and step == NAN_LOSS:
            loss_sum = loss_sum * float("nan")
        if last and step == NAN_GRAD:
            local_of(gradients[-1]).view(-1)[0] = float("nan")
        if step == SPIKE:
            for gradient in gradients:
                local_of(gradient).mul_(50.0)
        return loss_sum

    skipped, unchanged = [], []
    for step in range(1, STEPS + 1):
        before = {name: whole_bits(tensor) for name, tensor in saved_tensors(model, optimizer).items()}
        batches = my_microbatches(adapted_batch(step, False, config), layout, config.data.micro_batch_size)
        result = train_step(model, optimizer, poisoned, batches, 1e-3, 0.3, layout, guard)
        skipped.append(bool(result.skipped))
        after = {name: whole_bits(tensor) for name, tensor in saved_tensors(model, optimizer).items()}
        if step > 1:
            unchanged.append(before == after)
    told = [(one.step, one.kind, one.rank) for one in guard.read()]
    found = {"skipped": skipped, "unchanged": unchanged, "told": told, "state": json.dumps(guard.state())}
    return found | flipped(Replicas(group), model, optimizer, last)


def flipped(replicas: Replicas, model: torch.nn.Module, optimizer: torch.optim.Optimizer, last: bool) -> dict[str, Any]:
    """Compare, then again with one bit of a shared weight, and of a moment, flipped on the last rank."""
    found: dict[str, Any] = {"at first": replicas.compare(model, optimizer, 9), "drifts": []}
    tensors = saved_tensors(model, optimizer)
    for prefix, ending in (("model.", ""), ("optimizer.", ".exp_avg_sq")):
        name = next((n for n, t in tensors.items() if n.startswith(prefix) and n.endswith(ending) and shared(n, t)), "")
        local = local_of(tensors[name]).view(-1)[-1:].view(torch.uint8) if name else torch.zeros(1, dtype=torch.uint8)
        if last:
            local[0] ^= 1
        drifts = replicas.compare(model, optimizer, 12)
        found["drifts"].append((name, [(one.name, one.ranks, one.holders) for one in drifts]))
        if drifts:
            found["error"] = str(drifts[0].error(12, replicas.checked_step, len(drifts) - 1))
        if last:
            local[0] ^= 1
    found["in the end"] = replicas.compare(model, optimizer, 12)
    return found


def shared(name: str, tensor: Tensor) -> bool:
    """Say whether another rank holds this rank's part of a tensor, by its placements, or by the tied weight's name."""
    if not isinstance(tensor, DTensor) or not tensor.to_local().numel():
        return False
    if "embed_tokens" in name and tensor.device_mesh.size() < dist.get_world_size():
        return True
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return any(isinstance(placement, Replicate) and size > 1 for placement, size in sizes)


def local_of(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def whole_bits(tensor: Tensor) -> bytes:
    return local_of(tensor).contiguous().numpy().tobytes()


def train_all(configs: Mapping[str, Config]) -> dict[str, dict[str, Any]]:
    return {name: train_poisoned(config) for name, config in configs.items()}


@pytest.fixture(scope="module")
def trained() -> dict[str, list[dict[str, Any]]]:
    """What each rank says of each layout."""
    found: dict[str, list[dict[str, Any]]] = {}
    for n in sorted({ranks for ranks, _ in LAYOUTS.values()}):
        each = run_ranks(n, train_all, configs_for(n), timeout_s=600)
        found |= {name: [of_rank[name] for of_rank in each] for name in configs_for(n)}
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_ranks_judge_alike_and_a_skipped_step_changes_nothing(
    trained: dict[str, list[dict[str, Any]]], name: str
) -> None:
    ranks = trained[name]
    first, n = ranks[0], len(ranks)
    assert first["skipped"] == [step in (NAN_LOSS, NAN_GRAD, SPIKE) for step in range(1, STEPS + 1)]
    assert [kind for _, kind, _ in first["told"]] == ["non_finite", "non_finite", "spike"]
    assert first["told"][0] == (NAN_LOSS, "non_finite", n - 1) and first["told"][1][2] is None
    for other in ranks[1:]:
        assert other["told"] == first["told"]
        assert other["state"] == first["state"], "the windows are the same to the last bit"
    for rank in ranks:
        assert rank["unchanged"] == [step in (NAN_LOSS, NAN_GRAD, SPIKE) for step in range(2, STEPS + 1)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_flipped_bit_of_what_several_hold_is_found_and_named(
    trained: dict[str, list[dict[str, Any]]], name: str
) -> None:
    ranks = trained[name]
    for rank in ranks:
        assert rank["at first"] == rank["in the end"] == [], "training keeps copies the same"
        assert rank["drifts"] == ranks[-1]["drifts"] or name == "stages, tied"
    last = len(ranks) - 1
    for flipped, drifts in ranks[-1]["drifts"]:
        assert bool(flipped) == (name not in ("fsdp", "context")), "there nothing but step counts is held twice"
        if not flipped:
            assert drifts == []
            continue
        ((drifted, wrong, holders),) = drifts
        assert drifted == flipped and last in holders and wrong == ([last] if len(holders) > 2 else holders)


def test_the_error_says_who_what_since_when_and_what_to_do(trained: dict[str, list[dict[str, Any]]]) -> None:
    (text,) = {rank["error"] for rank in trained["three replicas"]}
    begin, _, end = text.partition(
        " differs from the copies of ranks 0, 1, after step 12, since the last check at step 9 ("
    )
    assert begin.startswith("rank 2 on ") and ": optimizer." in begin and begin.endswith(".exp_avg_sq")
    assert end.endswith(
        "goes on from the last checkpoint. When it happens again on the same host, take that out of the job."
    )
    (text,) = {rank["error"] for rank in trained["replicas"]}
    assert text.startswith("ranks 0 on ") and ", 1 on " in text and " differs from one another, after step 12" in text


def judge_apart() -> tuple[list[float], str]:
    """Judge numbers that differ from rank to rank: by a last bit at the threshold, or by being none."""
    rank = dist.get_rank()
    guard = Guard(FaultConfig(spike_threshold=5.0, spike_window=8, skip_limit=9), 0, torch.device("cpu"))
    true, count, skipped = torch.tensor(True), torch.tensor(1), []
    threshold = 2.0 + 5.0 * 0.01 * 2.0
    values = [2.0] * 8 + [threshold + (rank - 1) * 1e-15, 2.0, float("nan") if rank == 1 else 2.0]
    for norm in values:
        loss = torch.tensor(1.0, dtype=torch.float64)
        skipped.append(guard.judge(loss, torch.tensor(norm, dtype=torch.float64), count, true).item())
    return skipped, json.dumps(guard.state())


def test_ranks_that_see_other_bits_decide_the_same() -> None:
    found = run_ranks(3, judge_apart)
    assert found[0] == found[1] == found[2]
    assert found[0][0] == [0.0] * 8 + [1.0, 0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.int64])
def test_each_single_bit_changes_the_hash_and_so_does_the_order(dtype: torch.dtype) -> None:
    replicas, draw = Replicas(None), random.Random(5)
    for size in (1, 3, 8, 29):
        data = torch.arange(3, 3 + size).to(dtype)
        plain = int(replicas._digest(data))
        bits = data.view(torch.uint8)
        for place in range(8 * bits.numel()):
            bits[place // 8] ^= 1 << place % 8
            assert int(replicas._digest(data)) != plain, f"bit {place} of {size} x {dtype}"
            bits[place // 8] ^= 1 << place % 8
        assert int(replicas._digest(data)) == plain
        if size > 1:
            assert int(replicas._digest(data.flip(0))) != plain
    large = torch.zeros(CHUNK * 8 + 5, dtype=torch.uint8)
    plain = int(replicas._digest(large))
    for place in [0, CHUNK * 8 - 1, CHUNK * 8, CHUNK * 8 + 4, *(draw.randrange(CHUNK * 8) for _ in range(5))]:
        large[place] ^= 128
        assert int(replicas._digest(large)) != plain, place
        large[place] ^= 128
