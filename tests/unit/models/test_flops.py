"""Parameter and FLOP counts against the real model, torch's own counter and published figures."""

from math import prod

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from configs.adapters import AdapterConfig
from configs.schema import ModelConfig
from models.adapters import attach, trained_shapes
from models.flops import flops_per_token, num_matmul_params, num_params
from models.llama import Llama

LLAMA_8B = ModelConfig(
    vocab_size=128_256, dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, ffn_dim=14_336
)
LLAMA_1B = ModelConfig(
    vocab_size=128_256,
    dim=2048,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    ffn_dim=8192,
    tie_embeddings=True,
)
LLAMA_405B = ModelConfig(
    vocab_size=128_256, dim=16_384, num_layers=126, num_heads=128, num_kv_heads=8, head_dim=128, ffn_dim=53_248
)


def small(tie: bool = False, bias: bool = False) -> ModelConfig:
    return ModelConfig(
        vocab_size=50,
        dim=24,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        ffn_dim=40,
        tie_embeddings=tie,
        attention_bias=bias,
        mlp_bias=bias,
    )


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_num_params_counts_what_the_model_holds(tie: bool, bias: bool) -> None:
    config = small(tie, bias)
    with torch.device("meta"):
        model = Llama(config)
    assert num_params(config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("config", "billions"), [(LLAMA_8B, 8.030), (LLAMA_1B, 1.236), (LLAMA_405B, 405.853)], ids=["8B", "1B", "405B"]
)
def test_num_params_of_the_public_models(config: ModelConfig, billions: float) -> None:
    assert num_params(config) / 1e9 == pytest.approx(billions, abs=6e-4)


@pytest.mark.parametrize(
    ("config", "seq_len", "full", "causal"),
    [
        (LLAMA_8B, 8192, 57.91, 51.47),
        (LLAMA_8B, 4096, 51.47, 48.25),
        (LLAMA_1B, 2048, 8.22, 7.82),
        (LLAMA_405B, 8192, 2625, 2524),
    ],
)
def test_published_gigaflops_per_token(config: ModelConfig, seq_len: int, full: float, causal: float) -> None:
    assert flops_per_token(config, seq_len, causal=False) / 1e9 == pytest.approx(full, rel=3e-4, abs=6e-3)
    assert flops_per_token(config, seq_len, causal=True) / 1e9 == pytest.approx(causal, rel=3e-4, abs=6e-3)


@pytest.mark.parametrize("tie", [False, True])
def test_flops_per_token_equal_torchs_count_of_the_real_model(tie: bool) -> None:
    """torch's counter sees S x S scores on the math kernel; grouped keys are expanded, which costs nothing."""
    config, seq_len = small(tie), 16
    model = Llama(config)
    tokens = torch.zeros(2, seq_len, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model.lm_head(model(tokens)).sum().backward()
    expected = flops_per_token(config, seq_len, causal=False) * tokens.numel()
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize(
    ("adapter", "first"),
    [
        (AdapterConfig(kind="lora", rank=3), 0),
        (AdapterConfig(kind="lora", rank=3, targets=("layers.1.*", "lm_head")), 1),
        (AdapterConfig(kind="freeze", last_layers=1), 2),
        (AdapterConfig(kind="bottleneck", bottleneck_dim=5), 0),
    ],
    ids=["lora", "lora above", "freeze", "bottleneck"],
)
def test_frozen_weights_have_no_gradient_of_their_own(adapter: AdapterConfig, first: int) -> None:
    """Against torch's count, which leaves out the inputs' gradients that the first trained layer doesn't need."""
    config, seq_len = small(tie=False), 16
    model = Llama(config)
    attach(model, adapter)
    tokens = torch.zeros(2, seq_len, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model.lm_head(model(tokens)).sum().backward()
    trained = trained_shapes(config, adapter)
    expected = flops_per_token(config, seq_len, causal=False, trained=trained)
    needless = ["q_proj.", "k_proj.", "v_proj."]
    if adapter.kind == "freeze":  # the norm before them is trained
        needless = []
    if adapter.kind == "bottleneck":  # it stands behind that layer's attention, scores included
        needless += ["o_proj.weight", "o_proj.bottleneck_down.weight"]
        expected -= 8 * config.num_heads * config.head_dim * seq_len
    names = [f"layers.{first}.self_attn.{part}" for part in needless]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    below = [name for name in shapes if name.startswith(tuple(names)) and ".lora_B." not in name]
    expected -= 2 * sum(prod(shapes[name]) for name in below)
    assert counter.get_total_flops() == expected * tokens.numel()


def test_the_head_is_a_multiplication_even_when_it_is_tied() -> None:
    assert num_matmul_params(small(tie=True)) == num_matmul_params(small(tie=False))
    assert num_params(small(tie=False)) - num_params(small(tie=True)) == 50 * 24
