"""A base and what was trained beside it as one model: tensor by tensor, in fp32, cast once at the end.

    W' = W + s B A            W' = m / |W + s B A| (W + s B A) under DoRA

A base is only ever read, so nothing has to be unmerged: subtraction would not give it back. Prompts, prefixes and
bottlenecks have no place in a base's weights.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from configs.adapters import AdapterConfig
from configs.errors import CheckpointError, problem
from configs.schema import ModelConfig
from configs.targets import EMBEDDING, HEAD, adapted_modules, parameter_names, trained_parameters
from models.adapters.lora import lora_scale
from models.hf_weights import Reader

MERGED_KINDS = ("lora", "bitfit", "freeze")


def merged_config(model: ModelConfig, adapter: AdapterConfig) -> ModelConfig:
    """Give the model that a merge makes: embedding and head part where an adapter changes one of them."""
    changed = {EMBEDDING, HEAD} & adapted_modules(model, adapter).keys()
    return replace(model, tie_embeddings=False) if changed else model


def merged_tensors(
    model: ModelConfig, adapter: AdapterConfig, base: Reader, trained: Reader
) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter of merged_config, in the model's order: fp32 where something was added, else as it is.

    `model` is the base's config, and the adapter is alone. Raises CheckpointError for a kind that can't be merged.
    """
    if adapter.kind not in MERGED_KINDS:
        expected, why = "can't be merged", "what it adds is no part of a weight of the base"
        raise CheckpointError(problem("adapter.kind", adapter.kind, expected, why, "Export it, or keep the run."))
    modules = adapted_modules(model, adapter)
    own = set(trained_parameters(model, adapter))
    for name in parameter_names(merged_config(model, adapter)):
        module, _, last = name.rpartition(".")
        stored = f"{EMBEDDING}.weight" if module == HEAD and model.tie_embeddings else name
        if module in modules and last == "weight":
            scale = lora_scale(*modules[module], adapter)
            yield name, _merged(base.read(stored), module, scale, adapter.dora, trained)
        else:
            yield name, (trained if name in own else base).read(stored)


def _merged(weight: Tensor, module: str, scale: float, dora: bool, trained: Reader) -> Tensor:
    if module == EMBEDDING:
        a, b = trained.read(f"{module}.lora_embedding_A"), trained.read(f"{module}.lora_embedding_B")
        return merge_lora(weight.T, a, b, scale).T
    a, b = trained.read(f"{module}.lora_A.weight"), trained.read(f"{module}.lora_B.weight")
    return merge_lora(weight, a, b, scale, trained.read(f"{module}.lora_magnitude_vector") if dora else None)


def merge_lora(
    weight: Float[Tensor, "out in"],
    a: Float[Tensor, "rank in"],
    b: Float[Tensor, "out rank"],
    scale: float,
    magnitude: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "out in"]:
    """Return a weight with LoRA's product in it, in at least fp32."""
    precise = torch.promote_types(weight.dtype, torch.float32)
    whole = torch.addmm(weight.to(precise), b.to(precise), a.to(precise), alpha=scale)
    if magnitude is None:
        return whole
    return whole * (magnitude.to(precise) / torch.linalg.vector_norm(whole, dim=1))[:, None]
