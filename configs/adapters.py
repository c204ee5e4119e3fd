"""The [adapter] section: what of a model is trained, and what is trained beside it.

Apart from schema.py only because it is long; the same rules hold.
"""

from dataclasses import dataclass
from typing import Literal

from configs.fields import fixed


@dataclass(frozen=True, slots=True, kw_only=True)
class OverrideConfig:
    """Another rank for some of LoRA's targets."""

    targets: tuple[str, ...] = fixed()
    """Modules this holds for, written like adapter.targets; where several fit, the last one counts."""
    rank: int = fixed()
    """Rank of these."""
    alpha: float = fixed(0.0)
    """Scale of these; 0 keeps adapter.alpha."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberConfig:
    """One of several LoRA adapters that are trained at once over the same base."""

    name: str = fixed()
    """Its name; its exported folder bears it. Letters, digits, '_' and '-'."""
    rank: int = fixed(0)
    """Its rank; 0 takes adapter.rank and the overrides."""
    alpha: float = fixed(0.0)
    """Its scale; 0 takes adapter.alpha and the overrides."""
    lr: float = fixed(0.0)
    """Its peak learning rate; 0 takes optim.lr."""
    seed: int = fixed(-1)
    """Its initial weights and the order of its data are functions of this number; -1 takes run.seed."""
    stores: tuple[str, ...] = fixed(factory=tuple)
    """Paths of those data.stores that it is trained on; empty takes all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """What is trained of the model, and what beside it; everything else is frozen."""

    kind: Literal["none", "lora", "bottleneck", "prefix", "prompt", "bitfit", "freeze"] = fixed("none")
    """none: all parameters are trained. lora: low-rank products beside linear layers (arXiv:2106.09685). bottleneck:
    small feed-forward layers after attention and feed-forward (arXiv:1902.00751). prefix: learned keys and values
    before each sequence, in every layer (arXiv:2101.00190). prompt: learned embeddings before each sequence
    (arXiv:2104.08691). bitfit: the biases (arXiv:2106.10199). freeze: the last layers, or parameters by name."""
    targets: tuple[str, ...] = fixed(("all-linear",))
    """Modules that get LoRA: "all-linear" (every projection of every layer), names as `q_proj`, or patterns over whole
    names as `layers.1*.mlp.*`; `embed_tokens` and `lm_head` only by name."""
    rank: int = fixed(16)
    """Width of LoRA's product."""
    alpha: float = fixed(32.0)
    """LoRA's product is scaled by alpha / rank."""
    dropout: float = fixed(0.0)
    """Share of the inputs of LoRA's product that are zeroed while training."""
    overrides: tuple[OverrideConfig, ...] = fixed(factory=tuple)
    """Other ranks for some targets."""
    rslora: bool = fixed(False)
    """Scale by alpha / sqrt(rank) instead (arXiv:2312.03732)."""
    dora: bool = fixed(False)
    """Train the length of each output's weights apart from their direction (DoRA, arXiv:2402.09353)."""
    lora_plus_ratio: float = fixed(1.0)
    """Learning rate of LoRA's B relative to A's (LoRA+, arXiv:2402.12354)."""
    bias: Literal["none", "lora_only"] = fixed("none")
    """lora_only: also train the biases of the layers that have LoRA."""
    bottleneck_dim: int = fixed(64)
    """Width of bottleneck adapters."""
    num_virtual_tokens: int = fixed(20)
    """Learned positions of prefix and prompt."""
    last_layers: int = fixed(0)
    """Under freeze: train the last n layers and the final norm; 0 trains none of them."""
    trainable: tuple[str, ...] = fixed(factory=tuple)
    """Under freeze: patterns over names of further parameters to train, as `lm_head.*` or `layers.3.*`."""
    init_from: str = ""
    """Folder of a PEFT adapter to start from; empty starts as the method does. Read at step 0 only."""
    quantization: Literal["none", "nf4", "int8", "float8"] = fixed("none")
    """Format that the frozen projections of the layers are held in; nf4 is QLoRA's, doubly quantised
    (arXiv:2305.14314)."""
    base: Literal["auto", "sharded", "replicated"] = "auto"
    """Frozen weights: shards that are gathered layer by layer, or a copy on every data-parallel rank that is never
    gathered. auto: replicated where that fits the memory."""
    members: tuple[MemberConfig, ...] = fixed(factory=tuple)
    """Several LoRA adapters in one run, over one base; data.global_batch_size is then that of each. Empty: one."""
