"""The one ordered recipe from a config to a model that is laid out over the mesh."""

import torch

from configs.schema import Config
from models.attention import Backend
from models.llama import Llama
from parallel.fsdp import DTYPES, shard
from parallel.materialise import Fill, materialise
from parallel.mesh import Layout


def build_model(config: Config, layout: Layout, fill: Fill) -> Llama:
    """Build, lay out, allocate and fill the model; `config` is resolved."""
    # On the meta device: no rank ever holds the whole model. Masters are what the parameters are; FSDP casts them.
    with torch.device("meta"):
        model = Llama(config.model, attention_backend(config, layout.device)).to(DTYPES[config.precision.master])
    blocks = list(model.layers.values())
    # Before FSDP, so that its gathering stays outside of the graph and one graph serves all blocks.
    if config.compile.blocks:
        for block in blocks:
            # Static: an evaluation of fewer sequences would otherwise make the training's graph one of any batch.
            block.compile(fullgraph=True, dynamic=False)
    shard(model, blocks, layout.shards, config.parallel, config.precision)
    # After sharding, so that a rank allocates and draws its shards only.
    materialise(model, layout.device, fill)
    return model


def attention_backend(config: Config, device: torch.device) -> Backend:
    """Choose the kernel for `model.attention = auto`: blocks win on CPUs once compiled, and lose to SDPA before."""
    if config.model.attention != "auto":
        return config.model.attention
    return "blocked" if device.type == "cpu" and config.compile.blocks else "sdpa"
