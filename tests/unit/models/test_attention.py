"""The blocked kernel against torch's, against a dense mask, and its memory; attention to a cache.

That packed documents equal each document alone, through the whole model, is held in tests/golden/test_hf_parity.py.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.attention import BLOCK, Backend, attention, attention_to_cache

LENGTHS = (1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 37)


def draw(seq: int, heads: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys and values of batch 2 and head_dim 6, which want gradients."""
    torch.manual_seed(seq)
    shapes = [(2, count, seq, 6) for count in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def oracle(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    """Attention as its definition says, with a dense mask."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    seq = q.shape[2]
    allowed = torch.ones(seq, seq, dtype=torch.bool).tril().expand(q.shape[0], 1, seq, seq)
    if documents is not None:
        allowed = allowed & (documents[:, None, :, None] == documents[:, None, None, :])
    scores = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).masked_fill(~allowed, -math.inf)
    return scores.softmax(dim=-1) @ v


def results(function: Any, inputs: list[Tensor], *more: Any) -> list[Tensor]:
    """Output and the gradients of queries, keys and values, for a fixed gradient of the output."""
    out = function(*inputs, *more)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * weight).sum(), inputs)]


def assert_near(found: list[Tensor], expected: list[Tensor], bound: float) -> None:
    for name, one, truth in zip(("out", "q", "k", "v"), found, expected, strict=True):
        error = (one.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30)
        # With one key the weights don't depend on the scores: the true gradients of q and k are zero.
        if truth.norm() < 1e-12:
            assert one.norm() < 1e-12, name
        else:
            assert error < bound, f"{name}: {error:.2e}"


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("seq", LENGTHS)
@pytest.mark.parametrize("backend", ["sdpa", "blocked"])
def test_every_backend_is_exact(backend: Backend, seq: int, heads: tuple[int, int]) -> None:
    inputs = draw(seq, *heads)
    assert_near(results(attention, inputs, None, backend), results(oracle, inputs, None), 1e-12)


@pytest.mark.parametrize("backend", ["sdpa", "blocked"])
@pytest.mark.parametrize("seq", LENGTHS[1:])
def test_documents_equal_a_dense_mask(backend: Backend, seq: int) -> None:
    inputs = draw(seq, 4, 2)
    cuts = torch.tensor([[1, seq], [seq // 3, seq - 1]])
    documents = (torch.arange(seq) >= cuts[:, :1]).long() + (torch.arange(seq) >= cuts[:, 1:]).long()
    assert documents.max() == 2 or seq < 3
    assert_near(results(attention, inputs, documents, backend), results(oracle, inputs, documents), 1e-12)


def test_each_document_alone_gives_the_same() -> None:
    lengths = [BLOCK // 2, 1, BLOCK + 3, 11]
    q, k, v = draw(sum(lengths), 4, 2)
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).expand(2, -1)
    found = attention(q, k, v, documents, "blocked").split(lengths, dim=2)
    parts = (tensor.split(lengths, dim=2) for tensor in (q, k, v))
    for one, own_q, own_k, own_v in zip(found, *parts, strict=True):
        assert (one - attention(own_q, own_k, own_v, None, "sdpa")).abs().max() < 1e-14


def test_no_later_token_is_seen() -> None:
    q, k, v = draw(BLOCK + 9, 4, 2)
    changed = BLOCK - 1
    before = attention(q, k, v, None, "blocked")
    with torch.no_grad():
        k[:, :, changed:] += 1
        v[:, :, changed:] += 1
    after = attention(q, k, v, None, "blocked")
    assert torch.equal(before[:, :, :changed], after[:, :, :changed])
    assert not torch.equal(before[:, :, changed], after[:, :, changed])


@pytest.mark.parametrize("documented", [False, True])
def test_bf16_stays_near(documented: bool) -> None:
    inputs = draw(2 * BLOCK + 37, 4, 2, torch.bfloat16)
    seq = inputs[0].shape[2]
    documents = (torch.arange(seq) >= 50).long().expand(2, -1) if documented else None
    found = results(attention, inputs, documents, "blocked")
    assert {tensor.dtype for tensor in found} == {torch.bfloat16}
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    assert_near(found, results(oracle, exact, documents), 1e-2)


class Shapes(TorchDispatchMode):
    """Records the shape of every tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen += [tuple(t.shape) for t in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(t)]
        return out


@pytest.mark.parametrize("documented", [False, True])
def test_no_tensor_is_as_large_as_all_scores(documented: bool) -> None:
    seq = 8 * BLOCK
    q, k, v = (torch.randn(1, 2, seq, 4, requires_grad=True) for _ in range(3))
    documents = torch.zeros(1, seq, dtype=torch.long) if documented else None
    with Shapes() as shapes:
        attention(q, k, v, documents, "blocked").sum().backward()
    assert max(math.prod(shape[-2:]) for shape in shapes.seen if len(shape) > 1) <= 2 * BLOCK * seq
    assert not [shape for shape in shapes.seen if shape[-2:] == (seq, seq)]
    with Shapes() as dense:
        oracle(q, k, v, documents).sum().backward()
    assert [shape for shape in dense.seen if shape[-2:] == (seq, seq)], "what is looked for would be seen"


@pytest.mark.parametrize(("known", "new"), [(7, 7), (7, 1), (7, 3)])
def test_attention_to_a_cache_gives_the_last_rows(known: int, new: int) -> None:
    q, k, v = draw(known, 4, 2)
    found = attention_to_cache(q[:, :, known - new :], k, v)
    assert (found - oracle(q, k, v, None)[:, :, known - new :]).abs().max() < 1e-14
