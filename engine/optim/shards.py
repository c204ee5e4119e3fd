"""What an optimizer of ours sees of a parameter: this rank's part, a plain tensor that may be empty.

Updates by element need nothing of other ranks, and plain tensors take the flag of a skipped step, which is plain too.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part, sharing memory; call it without gradients."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradient_of(parameter: Tensor) -> Tensor:
    """Return the gradient, laid out like its parameter: without FSDP, tensor parallelism may leave partial sums."""
    grad = parameter.grad
    assert grad is not None, "a parameter without a gradient"
    if isinstance(grad, DTensor) and isinstance(parameter, DTensor) and grad.placements != parameter.placements:
        return grad.redistribute(placements=parameter.placements)
    return grad


def skip_flag(optimizer: torch.optim.Optimizer, device: torch.device) -> Tensor:
    """Return a bool on the device: true where the coming step must change nothing."""
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is None:
        return torch.zeros((), dtype=torch.bool, device=device)
    return found_inf.to(device, non_blocking=True).reshape(()) != 0


def scalar_unless(skip: Tensor, value: float, otherwise: float, dtype: torch.dtype) -> Tensor:
    """Return a 0-dim tensor of `value`, or of `otherwise` where the step is skipped; the device decides."""
    chosen = torch.full((), value, dtype=dtype, device=skip.device)
    return chosen.masked_fill_(skip, otherwise)
