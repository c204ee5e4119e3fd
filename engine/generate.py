"""Sampling from a model, one token at a time, with a cache of keys and values.

The random numbers come from a generator of our own on the CPU, so the same seed gives the same text whatever else the
process draws. Text and tokenizers are the caller's.

Source of top-p: arXiv:1904.09751 section 3.1.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from configs.errors import ConfigError, NonFiniteError, problem
from models.linear import Marks
from models.llama import LayerCache, Llama

Cache = dict[str, LayerCache]
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen; raises ConfigError with every value that makes no sense."""

    max_new_tokens: int = 200
    """Stop after this many tokens, or where the model's max_seq_len ends."""
    temperature: float = 0.8
    """Logits are divided by this; 0 always takes the likeliest token."""
    top_p: float = 0.95
    """Draw from the fewest tokens that hold this much probability; 1 draws from all."""
    seed: int = 0
    """Of the random numbers."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        problems = []
        if self.max_new_tokens < 1:
            problems.append(problem("max_new_tokens", self.max_new_tokens, "must be at least 1"))
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            problems.append(problem("temperature", self.temperature, "must be 0 (greedy) or more"))
        if not 0 < self.top_p <= 1:
            problems.append(problem("top_p", self.top_p, "must be above 0 and at most 1"))
        if not 0 <= self.seed <= MAX_SEED:
            problems.append(problem("seed", self.seed, "must be from 0 to 2**63 - 1"))
        if problems:
            raise ConfigError(problems)


def generate(
    model: Llama,
    prompt: Sequence[int],
    sampling: Sampling,
    eos_id: int | None = None,
    vocab_size: int | None = None,
    num_virtual_tokens: int = 0,
) -> Iterator[int]:
    """Yield the tokens that follow `prompt`, each as soon as it is known, up to and without `eos_id`.

    Only ids below `vocab_size` are chosen: an embedding may have more rows than the tokenizer has tokens. Before the
    prompt stand the virtual tokens that the model has learned. Raises ConfigError, before the first token, for a prompt
    that is empty, too long, or holds unknown tokens.
    """
    limit = model.config.max_seq_len - num_virtual_tokens
    _check_prompt(model, prompt, limit)
    num_tokens = min(sampling.max_new_tokens, limit - len(prompt))
    choose = partial(_next, model, sampling, torch.Generator().manual_seed(sampling.seed), vocab_size)
    cache = model.new_cache(num_virtual_tokens + len(prompt) + num_tokens)
    virtual = [*range(num_virtual_tokens), *(-1 for _ in prompt)] if num_virtual_tokens else None
    return _stream(choose, [0] * num_virtual_tokens + list(prompt), virtual, cache, eos_id, num_tokens)


def next_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Choose from the logits (vocab) of one position; raise NonFiniteError where one is not finite."""
    if not bool(torch.isfinite(logits).all()):
        why = "a weight is NaN or infinite, or the format is too narrow for them"
        do = "Try --dtype fp32. If that does not help, the weights are spoiled: take an earlier checkpoint with --step."
        raise NonFiniteError(problem("logits of the next token", "", "must all be finite", why, do))
    if sampling.temperature == 0:
        return int(logits.argmax())
    precise = logits.double().cpu()
    # None above 0, or a temperature near 0 would make it infinite.
    probabilities = torch.softmax((precise - precise.max()) / sampling.temperature, dim=-1)
    likeliest, order = probabilities.sort(descending=True, stable=True)
    # A token stays while those before it hold less than top_p: the first always does.
    likeliest[likeliest.cumsum(dim=-1) - likeliest >= sampling.top_p] = 0.0
    return int(order[torch.multinomial(likeliest, 1, generator=generator)])


def _check_prompt(model: Llama, prompt: Sequence[int], limit: int) -> None:
    vocab_size = model.config.vocab_size
    if not prompt:
        raise ConfigError(problem("prompt", "", "must hold at least one token"))
    if len(prompt) >= limit:
        longest, virtual = model.config.max_seq_len, model.config.max_seq_len - limit
        less = f" less the {virtual} virtual tokens before it" if virtual else ""
        expected = f"must be shorter than model.max_seq_len = {longest}{less}"
        raise ConfigError(problem("tokens in the prompt", len(prompt), expected, do="Shorten the prompt."))
    if max(prompt) >= vocab_size or min(prompt) < 0:
        expected = f"must be below model.vocab_size = {vocab_size}"
        why = "the tokenizer is not the one the model was trained with"
        raise ConfigError(problem("token in the prompt", max(prompt), expected, why))


def _stream(
    choose: Callable[[list[int], list[int] | None, Cache], int],
    prompt: list[int],
    virtual: list[int] | None,
    cache: Cache,
    eos_id: int | None,
    num_tokens: int,
) -> Iterator[int]:
    newest = prompt
    for _ in range(num_tokens):
        token = choose(newest, virtual, cache)
        if token == eos_id:
            return
        yield token
        newest, virtual = [token], None


@torch.inference_mode()  # around each step, not the generator: a mode must not stay on between yields
def _next(
    model: Llama,
    sampling: Sampling,
    generator: torch.Generator,
    vocab_size: int | None,
    newest: list[int],
    virtual: list[int] | None,
    cache: Cache,
) -> int:
    device = model.embed_tokens.weight.device
    marks = None if virtual is None else Marks(virtual=torch.tensor([virtual], device=device))
    hidden = model(torch.tensor([newest], device=device), cache=cache, marks=marks)
    return next_token(model.lm_head(hidden[:, -1:])[0, 0, :vocab_size].float(), sampling, generator)
