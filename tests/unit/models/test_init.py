"""Initial weights: any slice of a parameter equals the same slice of the whole, bit for bit."""

import hashlib
import math
import statistics

import numpy as np
import pytest
import torch

from configs.schema import ModelConfig
from models import init

CONFIG = ModelConfig(vocab_size=64, dim=16, num_layers=3, num_heads=2, ffn_dim=32, init_std=0.05)
Q = "layers.0.self_attn.q_proj.weight"


def whole(name: str, shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return init.initial_rows(CONFIG, seed, name, shape, 0, shape[0], dtype)


@pytest.mark.parametrize("shape", [(7, 5), (333, 401), (1, 70_001), (70_001,), (3, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_row_range_equals_the_rows_of_the_whole(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    full = whole(Q, shape, dtype=dtype)
    rows = shape[0]
    for start, stop in [(0, rows), (0, 1), (rows - 1, rows), (rows // 3, rows // 2 + 1), (rows // 2, rows // 2)]:
        part = init.initial_rows(CONFIG, 0, Q, shape, start, stop, dtype)
        assert torch.equal(part, full[start:stop])


def test_row_ranges_are_exact_for_every_alignment() -> None:
    full = whole(Q, (200, 331))
    for start in range(0, 200, 7):
        for length in (1, 2, 3, 99):
            stop = min(200, start + length)
            assert torch.equal(
                init.initial_rows(CONFIG, 0, Q, (200, 331), start, stop, torch.float32), full[start:stop]
            )


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("dim", [0, 1])
def test_shards_of_any_number_of_ranks_make_up_the_whole(ranks: int, dim: int) -> None:
    shape = (129, 257)
    full = whole(Q, shape)
    for rank, chunk in enumerate(torch.chunk(full, ranks, dim)):
        size = -(-shape[dim] // ranks)
        offset = [0, 0]
        offset[dim] = rank * size
        local = torch.full_like(chunk, math.nan)
        init.fill_local(local, CONFIG, 0, Q, shape, offset)
        assert torch.equal(local, chunk)


def test_a_rectangle_filled_in_small_chunks_equals_the_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    full = whole(Q, (50, 40))
    monkeypatch.setattr(init, "FILLED_AT_ONCE", 120)
    local = torch.empty(31, 17)
    init.fill_local(local, CONFIG, 0, Q, (50, 40), (13, 20))
    assert torch.equal(local, full[13:44, 20:37])


def test_an_empty_shard_is_left_alone() -> None:
    table = torch.full((3, 5), math.nan)
    init.fill_local(table[3:], CONFIG, 0, Q, (3, 5), (3, 0))
    assert table.isnan().all()
    init.fill_local(table[2:], CONFIG, 0, Q, (3, 5), (2, 0))
    assert table[:2].isnan().all() and not table[2:].isnan().any()


def test_one_dimensional_parameters_shard_too() -> None:
    full = whole("anything.weight", (1001,))
    local = torch.empty(100)
    init.fill_local(local, CONFIG, 0, "anything.weight", (1001,), (901,))
    assert torch.equal(local, full[901:])


def test_values_do_not_depend_on_the_thread_count() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = whole(Q, (300, 333), dtype=torch.float64)
        torch.set_num_threads(2)
        two = whole(Q, (300, 333), dtype=torch.float64)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, two)


def test_seed_and_name_each_change_the_values() -> None:
    base = whole(Q, (8, 8))
    assert not torch.equal(base, whole(Q, (8, 8), seed=1))
    assert not torch.equal(base, whole("layers.1.self_attn.q_proj.weight", (8, 8)))
    assert torch.equal(base, whole(Q, (8, 8)))


def test_the_values_are_normal_with_the_stated_deviation() -> None:
    values = whole(Q, (400, 500), dtype=torch.float64).flatten() / CONFIG.init_std
    expected = statistics.NormalDist()
    for point in (-2.0, -1.0, 0.0, 0.5, 1.5):
        assert (values < point).double().mean().item() == pytest.approx(expected.cdf(point), abs=5e-3)
    assert values.std().item() == pytest.approx(1.0, abs=1e-2)


def test_values_equal_the_inverse_normal_of_the_generators_uniforms() -> None:
    """The mapping from words to normals, against the standard library's inverse normal."""
    key = np.frombuffer(hashlib.sha256(f"5\n{Q}".encode()).digest()[:16], dtype="<u8")
    generator = np.random.Philox(key=key)
    generator.advance(25)
    words = generator.random_raw(40)
    oracle = [statistics.NormalDist().inv_cdf(((int(w) >> 12) + 0.5) / 2**52) * CONFIG.init_std for w in words]
    rows = init.initial_rows(CONFIG, 5, Q, (20, 10), 10, 14, torch.float64).flatten()
    assert rows.tolist() == pytest.approx(oracle, rel=1e-11)


def test_no_word_gives_an_infinite_value() -> None:
    extremes = np.array([0, 2**64 - 1], dtype=np.uint64)
    values = init._inverse_normal(init._open_uniform(extremes))
    bound = -statistics.NormalDist().inv_cdf(2.0**-53)
    assert values.tolist() == pytest.approx([-bound, bound], rel=1e-12)


def test_the_inverse_normal_is_torchs_in_the_centre_and_in_both_tails() -> None:
    centre = torch.linspace(0.001, 0.999, 4001, dtype=torch.float64)
    tail = torch.logspace(-15, -3, 1000, dtype=torch.float64)
    points = torch.cat([centre, tail])
    values = torch.from_numpy(init._inverse_normal(points.numpy()))
    torch.testing.assert_close(values, torch.special.ndtri(points), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(
        torch.from_numpy(init._inverse_normal((1 - centre).numpy())), -values[:4001].clone(), rtol=1e-12, atol=1e-12
    )


def test_the_bits_are_those_of_every_other_machine() -> None:
    """A golden hash: only correctly rounded operations are used, so it holds on any processor and numpy."""
    values = whole(Q, (1000, 1000), seed=7, dtype=torch.float64)
    assert hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16] == "53931becc6924ff6"


@pytest.mark.parametrize("name", ["layers.2.self_attn.o_proj.weight", "layers.0.mlp.down_proj.weight"])
def test_residual_projections_are_scaled_by_depth(name: str) -> None:
    values = whole(name, (300, 300), dtype=torch.float64)
    assert values.std().item() == pytest.approx(0.05 / math.sqrt(6), rel=1e-2)


@pytest.mark.parametrize(
    "name", ["norm.weight", "layers.0.input_layernorm.weight", "layers.0.post_attention_layernorm.weight"]
)
def test_norm_weights_are_ones(name: str) -> None:
    assert torch.equal(whole(name, (16,)), torch.ones(16))


@pytest.mark.parametrize("name", ["layers.0.self_attn.o_proj.bias", "layers.0.mlp.down_proj.bias"])
def test_biases_are_zeros(name: str) -> None:
    assert torch.equal(whole(name, (16,)), torch.zeros(16))
