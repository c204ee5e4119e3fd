"""What steps leave on the device, and its one reading at a logged step: an element for each member, or one.

A run of a single adapter, or of the whole model, is read as one of a single member without a name.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.fault.guard import Guard, Skipped
from engine.metrics import MemberStep
from engine.step import StepResult


@dataclass(slots=True)
class Counters:
    """Sums over steps that stay on the device until a logged step reads them; each () or (members,)."""

    num_tokens: Tensor
    """Targets since the run's first step, int64."""
    empty: Tensor
    """Steps that had no target."""

    @classmethod
    def starting_at(cls, num_tokens: int | list[int], device: torch.device) -> "Counters":
        """Start with the targets seen so far: of the run, or of each member."""
        seen = torch.tensor(num_tokens, device=device)
        return cls(seen, torch.zeros_like(seen))

    def add(self, result: StepResult) -> None:
        """Count a step."""
        self.num_tokens += result.num_tokens
        self.empty += result.num_tokens == 0


@dataclass(frozen=True, slots=True)
class Reading:
    """A logged step on the host."""

    steps: list[MemberStep]
    """Of each member, or the one there is."""
    counts: list[float]
    """Targets of this step."""
    empty: list[float]
    skipped: list[Skipped]
    """Bad steps since the last reading."""

    @property
    def loss(self) -> float:
        """Mean loss of those that had a target in this step."""
        return self._mean([step.loss for step in self.steps])

    @property
    def grad_norm(self) -> float:
        """Mean norm of those that had a target in this step."""
        return self._mean([step.grad_norm for step in self.steps])

    @property
    def lr(self) -> float:
        """Mean learning rate."""
        return sum(step.lr for step in self.steps) / len(self.steps)

    def empty_steps(self, names: Sequence[str]) -> list[str]:
        """Say who had steps without a target."""
        each = zip(names or [""], self.empty, strict=True)
        return [f"{whose(name)}{int(steps)} steps" for name, steps in each if steps]

    def _mean(self, values: list[float]) -> float:
        learned = [value for value, count in zip(values, self.counts, strict=True) if count] or [0.0]
        return sum(learned) / len(learned)


def read_step(result: StepResult, counters: Counters, lrs: Sequence[float], guard: Guard) -> Reading:
    """Read the device, once; every rank calls it. `lrs` are the learning rates of the members."""
    loss_sum, count = result.loss_sum, result.num_tokens.double()
    sums = torch.stack(
        [loss_sum / count.clamp(min=1), result.grad_norm.double().to(count.device), count,
         counters.num_tokens.double(), counters.empty.double()]
    ).view(5, -1)  # fmt: skip
    losses, norms, counts, num_tokens, empty, *memory = torch.cat([sums, guard.memory]).tolist()
    steps = [
        MemberStep(loss=loss, grad_norm=norm, lr=lr, num_tokens=int(tokens))
        for loss, norm, lr, tokens in zip(losses, norms, lrs, num_tokens, strict=True)
    ]
    return Reading(steps, counts, empty, guard.take(memory))


def whose(name: str) -> str:
    """Begin a sentence about a member; nothing where there is only one, without a name."""
    return f"member {name!r}: " if name else ""
