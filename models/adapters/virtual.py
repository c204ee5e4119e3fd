"""Virtual tokens: learned vectors at positions that the data leaves free before each sequence or document.

prompt   the embeddings of these positions (arXiv:2104.08691)
prefix   the keys, after their rotation, and values of these positions in every layer (arXiv:2101.00190)

The positions are ordinary ones for all else, so every layout, attention kernel and document mask serves them; what the
layers compute at them is overwritten or read by nobody but other virtual tokens.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.linear import OUT, Embedding, Linear, Marks, look_up

PROMPT = "prompt_embeddings"
PREFIX = "prefix_tokens"
PLACES = ("self_attn.k_proj", "self_attn.v_proj")


def attach_prompt(modules: Mapping[str, nn.Module], count: int) -> None:
    """Put `count` learned embeddings beside the stage's embedding, if it has one."""
    embedding = modules.get("embed_tokens")
    if isinstance(embedding, Embedding):
        embedding.register_parameter(PROMPT, nn.Parameter(torch.empty(count, embedding.embedding_dim)))
        embedding.sides[PROMPT] = (None, OUT)
        embedding.beside = prompt


def attach_prefix(modules: Mapping[str, nn.Module], count: int) -> None:
    """Put `count` learned keys and values into each layer."""
    for name, module in modules.items():
        if name.endswith(PLACES) and isinstance(module, Linear):
            module.register_parameter(PREFIX, nn.Parameter(torch.empty(count, module.out_features)))
            module.sides[PREFIX] = (None, OUT)
            module.replaced = prefix


def prompt(embedding: Embedding, tokens: Tensor, marks: Marks | None, found: Tensor) -> Tensor:
    """Return the embeddings with the learned ones in their places."""
    if marks is None or marks.virtual is None:
        return found
    learned = look_up(embedding.held(getattr(embedding, PROMPT)), marks.virtual.clamp(min=0))
    return torch.where(marks.virtual[..., None] >= 0, embedding.once(learned), found)


def prefix(
    linear: Linear, heads: Float[Tensor, "batch heads seq head_dim"], marks: Marks | None
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Return the keys, or values, with the learned ones in their places."""
    if marks is None or marks.virtual is None:
        return heads
    table = linear.outputs(linear.held(getattr(linear, PREFIX)).T).T
    learned = look_up(table, marks.virtual.clamp(min=0))
    learned = learned.view(*learned.shape[:2], -1, heads.shape[-1]).transpose(1, 2)
    return torch.where(marks.virtual[:, None, :, None] >= 0, learned, heads)
