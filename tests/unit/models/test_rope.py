"""Rotary positions: against complex numbers, what they promise of relative positions, and Llama 3's scaling.

Equality with transformers, through the whole model, is held in tests/golden/test_hf_parity.py.
"""

import cmath
import math

import pytest
import torch

from configs.schema import ModelConfig, RopeScalingConfig
from models.rope import apply_rope, inverse_frequencies, rope_table

CPU = torch.device("cpu")


def config(head_dim: int = 8, theta: float = 10000.0, scaling: RopeScalingConfig | None = None) -> ModelConfig:
    return ModelConfig(
        vocab_size=8, dim=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=head_dim, ffn_dim=8, rope_theta=theta,
        rope_scaling=scaling,
    )  # fmt: skip


def test_pairs_turn_like_complex_numbers() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 0, 1, 100, 5]])
    turned = apply_rope(x, *rope_table(config(), positions, torch.float64))
    for row in range(2):
        for at in range(5):
            for pair in range(4):
                angle = positions[row, at].item() * 10000.0 ** (-2 * pair / 8)
                for head in range(3):
                    before = complex(x[row, head, at, pair], x[row, head, at, pair + 4])
                    after = before * cmath.exp(1j * angle)
                    assert turned[row, head, at, pair].item() == pytest.approx(after.real, abs=1e-12)
                    assert turned[row, head, at, pair + 4].item() == pytest.approx(after.imag, abs=1e-12)


def test_a_score_depends_on_the_distance_only() -> None:
    torch.manual_seed(1)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(at: int, key_at: int) -> float:
        turned = [apply_rope(x, *rope_table(config(), torch.tensor([[p]]), x.dtype)) for x, p in ((q, at), (k, key_at))]
        return (turned[0] * turned[1]).sum().item()

    assert score(9, 4) == pytest.approx(score(1005, 1000), abs=1e-9)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-3)


def test_the_table_is_precise_whatever_the_activations_are() -> None:
    positions = torch.arange(4096)[None]
    low, single, double = (rope_table(config(), positions, t) for t in (torch.bfloat16, torch.float32, torch.float64))
    assert torch.equal(low[0], single[0])
    assert (single[0].double() - double[0]).abs().max() < 1e-3
    x = torch.randn(1, 1, 4096, 8, dtype=torch.bfloat16)
    assert apply_rope(x, *low).dtype == torch.bfloat16


def test_llama_3_scaling_has_three_ranges() -> None:
    """Long wavelengths are stretched, short ones kept, and what lies between is blended without a step."""
    scaling = RopeScalingConfig(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)
    plain = inverse_frequencies(config(128, 500000.0), torch.float64, CPU).tolist()
    scaled = inverse_frequencies(config(128, 500000.0, scaling), torch.float64, CPU).tolist()
    kinds = {"kept": 0, "stretched": 0, "blended": 0}
    for before, after in zip(plain, scaled, strict=True):
        turns = 8192 * before / (2 * math.pi)  # within the original context
        if turns > 4:
            kinds["kept"] += 1
            assert after == pytest.approx(before, rel=1e-12)
        elif turns < 1:
            kinds["stretched"] += 1
            assert after == pytest.approx(before / 8, rel=1e-12)
        else:
            kinds["blended"] += 1
            share = (turns - 1) / 3
            assert after == pytest.approx(before * (share + (1 - share) / 8), rel=1e-12)
    assert all(kinds.values()), kinds
    assert scaled == sorted(scaled, reverse=True)
