"""AdamW with moments in 8 bits (arXiv:2110.02861) that move to the host where a GPU is full, by bitsandbytes.

    a moment of 4,096 numbers or more: bytes, and a scale for 256 of them; a smaller one: fp32

This is its PagedAdamW8bit, handed plain tensors in the place of what FSDP wraps on one rank, with its state kept as
checkpoints want it: tensors only, without the tables of its number format, the count of steps among them. Its blocks
along a shard would make a run depend on the layout, so there is one rank only (configs/layout.py). It waits for the
device after each parameter, so a step that is to be skipped waits once to know. On CPUs nothing is paged.
"""

import importlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import ConfigError, problem
from engine.optim.shards import gradient_of, local_part, skip_flag

_KEPT = ("state1", "state2", "absmax1", "absmax2")


class PagedAdamW8bit(torch.optim.Optimizer):
    """bitsandbytes' optimizer under the contract of engine/optim/__init__.py but for the waiting."""

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        """Take parameter groups, each with its weight_decay; raise ConfigError without the package."""
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        plain = [
            {
                "params": [nn.Parameter(local_part(p.detach())) for p in group["params"]],
                "weight_decay": group["weight_decay"],
            }
            for group in self.param_groups
        ]
        self._theirs = _optimizer_class()(plain, lr=lr, betas=betas, eps=eps)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        assert closure is None, "the train step computes the loss, not the optimizer"
        pairs = []
        for index, (ours, theirs) in enumerate(zip(self.param_groups, self._theirs.param_groups, strict=True)):
            theirs["lr"] = ours["lr"]
            for place, (parameter, plain) in enumerate(zip(ours["params"], theirs["params"], strict=True)):
                plain.data, plain.grad = local_part(parameter.detach()), None
                if parameter.grad is not None:
                    plain.grad = local_part(gradient_of(parameter))
                    pairs.append((parameter, plain))
                    self._take_over(self.state.get(parameter, {}), plain, theirs, (index, place))
        if not pairs or skip_flag(self, pairs[0][1].device).item():
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")
            self._theirs.step()
        for parameter, plain in pairs:
            found = self._theirs.state[plain]
            count = torch.tensor(float(found["step"]))
            self.state[parameter] = {"step": count, **{key: found[key] for key in _KEPT if key in found}}

    def _take_over(
        self, state: dict[str, Tensor], plain: Tensor, group: dict[str, Any], place: tuple[int, int]
    ) -> None:
        """Give bitsandbytes what a checkpoint has left in our state, in memory of its own kind."""
        found = self._theirs.state[plain]
        if not state or found.get("state1") is state["state1"]:
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")
            self._theirs.init_state(group, plain, *place)
        found["step"] = int(state["step"])
        for key in _KEPT:
            if key in found:
                found[key].copy_(local_part(state[key]))


def _optimizer_class() -> Any:
    """Return bitsandbytes' class; raise ConfigError where it isn't installed."""
    try:
        return importlib.import_module("bitsandbytes").optim.PagedAdamW8bit
    except ImportError as error:
        do = "Install it with pip install -e '.[qlora]', or use 'adamw'."
        raise ConfigError(problem("optim.kind", "paged_adamw_8bit", "bitsandbytes is not installed", "", do)) from error
