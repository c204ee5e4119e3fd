"""Held-out loss: a sum over a count, over all ranks, however the documents fall on them."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.schema import ParallelConfig
from engine.data.batches import IGNORE, Batch
from engine.evaluate import HeldoutLoss, evaluate
from parallel.mesh import build_layout
from tests.ranks import ranks, run_ranks


def batch(rows: int, targets: int, num_bytes: int) -> Batch:
    """`rows` sequences of eight tokens, with `targets` targets in all."""
    wanted = torch.full((rows, 8), IGNORE)
    wanted.view(-1)[:targets] = 1
    return Batch(torch.ones(rows, 8, dtype=torch.long), wanted, None, None, num_bytes)


def forward(batch: Batch) -> Tensor:
    """Two nats a target, in a precision that would lose a sum of thousands."""
    assert not torch.is_grad_enabled()
    return 2 * (batch.targets != IGNORE).sum().to(torch.bfloat16)


def heldout_loss(batches_of_ranks: list[list[Batch]]) -> HeldoutLoss:
    size = dist.get_world_size()
    layout = build_layout(ParallelConfig(dp_shard=size), torch.device("cpu"))
    return evaluate(nn.Linear(1, 1), forward, batches_of_ranks[dist.get_rank()], layout)


def test_ranks_with_unequal_targets_give_one_mean() -> None:
    """Rank 1 has far fewer targets: a mean of means would be another number, and padding counts for nothing."""
    batches = [[batch(4, 32, 100), batch(4, 32, 100)], [batch(4, 8, 20), batch(4, 0, 0)]]
    found = run_ranks(2, heldout_loss, batches)
    assert found[0] == found[1] == HeldoutLoss(2.0, 2.0 / math.log(2) * 72 / 220, 72)
    assert run_ranks(1, heldout_loss, [batches[0] + batches[1]])[0] == found[0]


@ranks(1)
def test_many_batches_lose_nothing_and_are_read_one_at_a_time() -> None:
    alive = []

    def stream() -> Iterator[Batch]:
        for _ in range(3000):
            alive.append(1)
            yield batch(1, 1, 1)

    layout = build_layout(ParallelConfig(dp_shard=1), torch.device("cpu"))
    found = evaluate(nn.Linear(1, 1), forward, stream(), layout)
    assert (found.loss, found.num_tokens, len(alive)) == (2.0, 3000, 3000)
    assert found.bits_per_byte == pytest.approx(2 / math.log(2))


@ranks(1)
def test_without_bytes_or_targets_nothing_divides_by_zero() -> None:
    layout = build_layout(ParallelConfig(dp_shard=1), torch.device("cpu"))
    assert evaluate(nn.Linear(1, 1), forward, [batch(2, 3, 0)], layout) == HeldoutLoss(2.0, None, 3)
    assert evaluate(nn.Linear(1, 1), forward, [batch(2, 0, 0)], layout) == HeldoutLoss(0.0, None, 0)
    assert evaluate(nn.Linear(1, 1), forward, [], layout) == HeldoutLoss(0.0, None, 0)


def of_members(batch: Batch) -> Tensor:
    """One nat a target of the first member, two of the second."""
    return batch.num_targets() * torch.tensor([1.0, 2.0])


def heldout_of_members(batches_of_ranks: list[list[Batch]]) -> HeldoutLoss:
    layout = build_layout(ParallelConfig(dp_shard=dist.get_world_size()), torch.device("cpu"))
    return evaluate(nn.Linear(1, 1), of_members, batches_of_ranks[dist.get_rank()], layout)


def test_members_are_measured_apart_and_the_loss_is_their_mean() -> None:
    """The second member has half the targets in all, and no byte on the first rank."""
    batches = [
        [replace(batch(4, 16, 0), members=2, bytes_of_members=(50, 0))],
        [replace(batch(4, 24, 0), members=2, bytes_of_members=(50, 40))],
    ]
    found = run_ranks(2, heldout_of_members, batches)
    a = HeldoutLoss(1.0, 1.0 / math.log(2) * 32 / 100, 32)
    b = HeldoutLoss(2.0, 2.0 / math.log(2) * 8 / 40, 8)
    bits = (1.0 / math.log(2) * 32 / 100 + 2.0 / math.log(2) * 8 / 40) / 2
    assert found[0] == found[1] == HeldoutLoss(1.5, bits, 40, (a, b))
