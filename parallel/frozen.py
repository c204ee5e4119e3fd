"""What is frozen stays cheap, and what is trained is what was asked for.

Frozen parameters are held in the format they are computed in, never as masters; their gradients, moments and reductions
don't exist, since nothing asks for them. Under a replicated base they are no FSDP parameters at all.
"""

from collections.abc import Sequence

import torch
from torch import nn

from models.adapters.lora import SITE, site_numbers


def hold_formats(model: nn.Module, frozen: torch.dtype, trained: torch.dtype) -> None:
    """Hold a model's parameters, on the meta device, in the format of their kind; codes stay what they are."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(trained if parameter.requires_grad else frozen)


def frozen_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters without gradients."""
    return {parameter for parameter in model.parameters() if not parameter.requires_grad}


def trained_names(model: nn.Module) -> set[str]:
    """Return the names of the parameters with gradients."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def fill_sites(model: nn.Module, seeds: Sequence[int]) -> None:
    """Give each projection the numbers that its dropout is drawn with, one for each member's seed; in place."""
    for name, module in model.named_modules(remove_duplicate=False):
        site = getattr(module, SITE, None)
        # A stage's own name would stand before the module's.
        if site is not None and not name.startswith("stages."):
            site.copy_(site_numbers(seeds, name))
