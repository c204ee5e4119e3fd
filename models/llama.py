"""The decoder: RMSNorm, grouped-query attention with rotary positions, SwiGLU, residuals; on one device.

    h = x + o_proj(attention(rope(q_proj(n(x))), rope(k_proj(n(x))), v_proj(n(x))))
    y = h + down_proj(silu(gate_proj(n(h))) * up_proj(n(h)))

Module names are Hugging Face's. `forward` ends after the final norm: the head belongs to whoever needs logits (the loss
applies it in chunks, generation to the last position), so that the logits of a batch need never exist. Nothing here
knows of ranks; layers sit in a ModuleDict so that their names survive when some are taken away.

Sources: arXiv:2302.13971 (Llama), arXiv:1910.07467 (RMSNorm), arXiv:2002.05202 (SwiGLU), arXiv:2305.13245 (GQA).
"""

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from configs.schema import ModelConfig
from models.attention import Attend, Backend, attention, attention_to_cache
from models.linear import Embedding, Linear, Marks
from models.rope import apply_rope, rope_table


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dim; the quotient in at least fp32."""
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    precise = precise * torch.rsqrt(precise.square().mean(dim=-1, keepdim=True) + eps)
    return precise.to(x.dtype) * weight


class RMSNorm(nn.Module):
    """The norm of each position, with a weight for each of its numbers."""

    def __init__(self, dim: int, eps: float) -> None:
        """Start with a weight of ones."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
        """Normalise the last dim."""
        return rms_norm(x, self.weight, self.eps)


class LayerCache:
    """Keys and values that one layer has seen, for generation."""

    def __init__(self, max_len: int) -> None:
        """Hold up to `max_len` tokens; memory is taken at the first append."""
        self.max_len = max_len
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(
        self, k: Float[Tensor, "batch kv_heads new head_dim"], v: Float[Tensor, "batch kv_heads new head_dim"]
    ) -> tuple[Float[Tensor, "batch kv_heads known head_dim"], Float[Tensor, "batch kv_heads known head_dim"]]:
        """Add the newest keys and values and return all that are known."""
        if self.keys is None or self.values is None:
            shape = (k.shape[0], k.shape[1], self.max_len, k.shape[3])
            self.keys, self.values = k.new_empty(shape), v.new_empty(shape)
        stop = self.length + k.shape[2]
        assert stop <= self.max_len, f"the cache holds {self.max_len} tokens, {stop} were given"
        self.keys[:, :, self.length : stop] = k
        self.values[:, :, self.length : stop] = v
        self.length = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        """Make the four projections; the config is resolved (num_kv_heads and head_dim are not 0)."""
        super().__init__()
        self.head_dim = config.head_dim
        # Context parallelism puts another function in its place.
        self.attend: Attend = partial(attention, backend=backend)
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.dim, width, bias=config.attention_bias)
        self.k_proj = Linear(config.dim, kv_width, bias=config.attention_bias)
        self.v_proj = Linear(config.dim, kv_width, bias=config.attention_bias)
        self.o_proj = Linear(width, config.dim, bias=config.attention_bias)

    def forward(
        self,
        x: Float[Tensor, "batch seq dim"],
        cos: Float[Tensor, "rows seq half"],
        sin: Float[Tensor, "rows seq half"],
        documents: Int[Tensor, "batch seq"] | None = None,
        cache: LayerCache | None = None,
        marks: Marks | None = None,
    ) -> Float[Tensor, "batch seq dim"]:
        """Mix values of earlier positions into each position."""
        batch, seq, _ = x.shape
        # -1 and not num_heads: tensor parallelism leaves each rank a part of the heads.
        q = self.q_proj(x, marks).view(batch, seq, -1, self.head_dim).transpose(1, 2)
        k = self.k_proj(x, marks).view(batch, seq, -1, self.head_dim).transpose(1, 2)
        v = self.v_proj(x, marks).view(batch, seq, -1, self.head_dim).transpose(1, 2)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        k = k if self.k_proj.replaced is None else self.k_proj.replaced(self.k_proj, k, marks)
        v = v if self.v_proj.replaced is None else self.v_proj.replaced(self.v_proj, v, marks)
        out = self.attend(q, k, v, documents) if cache is None else attention_to_cache(q, *cache.append(k, v))
        return self.o_proj(out.transpose(1, 2).reshape(batch, seq, -1), marks)


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        """Make the three projections."""
        super().__init__()
        self.gate_proj = Linear(config.dim, config.ffn_dim, bias=config.mlp_bias)
        self.up_proj = Linear(config.dim, config.ffn_dim, bias=config.mlp_bias)
        self.down_proj = Linear(config.ffn_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x: Float[Tensor, "batch seq dim"], marks: Marks | None = None) -> Float[Tensor, "batch seq dim"]:
        """Apply the gated unit to each position."""
        return self.down_proj(F.silu(self.gate_proj(x, marks)) * self.up_proj(x, marks), marks)


class Block(nn.Module):
    """One decoder layer: attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        """Make the layer's parts."""
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, backend)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(
        self,
        x: Float[Tensor, "batch seq dim"],
        cos: Float[Tensor, "rows seq half"],
        sin: Float[Tensor, "rows seq half"],
        documents: Int[Tensor, "batch seq"] | None = None,
        cache: LayerCache | None = None,
        marks: Marks | None = None,
    ) -> Float[Tensor, "batch seq dim"]:
        """Return the residual stream after this layer."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, documents, cache, marks)
        return x + self.mlp(self.post_attention_layernorm(x), marks)


class Llama(nn.Module):
    """Tokens to the hidden states that the head reads."""

    def __init__(self, config: ModelConfig, backend: Backend = "sdpa") -> None:
        """Build on the current default device and dtype; weights are whatever torch draws, see models/init.py."""
        super().__init__()
        assert config.num_kv_heads and config.head_dim, "the model config must be resolved first"
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleDict({str(i): Block(config, backend) for i in range(config.num_layers)})
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def new_cache(self, max_len: int) -> dict[str, LayerCache]:
        """Make an empty cache of keys and values for `max_len` tokens."""
        return {name: LayerCache(max_len) for name in self.layers}

    def forward(
        self,
        tokens: Int[Tensor, "batch seq"],
        positions: Int[Tensor, "batch seq"] | None = None,
        documents: Int[Tensor, "batch seq"] | None = None,
        cache: dict[str, LayerCache] | None = None,
        marks: Marks | None = None,
    ) -> Float[Tensor, "batch seq dim"]:
        """Return the hidden states after the final norm; `positions` start at 0 (after the cache) unless given."""
        x = self.embed_tokens(tokens, marks)
        if positions is None:
            known = next(iter(cache.values())).length if cache else 0
            positions = torch.arange(known, known + tokens.shape[1], device=tokens.device)[None]
        cos, sin = rope_table(self.config, positions, x.dtype)
        for name, layer in self.layers.items():
            x = layer(x, cos, sin, documents, cache[name] if cache else None, marks)
        return self.norm(x)
