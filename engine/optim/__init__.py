"""The optimizer over the trainable parameters, in an order that no layout changes; a file for each that torch lacks.

Weight decay pulls on what multiplies activations (every tensor of two or more dimensions, the embedding too) and not
on norms and biases, as in GPT-3 (arXiv:2005.14165) and Llama. The learning rate is set from outside at every step
(engine/lr.py), one for all groups, so an optimizer holds no schedule. Each of them leaves weights and state alone where
`optimizer.found_inf` is 1, without waiting for the device, and keeps in `state` only tensors: scalars, and tensors of
the parameter's shape laid out like it, so that any layout loads what another saved. A group's `state_keys` are what is
kept of each of its parameters once there was a step; a checkpoint without them is refused. Paged AdamW has none: it
keeps nothing before the first step that counts, and can't tell.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from configs.adapters import MemberConfig
from configs.errors import ConfigError, problem
from configs.schema import OptimConfig
from engine.optim.apex import ApexAdamW
from engine.optim.lion import Lion
from engine.optim.members import MemberOptimizer
from engine.optim.muon import Muon
from engine.optim.paged import PagedAdamW8bit
from models.peft_format import split_member

_FUSED_DEVICES = frozenset({"cuda", "cpu"})
_ADAM = ("step", "exp_avg", "exp_avg_sq")
UNHIDDEN = ("embed_tokens", "lm_head")
"""Modules whose matrices map tokens, not activations: Muon leaves them to AdamW (kellerjordan.github.io/posts/muon)."""
LORA_B = {"lora_B", "lora_embedding_B"}
"""Parts of the names of what LoRA+ trains faster (arXiv:2402.12354, section 5)."""
STATE_TENSORS = {"adamw": (2, 2), "muon": (1, 2), "lion": (1, 1), "apex": (2, 2), "paged_adamw_8bit": (0, 0)}
"""Tensors of a parameter's shape and dtype that are kept for each hidden matrix, and for each other parameter; not
bytes, which may be paged out to the host."""


@dataclass(frozen=True, slots=True)
class _Trainable:
    """The parameters that require gradients, sorted by name."""

    hidden: list[nn.Parameter]
    """Matrices between activations."""
    decayed: list[nn.Parameter]
    """Hidden matrices and all other parameters of two or more dimensions."""
    undecayed: list[nn.Parameter]
    """Norms and biases."""
    faster: frozenset[int]
    """Ids of LoRA's B, whose learning rate is `ratio` times the others' (LoRA+)."""
    ratio: float

    def groups(
        self, weight_decay: float, state_keys: Sequence[str], without: Sequence[nn.Parameter] = ()
    ) -> list[dict[str, object]]:
        """Make the parameter groups; none is empty."""
        left_out = {id(parameter) for parameter in without}
        decayed = [parameter for parameter in self.decayed if id(parameter) not in left_out]
        faster = [parameter for parameter in decayed if id(parameter) in self.faster]
        groups = [
            {"params": [p for p in decayed if id(p) not in self.faster], "weight_decay": weight_decay},
            {"params": faster, "weight_decay": weight_decay, "lr_ratio": self.ratio},
            {"params": self.undecayed, "weight_decay": 0.0},
        ]
        return [{**group, "state_keys": state_keys} for group in groups if group["params"]]

    @property
    def fused(self) -> bool:
        """Say whether torch has a fused AdamW for all of them."""
        return all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in self.decayed + self.undecayed)


def build_optimizer(
    model: nn.Module,
    config: OptimConfig,
    lora_plus_ratio: float = 1.0,
    members: Sequence[MemberConfig] = (),
    *,
    stage: bool = False,
) -> torch.optim.Optimizer:
    """Build the optimizer of the parameters that require gradients; raise ConfigError where there are none.

    Build it after sharding: its state takes each parameter's type, placement and dtype. A tied weight counts once. Of
    several members each has an optimizer of its own. A `stage` of a pipeline may train nothing, others do.
    """
    named = sorted((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    if not named and not stage:
        raise ConfigError("optim: no parameter of the model is trainable. Unfreeze some, or add an adapter.")
    unhidden = frozenset(id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding))
    if not members:
        return _build(named, unhidden, config, lora_plus_ratio)
    owners = {name: split_member(name, [member.name for member in members])[1] for name, _ in named}
    parts = [[(name, p) for name, p in named if owners[name] == member.name] for member in members]
    assert sum(map(len, parts)) == len(named), "every trained parameter is of one member"
    optimizers = [_build(part, unhidden, config, lora_plus_ratio) for part in parts]
    return MemberOptimizer(optimizers, [(member.lr or config.lr) / config.lr for member in members])


def _build(
    named: Sequence[tuple[str, nn.Parameter]], unhidden: frozenset[int], config: OptimConfig, lora_plus_ratio: float
) -> torch.optim.Optimizer:
    if not named:
        return torch.optim.AdamW([{"params": []}], lr=config.lr)
    trainable = _Trainable(
        hidden=[p for name, p in named if p.ndim == 2 and id(p) not in unhidden and not _is_unhidden(name)],
        decayed=[p for _, p in named if p.ndim >= 2],
        undecayed=[p for _, p in named if p.ndim < 2],
        faster=frozenset(id(p) for name, p in named if lora_plus_ratio != 1.0 and LORA_B & set(name.split("."))),
        ratio=lora_plus_ratio,
    )
    assert config.kind in _BUILDERS, f"optim.kind = {config.kind!r} is refused by configs/check.py"
    return _BUILDERS[config.kind](trainable, config)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next step, for every group; a group may have it multiplied."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)


def _is_unhidden(name: str) -> bool:
    return any(part in UNHIDDEN for part in name.split("."))


def _adamw(trainable: _Trainable, config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        trainable.groups(config.weight_decay, _ADAM),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=trainable.fused,
    )


def _muon(trainable: _Trainable, config: OptimConfig) -> torch.optim.Optimizer:
    if not trainable.hidden:
        raise ConfigError(
            problem("optim.kind", "muon", "needs a trainable matrix besides embedding and head", do="Use 'adamw'.")
        )
    rest = trainable.groups(config.weight_decay, _ADAM, without=trainable.hidden)
    betas, eps = (config.beta1, config.beta2), config.eps
    return Muon(
        trainable.hidden,
        torch.optim.AdamW(rest, lr=config.lr, betas=betas, eps=eps, fused=trainable.fused) if rest else None,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )


def _lion(trainable: _Trainable, config: OptimConfig) -> torch.optim.Optimizer:
    return Lion(trainable.groups(config.weight_decay, ("exp_avg",)), lr=config.lr, betas=(config.beta1, config.beta2))


def _apex(trainable: _Trainable, config: OptimConfig) -> torch.optim.Optimizer:
    groups, betas = trainable.groups(config.weight_decay, _ADAM), (config.beta1, config.beta2)
    return ApexAdamW(groups, lr=config.lr, betas=betas, eps=config.eps)


def _paged(trainable: _Trainable, config: OptimConfig) -> torch.optim.Optimizer:
    # It has no state before a step that is not skipped.
    groups, betas = trainable.groups(config.weight_decay, ()), (config.beta1, config.beta2)
    return PagedAdamW8bit(groups, lr=config.lr, betas=betas, eps=config.eps)


_BUILDERS: dict[str, Callable[[_Trainable, OptimConfig], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "muon": _muon,
    "lion": _lion,
    "apex": _apex,
    "paged_adamw_8bit": _paged,
}
