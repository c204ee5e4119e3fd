"""Our Llama against transformers' LlamaForCausalLM on the same weights, in fp32: logits, gradients, files.

Differences are measured per tensor as |a - b| / |b| in norm. No true gradient is zero here: even the keys' biases are
turned by their positions.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from configs.schema import ModelConfig, RopeScalingConfig
from models.attention import Backend
from models.hf_config import hf_config
from models.hf_weights import HfWeights, hf_name, our_name
from models.hf_write import write_hf
from models.llama import Llama

TOLERANCE = 1e-5
SCALING = RopeScalingConfig(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=32)
SHAPES: dict[str, dict[str, Any]] = {
    "mha": {"num_kv_heads": 4},
    "gqa": {"num_kv_heads": 2},
    "mqa_tied": {"num_kv_heads": 1, "tie_embeddings": True},
    "scaled": {"num_kv_heads": 2, "rope_scaling": SCALING, "rope_theta": 500000.0},
    "scaled_tied": {"num_kv_heads": 2, "rope_scaling": SCALING, "tie_embeddings": True},
    "biased": {"num_kv_heads": 2, "attention_bias": True, "mlp_bias": True},
    "wide_heads": {"num_kv_heads": 2, "head_dim": 24, "norm_eps": 1e-6},
}


def make_config(shape: str) -> ModelConfig:
    fields: dict[str, Any] = {
        "vocab_size": 101,
        "dim": 64,
        "num_layers": 3,
        "num_heads": 4,
        "head_dim": 16,
        "ffn_dim": 96,
        "max_seq_len": 256,
    }
    return ModelConfig(**(fields | SHAPES[shape]))


def make_theirs(config: ModelConfig) -> LlamaForCausalLM:
    """Their model with random weights, biases and norms, so that nothing hides behind a zero or a one."""
    torch.manual_seed(0)
    fields = {k: v for k, v in hf_config(config, "float32", 1, 2).items() if k not in ("torch_dtype", "rope_scaling")}
    theirs = LlamaForCausalLM(LlamaConfig(**fields))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
    return theirs


def make_ours(config: ModelConfig, theirs: LlamaForCausalLM, backend: Backend = "sdpa") -> Llama:
    ours = Llama(config, backend)
    state = {our_name(name): tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict(state)
    return ours


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def logits_of(ours: Llama, tokens: torch.Tensor, **packing: torch.Tensor) -> torch.Tensor:
    return ours.lm_head(ours(tokens, **packing))


def assert_same_gradients(ours: Llama, theirs: LlamaForCausalLM) -> None:
    expected = {our_name(name): p.grad for name, p in theirs.named_parameters()}
    assert expected.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        grad, truth = parameter.grad, expected[name]
        assert grad is not None and truth is not None, name
        assert distance(grad, truth) < TOLERANCE, name


@pytest.mark.parametrize("backend", ["sdpa", "blocked"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_all_gradients_equal_transformers(shape: str, backend: Backend) -> None:
    config = make_config(shape)
    theirs = make_theirs(config)
    ours = make_ours(config, theirs, backend)
    tokens = torch.randint(0, config.vocab_size, (2, 150))
    targets = tokens.roll(-1, 1).flatten()
    expected = theirs(tokens).logits
    logits = logits_of(ours, tokens)
    assert distance(logits, expected) < TOLERANCE
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets).backward()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets).backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("backend", ["sdpa", "blocked"])
@pytest.mark.parametrize("shape", ["gqa", "scaled_tied"])
def test_packed_documents_equal_each_document_alone(shape: str, backend: Backend) -> None:
    config = make_config(shape)
    theirs = make_theirs(config)
    ours = make_ours(config, theirs, backend)
    rows = [[70, 1, 79], [5, 130, 15]]
    tokens = torch.randint(0, config.vocab_size, (2, 150))
    documents = torch.stack([torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)) for lengths in rows])
    positions = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in rows])
    logits = logits_of(ours, tokens, positions=positions, documents=documents)
    weights = torch.randn_like(logits)
    (logits * weights).sum().backward()
    for row, lengths in enumerate(rows):
        pieces = zip(tokens[row].split(lengths), logits[row].split(lengths), weights[row].split(lengths), strict=True)
        for document, found, weight in pieces:
            expected = theirs(document[None]).logits[0]
            assert distance(found, expected) < TOLERANCE
            (expected * weight).sum().backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_folder_that_we_write_gives_the_same_logits_in_transformers(shape: str, tmp_path: Path) -> None:
    config = make_config(shape)
    ours = make_ours(config, make_theirs(config))
    write_hf(tmp_path / "hf", config, ours.named_parameters(), dtype=torch.float32, max_shard_bytes=100_000)
    result: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    loaded, report = result
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.dtype == torch.float32
    tokens = torch.randint(0, config.vocab_size, (2, 40))
    assert distance(logits_of(ours, tokens), loaded(tokens).logits) < TOLERANCE


@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_folder_that_transformers_writes_gives_the_same_logits_here(
    shape: str, max_shard_size: str, tmp_path: Path
) -> None:
    config = make_config(shape)
    theirs = make_theirs(config)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size=max_shard_size)
    weights = HfWeights(tmp_path / "hf")
    weights.check()
    assert weights.config == config
    ours = Llama(weights.config)
    for name, parameter in ours.named_parameters():
        parameter.data.copy_(weights.read(name))
    tokens = torch.randint(0, config.vocab_size, (2, 40))
    assert distance(logits_of(ours, tokens), theirs(tokens).logits) < TOLERANCE
    assert {hf_name(name) for name in weights.names()} <= set(theirs.state_dict())
