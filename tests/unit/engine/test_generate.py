"""Sampling: the cache against full recomputation and transformers, top-p against its definition."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from configs.adapters import AdapterConfig
from configs.errors import ConfigError, NonFiniteError
from configs.schema import ModelConfig
from engine.generate import Sampling, generate, next_token
from models.adapters import attach
from models.hf_config import hf_config
from models.hf_weights import hf_name
from models.linear import Marks
from models.llama import Llama

CONFIG = ModelConfig(
    vocab_size=61, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48, max_seq_len=64
)
GREEDY = Sampling(max_new_tokens=30, temperature=0)
PROMPT = [3, 14, 15, 9, 2]


@pytest.fixture
def model() -> Llama:
    torch.manual_seed(1)
    model = Llama(CONFIG)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=1.0)
    return model


def test_greedy_tokens_equal_full_recomputation(model: Llama) -> None:
    tokens = list(PROMPT)
    with torch.no_grad():
        for _ in range(GREEDY.max_new_tokens):
            tokens.append(int(model.lm_head(model(torch.tensor([tokens])))[0, -1].argmax()))
    generated = list(generate(model, PROMPT, GREEDY))
    assert generated == tokens[len(PROMPT) :]
    assert len(set(generated)) > 3, "a model that repeats one token would prove nothing"


def test_greedy_tokens_equal_transformers(model: Llama) -> None:
    fields = {k: v for k, v in hf_config(CONFIG, "float32", 1, 2).items() if k not in ("torch_dtype", "rope_scaling")}
    theirs: Any = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    theirs.load_state_dict({hf_name(name): tensor for name, tensor in model.state_dict().items()})
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = theirs.generate(torch.tensor([PROMPT]), **options)[0, len(PROMPT) :]
    assert list(generate(model, PROMPT, GREEDY)) == expected.tolist()


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_greedy_tokens_after_virtual_ones_equal_full_recomputation(model: Llama, kind: Any) -> None:
    attach(model, AdapterConfig(kind=kind, num_virtual_tokens=7))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=1.0)
    tokens = [0] * 7 + PROMPT
    with torch.no_grad():
        for _ in range(GREEDY.max_new_tokens):
            virtual = torch.tensor([[*range(7), *(-1 for _ in tokens[7:])]])
            hidden = model(torch.tensor([tokens]), marks=Marks(virtual=virtual))
            tokens.append(int(model.lm_head(hidden)[0, -1].argmax()))
    generated = list(generate(model, PROMPT, GREEDY, num_virtual_tokens=7))
    assert generated == tokens[7 + len(PROMPT) :]
    assert generated != list(generate(model, PROMPT, GREEDY)), "without them it is the base"
    whole = Sampling(max_new_tokens=1000, temperature=0)
    assert len(list(generate(model, PROMPT, whole, num_virtual_tokens=7))) == 64 - 7 - len(PROMPT)


def test_the_same_seed_gives_the_same_tokens_whatever_torch_draws_meanwhile(model: Llama) -> None:
    sampling = Sampling(max_new_tokens=30, temperature=1.0, top_p=0.9, seed=5)
    first = list(generate(model, PROMPT, sampling))
    second = []
    for token in generate(model, PROMPT, sampling):
        torch.rand(7)
        second.append(token)
    assert first == second
    other = Sampling(max_new_tokens=30, temperature=1.0, top_p=0.9, seed=6)
    assert list(generate(model, PROMPT, other)) != first


def test_generation_stops_before_eos(model: Llama) -> None:
    tokens = list(generate(model, PROMPT, GREEDY))
    assert list(generate(model, PROMPT, GREEDY, eos_id=tokens[4])) == tokens[: tokens.index(tokens[4])]


def test_generation_stops_where_the_models_context_ends(model: Llama) -> None:
    assert len(list(generate(model, PROMPT, Sampling(max_new_tokens=1000, temperature=0)))) == 64 - len(PROMPT)


def test_rows_of_the_embedding_without_a_token_are_never_chosen(model: Llama) -> None:
    free = list(generate(model, PROMPT, Sampling(max_new_tokens=50, temperature=3.0, top_p=1.0)))
    bound = list(generate(model, PROMPT, Sampling(max_new_tokens=50, temperature=3.0, top_p=1.0), vocab_size=20))
    assert max(free) >= 20
    assert max(bound) < 20


def test_gradients_are_on_again_between_tokens(model: Llama) -> None:
    for _ in generate(model, PROMPT, Sampling(max_new_tokens=2)):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_drawn_tokens_follow_the_softmax_cut_at_top_p() -> None:
    """Probabilities 0.5, 0.3, 0.15, 0.05 in scrambled order: top_p 0.7 needs the first two, renormalised."""
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(temperature=1.0, top_p=0.7)
    counts = torch.zeros(4)
    for _ in range(2000):
        counts[next_token(logits, sampling, generator)] += 1
    assert counts[0] == counts[2] == 0
    assert counts[1].item() / 2000 == pytest.approx(0.5 / 0.8, abs=0.04)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.01, {1}), (0.49, {1}), (0.51, {1, 3}), (0.94, {0, 1, 3}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_fewest_tokens_that_hold_the_mass(top_p: float, kept: set[int]) -> None:
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(temperature=1.0, top_p=top_p)
    assert {next_token(logits, sampling, generator) for _ in range(300)} == kept


def test_a_low_temperature_sharpens() -> None:
    logits = torch.tensor([1.0, 2.0])
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(temperature=0.5, top_p=1.0)
    share = sum(next_token(logits, sampling, generator) for _ in range(2000)) / 2000
    assert share == pytest.approx(torch.sigmoid(torch.tensor(2.0)).item(), abs=0.04)


def test_a_temperature_near_0_is_nearly_greedy() -> None:
    logits = torch.tensor([1.0, 2.0])
    assert next_token(logits, Sampling(temperature=1e-310, seed=2**63 - 1), torch.Generator()) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(model: Llama, value: float, temperature: float) -> None:
    with torch.no_grad():
        model.lm_head.weight[7, 7] = value
    with pytest.raises(NonFiniteError) as caught:
        list(generate(model, PROMPT, Sampling(temperature=temperature)))
    assert str(caught.value) == (
        "logits of the next token: must all be finite "
        "(a weight is NaN or infinite, or the format is too narrow for them). "
        "Try --dtype fp32. If that does not help, the weights are spoiled: take an earlier checkpoint with --step."
    )


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ([], "prompt: must hold at least one token."),
        (
            [1] * 64,
            "tokens in the prompt = 64: must be shorter than model.max_seq_len = 64. Shorten the prompt.",
        ),
        (
            [1, 61],
            "token in the prompt = 61: must be below model.vocab_size = 61 "
            "(the tokenizer is not the one the model was trained with).",
        ),
    ],
)
def test_a_bad_prompt_is_refused_before_the_first_token(model: Llama, prompt: list[int], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        generate(model, prompt, GREEDY)
    assert str(caught.value) == text


def test_every_bad_setting_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        Sampling(max_new_tokens=0, temperature=-1.0, top_p=0.0, seed=10**22)
    assert caught.value.problems == [
        "max_new_tokens = 0: must be at least 1.",
        "temperature = -1.0: must be 0 (greedy) or more.",
        "top_p = 0.0: must be above 0 and at most 1.",
        "seed = 10000000000000000000000: must be from 0 to 2**63 - 1.",
    ]
