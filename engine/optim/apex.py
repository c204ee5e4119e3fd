"""AdamW by the kernel of NVIDIA's apex (apex.optimizers.FusedAdam), where that is installed; CUDA only.

Apex's own class counts steps in its groups, where no checkpoint sees them, takes no DTensor, and can't be told on the
device to skip a step. Its kernel can do all of that: this class calls the kernel on each rank's part and keeps the
state as torch's AdamW does. No test machine has a build of apex, so before its first use the kernel is held against
torch's AdamW, and refused where the two differ. The package called apex on PyPI is another project.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from configs.errors import ConfigError, problem
from engine.optim.shards import gradient_of, local_part, skip_flag

_BUILD = (
    "Build NVIDIA's: git clone https://github.com/NVIDIA/apex && cd apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install"
    " -v --no-build-isolation . (PyPI's apex is another project), or use 'adamw'."
)
_DECOUPLED, _CORRECTED = 1, 1  # the kernel's switches: AdamW, not Adam with L2; bias correction
Kernel = Callable[..., None]


class ApexAdamW(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) with one kernel launch over many parameters."""

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float, prove: bool = True
    ) -> None:
        """Take parameter groups, each with its weight_decay; raise ConfigError without a kernel that can be trusted."""
        # "capturable" also tells engine/checkpoint that `step` lives on the device.
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "capturable": True})
        first = self.param_groups[0]["params"][0]
        self._kernel = find_kernel(first.device)
        if prove:
            _prove(first.device, first.dtype)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        assert closure is None, "the train step computes the loss, not the optimizer"
        for group in self.param_groups:
            by_dtype: dict[torch.dtype, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_dtype.setdefault(parameter.dtype, []).append(parameter)
            for parameters in by_dtype.values():
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        device = parameters[0].device
        for parameter in parameters:
            if not self.state[parameter]:
                step = torch.zeros((), dtype=torch.float32, device=device)
                moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                self.state[parameter] = {"step": step, **moments}
        states = [self.state[parameter] for parameter in parameters]
        skip = skip_flag(self, device)
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, (~skip).float())
        lists = [
            [local_part(gradient_of(parameter)) for parameter in parameters],
            [local_part(parameter.detach()) for parameter in parameters],
            [local_part(state["exp_avg"]) for state in states],
            [local_part(state["exp_avg_sq"]) for state in states],
        ]
        held = [index for index, weight in enumerate(lists[1]) if weight.numel()]
        if not held:
            return
        (beta1, beta2), one = group["betas"], torch.ones(1, device=device)
        self._kernel(
            skip.to(torch.int32).reshape(1),
            [[tensors[index] for index in held] for tensors in lists],
            one * group["lr"], beta1, beta2, group["eps"], steps[0].to(torch.int32).reshape(1),
            _DECOUPLED, _CORRECTED, group["weight_decay"], one,
        )  # fmt: skip


def find_kernel(device: torch.device) -> Kernel:
    """Return apex's AdamW kernel, the one that reads its flags on the device; raise ConfigError where there is none."""
    if device.type != "cuda":
        raise ConfigError(problem("optim.kind", "apex", f"needs CUDA devices, not {device.type}", do="Use 'adamw'."))
    try:
        launcher = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
        kernel = importlib.import_module("amp_C").multi_tensor_adam_capturable
    except (ImportError, AttributeError) as error:
        raise ConfigError(problem("optim.kind", "apex", "NVIDIA's apex is not installed", "", _BUILD)) from error
    return lambda *arguments: launcher(kernel, *arguments)


def _prove(device: torch.device, dtype: torch.dtype) -> None:
    """Hold three steps, the second of them skipped, against torch's AdamW."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(300, generator=generator).to(device, dtype)
    ours, theirs = torch.nn.Parameter(weights.clone()), torch.nn.Parameter(weights.clone())
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    groups = [{"params": [ours], "weight_decay": 0.1}]
    mine = ApexAdamW(groups, **settings, prove=False)
    truth = torch.optim.AdamW([theirs], weight_decay=0.1, fused=True, **settings)
    try:
        for skipped in (0.0, 1.0, 0.0):
            grad = torch.randn(300, generator=generator).to(device, dtype)
            for optimizer, parameter in ((mine, ours), (truth, theirs)):
                parameter.grad = grad * torch.nan if skipped else grad.clone()
                optimizer.found_inf = torch.tensor(skipped, device=device)  # pyright: ignore[reportAttributeAccessIssue]
                optimizer.step()
        error = ((ours - theirs).norm() / (theirs - weights).norm()).item()
        found = f"its update differs from AdamW's by {error:.1e}"
    except (TypeError, RuntimeError) as caught:
        error, found = torch.inf, f"its kernel fails: {caught}"
    if not error < 1e-3 * (1 if dtype != torch.bfloat16 else 100):
        raise ConfigError(problem("optim.kind", "apex", "this build of apex can't be used", found, "Use 'adamw'."))
