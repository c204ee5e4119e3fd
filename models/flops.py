"""Parameters and floating-point operations of a config, by arithmetic alone.

A multiplication and an addition are two operations; the backward pass costs twice the forward pass; recomputation,
norms, rotary positions, softmax and the embedding's look-up are not counted (they are what MFU leaves out). Two
conventions are in use for attention over S tokens, and a figure means nothing without saying which:

    full     6 N + 12 L H head_dim S   torchtitan, llm-foundry, Megatron-LM r0.8 (arXiv:2204.02311 appendix B)
    causal   6 N +  6 L H head_dim S   Megatron-Bridge, NeMo AutoModel: half the scores lie behind the mask

N counts the weights of matrix multiplications, the head included, whether or not it shares the embedding's. A frozen
weight has no gradient of its own: 4 N, as NeMo AutoModel counts LoRA; below the first layer that is trained there is no
backward pass: 2 N, and a third of attention. What an adapter adds is counted as trained weights.
"""

from collections.abc import Mapping
from math import prod

from configs.schema import ModelConfig


def num_params(config: ModelConfig) -> int:
    """Count all parameters of a resolved config; a tied embedding counts once."""
    embedding = config.vocab_size * config.dim
    norms = (2 * config.num_layers + 1) * config.dim
    head = 0 if config.tie_embeddings else embedding
    return embedding + norms + head + config.num_layers * (_block_weights(config) + _block_biases(config))


def num_matmul_params(config: ModelConfig) -> int:
    """Count the weights that a token is multiplied with: the projections and the head, not the embedding."""
    return config.num_layers * _block_weights(config) + config.vocab_size * config.dim


def flops_per_token(
    config: ModelConfig, seq_len: int, *, causal: bool, trained: Mapping[str, tuple[int, ...]] | None = None
) -> float:
    """FLOPs of forward and backward pass for one token of a sequence of `seq_len` tokens, in either convention.

    `trained` are the shapes of the only trained parameters by name; None trains all. Packed documents are counted as if
    attention ran over the whole sequence.
    """
    attention = 12.0 * config.num_heads * config.head_dim * seq_len / (2 if causal else 1)
    if trained is None:
        return 6.0 * num_matmul_params(config) + config.num_layers * attention
    # Whatever is not in a layer: an embedding is below all of them, the head and the last norm above.
    layers = [0 if name.startswith("embed") else _layer(name, config.num_layers) for name in trained]
    passed = config.num_layers - min(layers, default=config.num_layers)
    frozen = num_matmul_params(config)
    products = sum(prod(shape) for name, shape in trained.items() if _is_product(name, shape))
    added = sum(prod(shape) for name, shape in trained.items() if _is_product(name, shape) and _is_added(name))
    forward = 2.0 * (frozen + added) + config.num_layers * attention / 3
    inputs = 2.0 * (passed * _block_weights(config) + config.vocab_size * config.dim + added)
    return forward + inputs + 2.0 * products + passed * attention * 2 / 3


def _layer(name: str, num_layers: int) -> int:
    return int(name.split(".")[1]) if name.startswith("layers.") else num_layers


def _is_product(name: str, shape: tuple[int, ...]) -> bool:
    """Say whether a token is multiplied with a parameter: embeddings and virtual tokens are looked up."""
    return len(shape) == 2 and not name.startswith("embed_tokens.") and not name.endswith("prefix_tokens")


def _is_added(name: str) -> bool:
    return any(part.startswith(("lora_", "bottleneck_")) for part in name.split("."))


def _block_weights(config: ModelConfig) -> int:
    assert config.num_kv_heads and config.head_dim, "the model config must be resolved first"
    query_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return 2 * config.dim * (query_width + kv_width) + 3 * config.dim * config.ffn_dim


def _block_biases(config: ModelConfig) -> int:
    query_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = query_width + 2 * kv_width + config.dim if config.attention_bias else 0
    return attention + (2 * config.ffn_dim + config.dim if config.mlp_bias else 0)
