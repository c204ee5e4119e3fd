"""Bad steps are decided on the device, equal on all ranks, and remembered there.

A step is bad when its loss or gradient norm is not finite or, where fault.spike_threshold asks for it, lies so many
robust deviations above the median of the last good steps: 1.4826 x MAD, which is the standard deviation of what is
normally distributed (Rousseeuw and Croux 1993). More bad steps in a row than fault.skip_limit trip the guard: nothing
is applied from then on, so that what comes of it doesn't depend on when the host looks. All of it is elementwise over
the members of a run. What the ranks judge is made one number first, by a maximum over all of them: sums over other
groups of ranks may differ in their last bits, and ranks that judge differently would part for good.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from configs.faults import FaultConfig

FLOOR = 0.01
"""A deviation is at least this part of the median: a flat window would make a spike of any ripple."""
RECENT = 8
"""Skipped steps whose values are remembered until the host looks."""

_STEP, _STREAK, _FIRST, _SKIPPED, _HEAD = range(5)
_ENTRY = 4  # rows of a skipped step: step, loss, grad_norm, rank
_NOBODY = -1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A bad step, as the host learns of it."""

    member: int
    """Index among the members; 0 in a run of one."""
    step: int
    loss: float
    grad_norm: float
    rank: int | None
    """The lowest rank whose own part of the loss was not finite; None where there is none."""
    forgotten: int = 0
    """Skipped steps before it whose values nobody remembers."""

    @property
    def kind(self) -> str:
        """What was bad about it."""
        return "spike" if math.isfinite(self.loss) and math.isfinite(self.grad_norm) else "non_finite"


@dataclass(frozen=True, slots=True)
class Trip:
    """More bad steps in a row than are skipped."""

    first: int
    last: Skipped


