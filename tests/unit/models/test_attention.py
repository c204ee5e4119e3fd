"""Every backend against a dense mask, also for queries at the end of the keys, and its memory; attention to a cache.

The kernels of `flex`, `varlen` and `flash` need a GPU to train: here are the masks and bounds that they are given.
That packed documents equal each document alone, through the whole model, is held in tests/golden/test_hf_parity.py.
"""

import importlib.util
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.attention import BLOCK, Backend, attention, attention_to_cache, why_not
from models.attention_flex import block_mask
from models.attention_varlen import bounds
from tests.ranks import run_ranks

LENGTHS = (1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 37)


def draw(seq: int, heads: int, kv_heads: int, dtype: torch.dtype = torch.float64, q_len: int = 0) -> list[Tensor]:
    """Queries, keys and values of batch 2 and head_dim 6, which want gradients."""
    torch.manual_seed(seq)
    shapes = [(2, heads, q_len or seq, 6), (2, kv_heads, seq, 6), (2, kv_heads, seq, 6)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def two_rows_of_documents(seq: int) -> Tensor:
    """Number three documents in each of two rows, (2, seq), with other bounds in each."""
    cuts = torch.tensor([[1, seq], [seq // 3, seq - 1]])
    return (torch.arange(seq) >= cuts[:, :1]).long() + (torch.arange(seq) >= cuts[:, 1:]).long()


def oracle(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    """Attention as its definition says, with a dense mask."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    allowed = dense_mask(q.shape[0], q.shape[2], k.shape[2], documents)
    scores = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).masked_fill(~allowed, -math.inf)
    return scores.softmax(dim=-1) @ v


def dense_mask(batch: int, q_len: int, k_len: int, documents: Tensor | None) -> Tensor:
    """What each query sees, (batch, 1, q_len, k_len)."""
    allowed = torch.ones(k_len, k_len, dtype=torch.bool).tril().expand(batch, 1, k_len, k_len)
    if documents is not None:
        allowed = allowed & (documents[:, None, :, None] == documents[:, None, None, :])
    return allowed[:, :, k_len - q_len :]


def results(function: Any, inputs: list[Tensor], *more: Any) -> list[Tensor]:
    """Output and the gradients of queries, keys and values, for a fixed gradient of the output."""
    out = function(*inputs, *more)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * weight).sum(), inputs)]


def assert_near(found: list[Tensor], expected: list[Tensor], bound: float) -> None:
    for name, one, truth in zip(("out", "q", "k", "v")[: len(expected)], found, expected, strict=True):
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
    documents = two_rows_of_documents(seq)
    assert documents.max() == 2 or seq < 3
    assert_near(results(attention, inputs, documents, backend), results(oracle, inputs, documents), 1e-12)


ENDS = [(1, 2), (1, BLOCK + 1), (37, 3 * BLOCK + 5), (BLOCK, 2 * BLOCK), (BLOCK + 3, 2 * BLOCK + 1), (300, 301)]
"""Queries and keys: one query, one key before them, whole blocks, odd numbers of either."""


@pytest.mark.parametrize("documented", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("lengths", ENDS, ids=str)
@pytest.mark.parametrize("backend", ["sdpa", "blocked"])
def test_queries_may_be_the_end_of_the_keys(
    backend: Backend, lengths: tuple[int, int], heads: tuple[int, int], documented: bool
) -> None:
    q_len, k_len = lengths
    inputs = draw(k_len, *heads, q_len=q_len)
    documents = two_rows_of_documents(k_len) if documented else None
    found = results(attention, inputs, documents, backend)
    assert {tensor.dtype for tensor in found} == {torch.float64}
    assert_near(found, results(oracle, inputs, documents), 1e-12)


def test_strides_of_sliced_and_transposed_inputs_don_t_matter() -> None:
    """As a model gives them: (batch, seq, heads, head_dim) seen transposed, and the first keys of more."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 40, heads, 6, dtype=torch.float64).transpose(1, 2) for heads in (4, 2, 2))
    inputs = [tensor.requires_grad_() for tensor in (q[:, :, 20:30], k[:, :, :30], v[:, :, :30])]
    for backend in ("sdpa", "blocked"):
        assert_near(results(attention, inputs, None, backend), results(oracle, inputs, None), 1e-12)


def test_more_queries_than_keys_are_a_mistake() -> None:
    q, k, v = draw(4, 2, 2)
    with pytest.raises(AssertionError, match="4 queries are no end of 3 keys"):
        attention(q, k[:, :, :3], v[:, :, :3])


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
@pytest.mark.parametrize("q_len", [8 * BLOCK, 4 * BLOCK])
@pytest.mark.parametrize("backend", ["sdpa", "blocked"])
def test_no_tensor_is_as_large_as_all_scores(backend: Backend, q_len: int, documented: bool) -> None:
    seq = 8 * BLOCK
    q, k, v = (torch.randn(1, 2, length, 4, requires_grad=True) for length in (q_len, seq, seq))
    documents = torch.zeros(1, seq, dtype=torch.long) if documented else None
    with Shapes() as shapes:
        attention(q, k, v, documents, backend).sum().backward()
    assert shapes.seen
    assert max(math.prod(shape) for shape in shapes.seen) <= 2 * BLOCK * seq  # 2 heads
    with Shapes() as dense:
        oracle(q, k, v, documents).sum().backward()
    assert max(math.prod(shape) for shape in dense.seen) == 2 * q_len * seq, "what is looked for would be seen"


def test_flex_makes_no_mask_of_all_pairs() -> None:
    seq = 8 * BLOCK
    with Shapes() as shapes:
        block_mask(seq, seq, two_rows_of_documents(seq), torch.device("cpu"))
    assert max(math.prod(shape) for shape in shapes.seen) <= 4 * seq


FLEX_SIZES = [(1, 1), (200, 200), (256, 256), (5, 300), (128, 384), (257, 385), (130, 700)]


@pytest.mark.parametrize("documented", [False, True])
@pytest.mark.parametrize("lengths", FLEX_SIZES, ids=str)
def test_the_blocks_of_flex_are_those_of_the_dense_mask(lengths: tuple[int, int], documented: bool) -> None:
    q_len, k_len = lengths
    documents = two_rows_of_documents(k_len) if documented else None
    mask = block_mask(q_len, k_len, documents, torch.device("cpu"))
    dense = dense_mask(2 if documented else 1, q_len, k_len, documents)
    found = mask.mask_mod(
        torch.arange(dense.shape[0])[:, None, None, None], torch.zeros(1), torch.arange(q_len)[:, None],
        torch.arange(k_len),
    )  # fmt: skip
    assert torch.equal(found.expand(dense.shape), dense)
    # Torch's own construction from all pairs: the same blocks, the same of them whole, forward and backward.
    padded = torch.nn.functional.pad(dense, (0, -k_len % 128, 0, -q_len % 128))
    pairs = padded.unflatten(3, (-1, 128)).unflatten(2, (-1, 128)).sum(dim=(3, 5))
    whole, partial = pairs == 128 * 128, (pairs > 0) & (pairs < 128 * 128)
    for expected, counts, indices, transposed in (
        (partial, mask.kv_num_blocks, mask.kv_indices, False),
        (whole, mask.full_kv_num_blocks, mask.full_kv_indices, False),
        (partial, mask.q_num_blocks, mask.q_indices, True),
        (whole, mask.full_q_num_blocks, mask.full_q_indices, True),
    ):
        assert torch.equal(listed(counts, indices, expected.transpose(2, 3).shape if transposed else expected.shape),
                           expected.transpose(2, 3) if transposed else expected)  # fmt: skip


def listed(counts: Tensor, indices: Tensor, shape: torch.Size) -> Tensor:
    """The blocks that a BlockMask lists, as a mask."""
    chosen = torch.arange(shape[-1]) < counts[..., None]
    return torch.zeros(shape, dtype=torch.long).scatter_add(-1, indices[..., : shape[-1]].long(), chosen.long()) == 1


def test_flex_gives_what_the_dense_mask_gives() -> None:
    """Forward only and uncompiled: torch has neither a backward pass for CPUs nor fp64 in the compiled kernel."""
    run_ranks(1, compare_flex)  # in a process without the checks of shapes, which torch's tracing stumbles over


def compare_flex() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    q_len, k_len = 130, 300
    q, k, v = (tensor.detach() for tensor in draw(k_len, 4, 2, q_len=q_len))
    documents = two_rows_of_documents(k_len)
    mask = block_mask(q_len, k_len, documents, q.device)
    with warnings.catch_warnings(action="ignore"):  # that uncompiled it holds all scores
        found = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    assert isinstance(found, Tensor)
    assert_near([found], [oracle(q, k, v, documents)], 1e-12)


@pytest.mark.parametrize("documented", [False, True])
@pytest.mark.parametrize("lengths", [(7, 7), (3, 7), (1, 2), (40, 41), (50, 200), (200, 200)], ids=str)
def test_segments_alone_give_what_the_dense_mask_gives(lengths: tuple[int, int], documented: bool) -> None:
    """The bounds that variable-length kernels get, and the bottom-right mask that they apply to each segment."""
    q_len, k_len = lengths
    inputs = draw(k_len, 4, 2, q_len=q_len)
    documents = two_rows_of_documents(k_len) if documented else None

    def by_segments(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        starts_q, starts_k = bounds(q_len, k_len, 2, documents, q.device)
        assert starts_q.dtype == starts_k.dtype == torch.int32
        assert starts_q[-1] == 2 * q_len and starts_k[-1] == 2 * k_len
        flat_q, flat_k, flat_v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (q, k, v))
        outs = []
        for segment in range(len(starts_q) - 1):
            own_q = slice(int(starts_q[segment]), int(starts_q[segment + 1]))
            own_k = slice(int(starts_k[segment]), int(starts_k[segment + 1]))
            if own_q.start < own_q.stop:
                parts = (flat_q[own_q], flat_k[own_k], flat_v[own_k])
                outs.append(oracle(*[part.transpose(0, 1)[None] for part in parts], documents=None)[0].transpose(0, 1))
        return torch.cat(outs).unflatten(0, (2, q_len)).transpose(1, 2)

    assert_near(results(by_segments, inputs), results(oracle, inputs, documents), 1e-12)


def test_a_backend_says_why_it_does_not_run() -> None:
    bf16, fp64 = torch.bfloat16, torch.float64
    gpus = "its kernels are for GPUs"
    assert [why_not(backend, device, fp64) for backend in ("sdpa", "blocked") for device in ("cpu", "cuda")] == [""] * 4
    assert why_not("flex", "cpu", bf16) == "torch has no backward pass of FlexAttention on CPUs"
    assert (why_not("varlen", "cpu", bf16), why_not("flash", "cpu", bf16)) == (gpus, gpus)
    assert (why_not("flex", "cuda", fp64), why_not("varlen", "cuda", bf16)) == ("", "")
    assert why_not("varlen", "cuda", fp64) == why_not("flash", "cuda", fp64) == "its kernels take 16-bit formats only"
    if importlib.util.find_spec("flash_attn") is None:
        assert why_not("flash", "cuda", bf16) == "the package flash-attn is not installed"


def test_torch_still_lacks_flex_gradients_on_cpus() -> None:
    """The reason of the refusal; when this fails, lift it."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = draw(4, 2, 2)
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        flex_attention(q, k, v)


@pytest.mark.parametrize(("known", "new"), [(7, 7), (7, 1), (7, 3)])
def test_attention_to_a_cache_gives_the_last_rows(known: int, new: int) -> None:
    q, k, v = draw(known, 4, 2)
    found = attention_to_cache(q[:, :, known - new :], k, v)
    assert (found - oracle(q, k, v, None)[:, :, known - new :]).abs().max() < 1e-14
