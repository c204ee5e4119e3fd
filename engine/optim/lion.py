"""Lion: the sign of an interpolated momentum, with decoupled weight decay (arXiv:2302.06675, algorithm 2).

    update = sign(beta1 * m + (1 - beta1) * grad)
    weight = weight - lr * (update + weight_decay * weight)
    m      = beta2 * m + (1 - beta2) * grad

One state tensor where AdamW has two. Every weight moves by lr, so the paper's learning rates are 3 to 10 times smaller
than AdamW's, and its weight decay as many times larger.
"""

from typing import Any

import torch
from torch import Tensor

from engine.optim.shards import gradient_of, local_part, scalar_unless, skip_flag


class Lion(torch.optim.Optimizer):
    """Lion by element, on whatever part of a parameter this rank holds."""

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> None:
        """Take parameter groups, each with its weight_decay."""
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        assert closure is None, "the train step computes the loss, not the optimizer"
        for group in self.param_groups:
            # The kernels over lists want one device and one dtype.
            alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault((parameter.device, parameter.dtype), []).append(parameter)
            for parameters in alike.values():
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
        weights = [local_part(parameter.detach()) for parameter in parameters]
        moments = [local_part(self.state[parameter]["exp_avg"]) for parameter in parameters]
        (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
        skip, dtype = skip_flag(self, weights[0].device), weights[0].dtype
        # In a skipped step the momentum stands for the gradient, which may be NaN: interpolating the two is exact.
        grads = [
            torch.where(skip, moment, local_part(gradient_of(parameter)))
            for moment, parameter in zip(moments, parameters, strict=True)
        ]
        updates = torch._foreach_lerp(moments, grads, 1 - beta1)
        torch._foreach_sign_(updates)
        torch._foreach_mul_(updates, scalar_unless(skip, -lr, 0.0, dtype))
        torch._foreach_mul_(weights, scalar_unless(skip, 1 - lr * decay, 1.0, dtype))
        torch._foreach_add_(weights, updates)
        torch._foreach_lerp_(moments, grads, 1 - beta2)
