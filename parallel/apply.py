"""The one ordered recipe from a config to a model that is laid out over the mesh."""

import torch
from torch import nn

from configs.schema import Config
from models.attention import Backend
from models.llama import Block, Llama
from parallel.context import context_attention
from parallel.fsdp import DTYPES, shard
from parallel.materialise import Fill, materialise
from parallel.mesh import Layout
from parallel.pipeline import join_stages, split_stages
from parallel.recompute import recompute
from parallel.tensor import split_tensors


def build_model(config: Config, layout: Layout, fill: Fill) -> nn.Module:
    """Build, lay out, allocate and fill the model, or this rank's stages of it; `config` is resolved."""
    # On the meta device: no rank ever holds the whole model. Masters are what the parameters are; FSDP casts them.
    with torch.device("meta"):
        model = Llama(config.model, attention_backend(config, layout.device)).to(DTYPES[config.precision.master])
    # Layers first: what follows is done to the layers that are here.
    stages = split_stages(model, config.parallel, config.data.seq_len, layout.index("pp"))
    for stage in stages:
        _lay_out(stage, config, layout)
    whole = join_stages(stages)
    # After sharding, so that a rank allocates and draws its shards only.
    materialise(whole, layout.device, fill)
    return whole


def _lay_out(stage: Llama, config: Config, layout: Layout) -> None:
    """Lay one stage out over the other axes, in place."""
    blocks: list[Block] = list(stage.layers.values())  # pyright: ignore[reportAssignmentType]
    # Matrices before FSDP, which shards what is left of each.
    if config.parallel.tp > 1:
        split_tensors(stage, layout.tp)
    # Within a block and inside of what is recomputed: gathered keys and values are not kept for the backward.
    if config.parallel.cp > 1:
        for block in blocks:
            block.self_attn.attend = context_attention(block.self_attn.attend, layout.mesh["cp"])
    # Inside of the graph, so that the compiler sees what is computed twice.
    recompute(blocks, config.recompute)
    # Before FSDP, so that its gathering stays outside of the graph and one graph serves all blocks.
    if config.compile.blocks:
        for block in blocks:
            # Static: an evaluation of fewer sequences would otherwise make the training's graph one of any batch.
            block.compile(fullgraph=True, dynamic=False)
    shard(stage, blocks, layout.shards, config.parallel, config.precision)


def attention_backend(config: Config, device: torch.device) -> Backend:
    """Choose the kernel for `model.attention = auto`: blocks win on CPUs once compiled, and lose to SDPA before."""
    if config.model.attention != "auto":
        return config.model.attention
    return "blocked" if device.type == "cpu" and config.compile.blocks else "sdpa"
