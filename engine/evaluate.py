"""Loss on held-out documents, the same documents in the same order on any number of ranks."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from engine.data.batches import IGNORE, Batch
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


@torch.no_grad()
def evaluate(model: nn.Module, forward: Forward, batches: Iterable[Batch], layout: Layout) -> HeldoutLoss:
    """Sum the loss over the batches of all ranks; every rank must bring as many batches as the others."""
    # Summed in float64 on the host side of the device: thousands of float32 sums would drift with their number.
    total = torch.zeros((), dtype=torch.float64, device=layout.device)
    counts = torch.zeros(2, dtype=torch.float64, device=layout.device)
    for batch in batches:
        total += forward(batch)
        counts[0] += (batch.targets != IGNORE).sum()
        counts[1] += batch.num_bytes
    free_gathered(model)
    loss_sum = layout.sum_over_losses(total).item()
    num_tokens, num_bytes = layout.sum_over_tokens(counts).tolist()
    loss = loss_sum / max(num_tokens, 1.0)
    bits_per_byte = loss_sum / math.log(2) / num_bytes if num_bytes > 0 else None
    return HeldoutLoss(loss, bits_per_byte, int(num_tokens))
