"""Loss on held-out documents, the same documents in the same order on any number of ranks."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from engine.data.batches import Batch
from engine.step import Forward
from parallel.fsdp import free_gathered
from parallel.mesh import Layout


@dataclass(frozen=True, slots=True)
class HeldoutLoss:
    """What the model makes of text that it was not trained on."""

    loss: float
    """Nats a token."""
    bits_per_byte: float | None
    """The same in bits for each byte of UTF-8, which compares across tokenizers; None without any byte."""
    num_tokens: int
    members: tuple["HeldoutLoss", ...] = ()
    """That of each member of a run that has several, in order; the losses above are then their mean."""


@torch.no_grad()
def evaluate(model: nn.Module, forward: Forward, batches: Iterable[Batch], layout: Layout) -> HeldoutLoss:
    """Sum the loss over the batches of all ranks; every rank must bring as many batches as the others."""
    # Summed in float64 on the host side of the device: thousands of float32 sums would drift with their number.
    zero = torch.zeros((), dtype=torch.float64, device=layout.device)
    # Each () or (members,), as the first batch says.
    total, num_targets, num_bytes = zero, zero, zero
    for batch in batches:
        total = total + forward(batch)
        num_targets = num_targets + batch.num_targets()
        num_bytes = num_bytes + torch.tensor(batch.bytes_of_members or batch.num_bytes, device=layout.device)
    free_gathered(model)
    loss_sums = layout.sum_over_losses(total.clone()).tolist()
    counts = layout.sum_over_tokens(torch.stack([num_targets, num_bytes])).tolist()
    if not isinstance(loss_sums, list):
        return _heldout_loss(loss_sums, *counts)
    members = tuple(_heldout_loss(*of_member) for of_member in zip(loss_sums, *counts, strict=True))
    bits = [member.bits_per_byte for member in members if member.bits_per_byte is not None]
    return HeldoutLoss(
        loss=sum(member.loss for member in members) / len(members),
        bits_per_byte=sum(bits) / len(bits) if len(bits) == len(members) else None,
        num_tokens=sum(member.num_tokens for member in members),
        members=members,
    )


def _heldout_loss(loss_sum: float, num_tokens: float, num_bytes: float) -> HeldoutLoss:
    loss = loss_sum / max(num_tokens, 1.0)
    bits_per_byte = loss_sum / math.log(2) / num_bytes if num_bytes > 0 else None
    return HeldoutLoss(loss, bits_per_byte, int(num_tokens))
