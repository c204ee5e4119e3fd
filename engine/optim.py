"""The optimizer: AdamW over the trainable parameters, in an order that no layout changes.

Weight decay pulls on what multiplies activations (every tensor of two or more dimensions, the embedding too) and not
on norms and biases, as in GPT-3 (arXiv:2005.14165) and Llama. The learning rate is set from outside at every step
(engine/lr.py), so the optimizer holds no schedule.
"""

import torch
from torch import nn

from configs.errors import ConfigError
from configs.schema import OptimConfig

_FUSED_DEVICES = frozenset({"cuda", "cpu"})


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Build AdamW over the parameters that require gradients, sorted by name; raise ConfigError where there are none.

    Build it after sharding: its state takes each parameter's type, placement and dtype. A tied weight counts once.
    """
    trainable = sorted(
        ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad),
        key=lambda item: item[0],
    )
    if not trainable:
        raise ConfigError("optim: no parameter of the model is trainable. Unfreeze some, or add an adapter.")
    parameters = [parameter for _, parameter in trainable]
    decayed = [parameter for parameter in parameters if parameter.ndim >= 2]
    undecayed = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=all(
            parameter.device.type in _FUSED_DEVICES and parameter.is_floating_point() for parameter in parameters
        ),
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next step, for every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
