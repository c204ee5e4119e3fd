"""What is trained beside a frozen model, a leaf for each kind; `attach` chooses.

An adapter sits on the modules that it changes: a projection computes with what is beside it (models/linear.py). It is
attached to a model, or a pipeline's stage, on the meta device, before anything is laid out, so that the layout sees it
as part of its module. Its parameters are named as PEFT names them. Leaves don't know each other.
"""

from collections.abc import Callable

import torch
from torch import nn

from configs.adapters import AdapterConfig
from configs.schema import ModelConfig
from configs.targets import adapted_modules, trained_parameters
from models.adapters.bottleneck import attach_bottleneck
from models.adapters.lora import attach_lora
from models.adapters.virtual import attach_prefix, attach_prompt
from models.llama import Llama

Modules = dict[str, nn.Module]


def attach(model: Llama, config: AdapterConfig) -> None:
    """Freeze a model, or a stage of it, but for what the kind trains, and put the adapter's parameters in; in place."""
    if config.kind == "none":
        return
    trained = set(trained_parameters(model.config, config))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    if config.kind in _ATTACH:
        _ATTACH[config.kind](dict(model.named_modules()), model, config)


def trained_shapes(model: ModelConfig, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Give the whole shape of each trained parameter of a resolved config, in the model's order."""
    with torch.device("meta"):
        whole = Llama(model)
        attach(whole, config)
    return {name: tuple(parameter.shape) for name, parameter in whole.named_parameters() if parameter.requires_grad}


def _lora(modules: Modules, model: Llama, config: AdapterConfig) -> None:
    members = [adapted_modules(model.config, config, member) for member in config.members]
    attach_lora(modules, members or [adapted_modules(model.config, config)], config)


_ATTACH: dict[str, Callable[[Modules, Llama, AdapterConfig], None]] = {
    "lora": _lora,
    "bottleneck": lambda modules, model, config: attach_bottleneck(modules, config.bottleneck_dim),
    "prefix": lambda modules, model, config: attach_prefix(modules, config.num_virtual_tokens),
    "prompt": lambda modules, model, config: attach_prompt(modules, config.num_virtual_tokens),
}
"""bitfit and freeze train parameters of the base and add none."""
