"""The one ordered recipe from a config to a model that is laid out over the mesh."""

from typing import cast

import torch
from torch import nn

from configs.errors import ConfigError, problem
from configs.schema import Config
from models.adapters import attach
from models.attention import Backend, why_not
from models.llama import Block, Llama
from models.quantized import quantize_frozen
from parallel.context import context_attention
from parallel.float8 import has_float8, use_float8
from parallel.frozen import fill_sites, frozen_parameters, hold_formats, trained_names
from parallel.fsdp import DTYPES, parameter_device, shard
from parallel.materialise import Fill, materialise
from parallel.mesh import Layout
from parallel.pipeline import join_stages, split_stages
from parallel.recompute import recompute
from parallel.tensor import enable_async_tp, split_tensors


def build_model(config: Config, layout: Layout, fill: Fill) -> nn.Module:
    """Build, lay out, allocate and fill the model, or this rank's stages of it; `config` is resolved."""
    # On the meta device: no rank ever holds the whole model. Masters are what the parameters are; FSDP casts them.
    with torch.device("meta"):
        model = Llama(config.model, attention_backend(config, layout.device)).to(DTYPES[config.precision.master])
    # Layers first: what follows is done to the layers that are here.
    stages = split_stages(model, config.parallel, config.data.seq_len, layout.index("pp"))
    for stage in stages:
        _lay_out(stage, config, layout)
    if config.parallel.async_tp:
        enable_async_tp(layout.tp)
    whole = join_stages(stages)
    # After sharding, so that a rank allocates and draws its shards only.
    materialise(whole, parameter_device(config.parallel, layout.device), fill)
    members = [member.seed for member in config.adapter.members] or [-1]
    fill_sites(whole, [config.run.seed if seed < 0 else seed for seed in members])
    return whole


def _lay_out(stage: Llama, config: Config, layout: Layout) -> None:
    """Lay one stage out over the other axes, in place."""
    blocks = list(stage.layers.values())
    # First, so that adapters and codes are laid out as parts of the modules that they sit on.
    with torch.device("meta"):
        attach(stage, config.adapter)
    hold_formats(stage, DTYPES[config.precision.compute], DTYPES[config.precision.master])
    with torch.device("meta"):
        quantize_frozen(stage, config.adapter.quantization)
    trained = trained_names(stage)
    # Before all that follows, as it puts other modules in the place of the blocks' linear ones.
    use_float8(blocks, config.precision.float8, emulate=not has_float8(layout.device))
    # Before FSDP, which shards what is left of each matrix.
    if config.parallel.tp > 1:
        split_tensors(stage, layout.tp)
    # Within a block and inside of what is recomputed: gathered keys and values are not kept for the backward.
    if config.parallel.cp > 1:
        for block in blocks:
            attention = cast(Block, block).self_attn
            attention.attend = context_attention(attention.attend, layout.mesh["cp"])
    # Inside of the graph, so that the compiler sees what is computed twice.
    recompute(blocks, config.recompute)
    # Before FSDP, so that its gathering stays outside of the graph and one graph serves all blocks.
    if config.compile.blocks:
        for block in blocks:
            # Static: an evaluation of fewer sequences would otherwise make the training's graph one of any batch.
            block.compile(fullgraph=True, dynamic=False)
    replicated = frozen_parameters(stage) if config.adapter.base == "replicated" else None
    shard(stage, blocks, layout.shards, config.parallel, config.precision, replicated)
    # Making matrices distributed ones has thawed them in other engines.
    assert trained_names(stage) == trained, f"laying out changed what is trained: {trained ^ trained_names(stage)}"


def attention_backend(config: Config, device: torch.device) -> Backend:
    """Choose the kernel for `model.attention = auto`; raise ConfigError for one that does not run here."""
    chosen = config.model.attention
    if chosen == "auto":
        if device.type == "cuda":
            return "flex" if config.data.document_mask else "sdpa"
        # Blocks win on CPUs once compiled, and lose to SDPA before.
        return "blocked" if config.compile.blocks else "sdpa"
    why = why_not(chosen, device.type, DTYPES[config.precision.compute])
    if why:
        do = "Use 'auto', 'sdpa' or 'blocked'."
        raise ConfigError(problem("model.attention", chosen, f"does not run on {device.type} here", why, do))
    return chosen
