"""What the decoder promises beyond equality with transformers, which tests/golden/test_hf_parity.py holds."""

import pytest
import torch

from configs.schema import ModelConfig
from models.hf_weights import parameter_shapes
from models.linear import Embedding
from models.llama import LayerCache, Llama, RMSNorm


def make(tie: bool = False, bias: bool = False) -> Llama:
    config = ModelConfig(
        vocab_size=31, dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, ffn_dim=20, max_seq_len=32,
        tie_embeddings=tie, attention_bias=bias, mlp_bias=bias,
    )  # fmt: skip
    torch.manual_seed(0)
    return Llama(config).double()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tie", [False, True])
def test_parameters_are_the_documented_ones(tie: bool, bias: bool) -> None:
    model = make(tie, bias)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes == parameter_shapes(model.config)
    assert shapes["layers.1.self_attn.k_proj.weight"] == (12, 16)
    assert ("layers.0.mlp.down_proj.bias" in shapes) == bias
    assert ("lm_head.weight" in shapes) != tie
    assert (model.lm_head.weight is model.embed_tokens.weight) == tie


def test_hidden_states_come_out_after_the_final_norm() -> None:
    model = make()
    hidden = model(torch.randint(0, 31, (3, 10)))
    assert hidden.shape == (3, 10, 16)
    assert torch.allclose(hidden.square().mean(-1), torch.ones(3, 10, dtype=torch.float64), atol=1e-2)


@pytest.mark.parametrize("pieces", [[10], [1] * 10, [4, 1, 5]], ids=str)
def test_a_cache_changes_nothing(pieces: list[int]) -> None:
    model = make()
    tokens = torch.randint(0, 31, (2, 10))
    cache = model.new_cache(12)
    found = torch.cat([model(part, cache=cache) for part in tokens.split(pieces, dim=1)], dim=1)
    assert (found - model(tokens)).abs().max() < 1e-12
    assert {layer.length for layer in cache.values()} == {10}


def test_a_full_cache_refuses_more() -> None:
    cache = LayerCache(3)
    cache.append(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))
    with pytest.raises(AssertionError, match="the cache holds 3 tokens, 4 were given"):
        cache.append(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))


def test_positions_count_from_0_unless_given() -> None:
    model = make()
    tokens = torch.randint(0, 31, (2, 10))
    shifted = model(tokens, positions=torch.arange(5, 15).expand(2, -1))
    assert (shifted - model(tokens)).abs().max() < 1e-12  # only distances matter
    doubled = model(tokens, positions=2 * torch.arange(10).expand(2, -1))
    assert (doubled - model(tokens)).abs().max() > 1e-3


def test_rms_norm_is_computed_in_single_precision_at_least() -> None:
    norm = RMSNorm(8, 1e-5).bfloat16()
    x = torch.randn(1, 4, 8).bfloat16()
    precise = x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.equal(norm(x), precise.bfloat16())
    assert norm(x).dtype == torch.bfloat16


def test_layers_keep_their_names_when_some_are_taken_away() -> None:
    model = make()
    del model.layers["0"]
    assert {name.split(".")[1] for name, _ in model.named_parameters() if name.startswith("layers.")} == {"1"}
    assert model(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 16)


def test_the_gradient_of_a_frequent_token_keeps_all_its_occurrences() -> None:
    """A sum in bf16 stands still at 256 times what is added."""
    embedding = Embedding(5, 8).bfloat16()
    tokens = torch.tensor([[3] * 2000 + [1]])
    embedding(tokens).sum().backward()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad.dtype == torch.bfloat16
    assert embedding.weight.grad[:, 0].tolist() == [0.0, 1.0, 0.0, 2000.0, 0.0]


def test_gradients_of_the_embedding_are_exact() -> None:
    embedding, plain = Embedding(5, 8).double(), torch.nn.Embedding(5, 8).double()
    plain.load_state_dict(embedding.state_dict())
    tokens, upstream = torch.randint(0, 5, (2, 7)), torch.randn(2, 7, 8, dtype=torch.float64)
    for table in (embedding, plain):
        table(tokens).backward(upstream)
    assert embedding.weight.grad is not None and plain.weight.grad is not None
    assert torch.equal(embedding.weight.grad, plain.weight.grad)