class Guard:
    """Judges each step; its memory is part of a checkpoint."""

    def __init__(self, config: FaultConfig, members: int, device: torch.device) -> None:
        """Start with an empty memory; `members` is 0 for a run of one."""
        self._limit, self._threshold = config.skip_limit, config.spike_threshold
        self._ranks = dist.get_world_size() if dist.is_initialized() else 1
        self._index = dist.get_rank() if dist.is_initialized() else 0
        each = max(members, 1)
        self.memory = torch.zeros(_HEAD + RECENT * _ENTRY, each, dtype=torch.float64, device=device)
        """What the host reads at logged steps, (rows, members): _STEP .. _SKIPPED, then the newest entry first."""
        self._width = config.spike_window if config.spike_threshold else 0
        # (loss or norm, members, width), oldest first; infinite where there is nothing yet, which sorts last.
        self._window = torch.full((2, each, self._width), torch.inf, dtype=torch.float64, device=device)
        self._told = [0] * each
        self.trips: list[Trip] = []
        """Who is over the limit, as of the last look."""
        self.first_bad: int | None = None
        """First of the bad steps that the run is in the middle of, as of the last look; None where it isn't."""

    @torch.no_grad()
    def judge(self, loss_sum: Tensor, grad_norm: Tensor, num_tokens: Tensor, own_finite: Tensor) -> Tensor:
        """Return 1.0 where the update must not be applied, else 0.0; each () or (members,), on the device.

        `own_finite` says whether this rank's own part of the loss is finite. Collective over all ranks. A step without
        a target is not applied, and neither good nor bad.
        """
        loss = loss_sum.double().view(-1) / num_tokens.view(-1).clamp(min=1)
        raw = torch.stack([loss, grad_norm.to(loss).view(-1)])
        values, rank = self._agree(raw, own_finite.view(-1))
        bad = (values == torch.inf).any(dim=0)
        if self._width:
            bad |= self._spikes(values)
        step, streak, first, skipped = self.memory[:_HEAD].unbind()
        going = (num_tokens.view(-1) > 0) & (streak <= self._limit)
        bad &= going
        step += 1
        streak.copy_(torch.where(going, (streak + 1) * bad, streak))
        first.copy_(torch.where(bad & (streak == 1), step, first))
        skipped += bad
        recent, told = self.memory[_HEAD:], torch.where(raw.isfinite(), values, raw)
        recent.copy_(torch.where(bad, torch.cat([step[None], told, rank[None], recent[:-_ENTRY]]), recent))
        good = going & ~bad
        if self._width:
            moved = torch.cat([self._window[..., 1:], values[..., None]], dim=-1)
            self._window = torch.where(good[:, None], moved, self._window)
        return (~good).to(torch.float32).view(loss_sum.shape)

    def _agree(self, raw: Tensor, own_finite: Tensor) -> tuple[Tensor, Tensor]:
        """The largest value of any rank, infinite where one has no finite one, and the lowest rank to blame."""
        blame = torch.where(own_finite, _NOBODY, float(self._ranks - 1 - self._index))
        seen = torch.cat([raw.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf), blame[None].to(raw)])
        if self._ranks > 1:
            dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        return seen[:2], seen[2]

    def _spikes(self, values: Tensor) -> Tensor:
        """Find the members whose loss or norm lies too far above the median of a window that is half filled."""
        filled = (self._window[0] < torch.inf).sum(dim=-1)
        middle = _median(self._window, filled)
        deviation = 1.4826 * _median((self._window - middle[..., None]).abs(), filled)
        deviation = torch.maximum(deviation, FLOOR * middle.abs())
        # Nothing but zeros says nothing about what is large.
        above = (deviation > 0) & (values > middle + self._threshold * deviation)
        return above.any(dim=0) & (2 * filled >= self._width)

    def read(self) -> list[Skipped]:
        """Look now; waits for the device."""
        return self.take(self.memory.tolist())

    def take(self, rows: Sequence[Sequence[float]]) -> list[Skipped]:
        """Take what was read of `memory`; return the steps skipped since the last time, oldest first."""
        fresh, self.trips, self.first_bad = [], [], None
        for member, column in enumerate(zip(*rows, strict=True)):
            streak, first, total = (int(column[row]) for row in (_STREAK, _FIRST, _SKIPPED))
            count = total - self._told[member]
            self._told[member] = total
            entries = [self._skipped(member, column[begin:]) for begin in range(_HEAD, len(column), _ENTRY)]
            newest = entries[:count]
            if count > RECENT:
                newest[-1] = replace(newest[-1], forgotten=count - RECENT)
            fresh += newest
            if streak:
                self.first_bad = min(first, self.first_bad or first)
            if streak > self._limit:  # frozen since: the newest entry is the step that tripped it
                self.trips.append(Trip(first, entries[0]))
        return sorted(fresh, key=lambda one: one.step)

    def _skipped(self, member: int, entry: Sequence[float]) -> Skipped:
        step, loss, norm, rank = entry[:_ENTRY]
        culprit = None if rank == _NOBODY else self._ranks - 1 - int(rank)
        return Skipped(member=member, step=int(step), loss=loss, grad_norm=norm, rank=culprit)

    def state(self) -> dict[str, Any]:
        """Return the memory as JSON, each a list over the members; waits for the device."""
        names = {"streak": _STREAK, "first": _FIRST, "skipped": _SKIPPED}
        head = {name: [int(value) for value in self.memory[row].tolist()] for name, row in names.items()}
        losses, norms = self._window.tolist()
        return head | {"losses": _filled(losses), "grad_norms": _filled(norms)}

    def load(self, state: dict[str, Any], step: int) -> None:
        """Take the memory that a checkpoint of `step` has; start anew where it has none."""
        memory = torch.zeros_like(self.memory, device="cpu")
        window = torch.full_like(self._window, torch.inf, device="cpu")
        memory[_STEP] = step
        if state:
            for row, name in ((_STREAK, "streak"), (_FIRST, "first"), (_SKIPPED, "skipped")):
                memory[row] = torch.tensor(state[name], dtype=torch.float64)
            # What was not too many then isn't now, under a limit that was lowered since: the next one is.
            memory[_STREAK].clamp_(max=self._limit)
            for kind, name in enumerate(("losses", "grad_norms")):
                for member, values in enumerate(state[name]):
                    newest = values[len(values) - min(len(values), self._width) :]
                    window[kind, member, self._width - len(newest) :] = torch.tensor(newest, dtype=torch.float64)
        self.memory.copy_(memory)
        self._window.copy_(window)
        self._told = [int(value) for value in memory[_SKIPPED].tolist()]
        self.trips, self.first_bad = [], None


def _median(values: Tensor, filled: Tensor) -> Tensor:
    """Median of the `filled` smallest along the last dim; torch.median has no deterministic form on CUDA."""
    ordered = values.sort(dim=-1).values
    low, high = ((filled - 1) // 2).clamp(min=0), (filled // 2).clamp(max=values.shape[-1] - 1)
    picked = [ordered.gather(-1, index.expand(ordered.shape[:-1])[..., None]) for index in (low, high)]
    return ((picked[0] + picked[1]) / 2).squeeze(-1)


def _filled(windows: list[list[float]]) -> list[list[float]]:
    return [[value for value in one if value < math.inf] for one in windows]
