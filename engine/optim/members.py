"""An optimizer for each of several adapters that are trained at once, seen as one.

Each updates its own member's parameters by its own learning rate, and leaves them and their state alone where the
member's own step was skipped; the others go on.
"""

from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, Any]


class _States(MutableMapping[Tensor, State]):
    """What each optimizer keeps, by parameter; only those that have some are listed."""

    def __init__(self, owners: dict[Tensor, torch.optim.Optimizer]) -> None:
        self._owners = owners

    def __getitem__(self, parameter: Tensor) -> State:
        kept = self._owners[parameter].state
        if parameter not in kept:  # a look would make an empty one
            raise KeyError(parameter)
        return kept[parameter]

    def __setitem__(self, parameter: Tensor, state: State) -> None:
        self._owners[parameter].state[parameter] = state

    def __delitem__(self, parameter: Tensor) -> None:
        del self._owners[parameter].state[parameter]

    def __iter__(self) -> Iterator[Tensor]:
        return (parameter for parameter, owner in self._owners.items() if parameter in owner.state)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class MemberOptimizer(torch.optim.Optimizer):
    """The members' optimizers behind one list of groups and one state; `found_inf` is (members,)."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], lr_ratios: Sequence[float]) -> None:
        """Take an optimizer for each member, and its learning rate relative to what set_lr will be told."""
        # torch would copy the groups: they must stay those that each optimizer reads.
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        super().__init__([{"params": [parameter for group in groups for parameter in group["params"]]}], {})
        self.param_groups = groups
        self._optimizers = list(optimizers)
        self.parameters: list[list[nn.Parameter]] = [
            [parameter for group in optimizer.param_groups for parameter in group["params"]] for optimizer in optimizers
        ]
        """Those of each member."""
        each = zip(optimizers, self.parameters, strict=True)
        self.state = _States({p: optimizer for optimizer, held in each for p in held})  # pyright: ignore
        for optimizer, ratio in zip(optimizers, lr_ratios, strict=True):
            for group in optimizer.param_groups:
                group["lr_ratio"] = ratio * group.get("lr_ratio", 1.0)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse: it would part the members' state; checkpoints write into `state` (engine/checkpoint/state.py)."""
        raise NotImplementedError("the members' state is loaded by engine/checkpoint/state.py")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every member."""
        assert closure is None, "the train step computes the loss, not the optimizer"
        found_inf = getattr(self, "found_inf", None)
        for index, optimizer in enumerate(self._optimizers):
            if found_inf is not None:
                optimizer.found_inf = found_inf[index]  # pyright: ignore[reportAttributeAccessIssue]
            optimizer.step()
