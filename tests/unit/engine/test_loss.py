"""Chunked cross entropy against F.cross_entropy: value, both gradients, and that the logits of a batch never exist."""

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.data.batches import IGNORE
from engine.loss import chunk_cross_entropy, cross_entropy_sum

BATCH, SEQ, DIM, VOCAB = 3, 7, 8, 37
TOKENS = BATCH * SEQ
CHUNKS = (1, 5, 7, TOKENS - 1, TOKENS, TOKENS + 100)


def draw(dtype: torch.dtype, ignored: str = "some") -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(BATCH, SEQ, DIM).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, DIM).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (BATCH, SEQ))
    targets[:, 0], targets[0, 1] = VOCAB - 1, 0
    if ignored == "some":
        targets[1, 2:6] = IGNORE
    elif ignored == "all":
        targets[:] = IGNORE
    return hidden, weight, targets


def expected(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and both gradients, from the same numbers in float64."""
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    logits = (hidden @ weight.T).flatten(0, 1)
    loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum")
    hidden_grad, weight_grad = torch.autograd.grad(loss * scale, (hidden, weight))
    return loss.detach(), hidden_grad, weight_grad


def distance(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("num_tokens", [8160, 5000, 12289])
def test_a_scale_that_bf16_lacks_is_not_rounded(num_tokens: int) -> None:
    """Else the blocks' gradients are up to 0.4% too large or too small beside the head's."""
    hidden, weight, targets = draw(torch.bfloat16)
    upstream = torch.tensor(1 / num_tokens)
    (found,) = torch.autograd.grad(cross_entropy_sum(hidden, weight, targets, TOKENS) * upstream, hidden)
    (unscaled,) = torch.autograd.grad(cross_entropy_sum(hidden, weight, targets, TOKENS), hidden)
    assert torch.equal(found, (unscaled.double() / num_tokens).bfloat16())


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("ignored", ["none", "some"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str
)
def test_value_and_gradients(dtype: torch.dtype, bound: float, ignored: str, chunk: int) -> None:
    hidden, weight, targets = draw(dtype, ignored)
    loss = cross_entropy_sum(hidden, weight, targets, chunk)
    (loss * 0.25).backward()
    assert hidden.grad is not None and weight.grad is not None
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert (hidden.grad.dtype, weight.grad.dtype) == (dtype, dtype)
    truth, hidden_grad, weight_grad = expected(hidden, weight, targets, 0.25)
    assert distance(loss.detach(), truth) < bound
    assert distance(hidden.grad, hidden_grad) < bound
    assert distance(weight.grad, weight_grad) < bound
    if ignored == "some":
        assert torch.count_nonzero(hidden.grad[1, 2:6]) == 0


def test_without_any_target_all_is_zero() -> None:
    hidden, weight, targets = draw(torch.float32, "all")
    loss = cross_entropy_sum(hidden, weight, targets, 5)
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    assert (loss.item(), hidden.grad.abs().max().item(), weight.grad.abs().max().item()) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    hidden, weight, targets = draw(torch.float64)
    truth, hidden_grad, weight_grad = expected(hidden, weight, targets)
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    loss = cross_entropy_sum(hidden, weight, targets, 5)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-12)
    assert loss.requires_grad == (frozen != "both")
    if frozen == "both":
        return
    loss.backward()
    trained, frozen_one, grad = (hidden, weight, hidden_grad) if frozen == "weight" else (weight, hidden, weight_grad)
    assert trained.grad is not None
    assert distance(trained.grad, grad) < 1e-14
    assert frozen_one.grad is None


def test_large_logits_neither_overflow_nor_lose_the_loss() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4], [1e4, 1e4, 0.0]])
    loss, grad = chunk_cross_entropy(logits, torch.tensor([1, 0]))
    assert loss.item() == pytest.approx(1e4 + 0.6931, abs=2e-3)
    expected_grad = torch.tensor([[1.0, -1.0, 0.0], [-0.5, 0.5, 0.0]])
    assert (grad - expected_grad).abs().max() < 1e-3


def test_gradients_of_many_chunks_are_summed_in_single_precision() -> None:
    """In bf16 a sum of 512 chunks would stop growing."""
    torch.manual_seed(0)
    hidden = torch.ones(1, 512, 2, dtype=torch.bfloat16)
    weight = torch.zeros(4, 2, dtype=torch.bfloat16).requires_grad_()
    cross_entropy_sum(hidden, weight, torch.zeros(1, 512, dtype=torch.long), 1).backward()
    assert weight.grad is not None
    assert weight.grad[:, 0].tolist() == [-384.0, 128.0, 128.0, 128.0]


class Largest(TorchDispatchMode):
    """Notes the most elements that any tensor made here has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if torch.is_tensor(tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_the_logits_of_a_batch_never_exist() -> None:
    tokens, vocab, dim, chunk = 96, 500, 4, 8
    hidden = torch.randn(2, tokens // 2, dim, requires_grad=True)
    weight = torch.randn(vocab, dim, requires_grad=True)
    targets = torch.randint(0, vocab, (2, tokens // 2))
    with Largest() as largest:
        cross_entropy_sum(hidden, weight, targets, chunk).backward()
    assert largest.elements == chunk * vocab
    with Largest() as whole:
        cross_entropy_sum(hidden, weight, targets, tokens).backward()
    assert whole.elements == tokens * vocab, "what is looked for would be seen"


def test_the_compiled_chunk_is_the_same_function() -> None:
    # eager: no C++ compiler is needed to see that it is one graph. Unwrapped: the check of shapes breaks graphs.
    compiled = torch.compile(inspect.unwrap(chunk_cross_entropy), fullgraph=True, backend="eager")
    logits, targets = torch.randn(5, 11), torch.tensor([0, 10, IGNORE, 3, 3])
    for found, truth in zip(compiled(logits, targets), chunk_cross_entropy(logits, targets), strict=True):
        assert torch.equal(found, truth)
