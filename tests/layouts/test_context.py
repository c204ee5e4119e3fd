"""Context parallelism against one process: attention, a whole model, its collectives, its graph, and its work."""

import math
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from configs.schema import ModelConfig
from engine.compiler import CONTEXT_COMPILES_FROM
from engine.data.batches import IGNORE, Batch
from engine.loss import cross_entropy_sum
from models.attention import Backend, attention
from models.llama import Block, Llama
from models.rope import rope_table
from parallel.context import context_attention, held_positions, imbalance, natural_order, ranks_parts, work
from tests.ranks import run_ranks

SEQ, BATCH = 48, 2
MODEL = ModelConfig(
    vocab_size=67, dim=20, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, ffn_dim=28, max_seq_len=SEQ
)


def axis(n: int) -> DeviceMesh:
    return init_device_mesh("cpu", (n,), mesh_dim_names=("cp",))


def packed(seq: int) -> Tensor:
    """Documents of other lengths in each row, some longer than a chunk, one of a single token; (BATCH, seq)."""
    lengths = ([seq // 2 - 3, 1, seq // 3], [5, seq // 4])
    rows = [
        torch.repeat_interleave(torch.arange(len(own) + 1), torch.tensor([*own, seq - sum(own)])) for own in lengths
    ]
    return torch.stack(rows)


def places_in_documents(documents: Tensor) -> Tensor:
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    places = torch.arange(documents.shape[1])
    return places - torch.where(begins, places, 0).cummax(dim=1).values


def a_batch(documented: bool) -> Batch:
    """Tokens with unequal numbers of targets per row and per half, some positions without any."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(MODEL.vocab_size, (BATCH, SEQ + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[0, SEQ // 3 :] = IGNORE
    targets[1, 7:11] = IGNORE
    documents = packed(SEQ) if documented else None
    positions = None if documents is None else places_in_documents(documents)
    return Batch(tokens[:, :-1].contiguous(), targets, positions, documents, 100)


def a_model(backend: Backend) -> Llama:
    torch.manual_seed(1)
    return Llama(MODEL, backend).to(torch.float64)


def loss_and_gradients(model: Llama, batch: Batch) -> dict[str, Tensor]:
    """Sums over the batch's targets, not means: those of parts of the sequence add up."""
    hidden = model(batch.tokens, batch.positions, batch.documents)
    loss_sum = cross_entropy_sum(hidden, model.lm_head.weight, batch.targets, 16)
    loss_sum.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss_sum": loss_sum.detach(), **found}


def attend_here(n: int, backend: Backend, documented: bool) -> list[Tensor]:
    """This rank's output and gradients of attention on its part of known queries, keys and values."""
    mesh = axis(n)
    q, k, v, weight = known_inputs()
    mine = held_positions(SEQ, n, mesh.get_local_rank())
    parts = [tensor[:, :, mine].requires_grad_() for tensor in (q, k, v)]
    attend = context_attention(lambda q, k, v, documents: attention(q, k, v, documents, backend), mesh)
    q, k, v = parts
    out = attend(q, k, v, packed(SEQ) if documented else None)
    return [out.detach(), *torch.autograd.grad((out * weight[:, :, mine]).sum(), parts)]


def known_inputs() -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.randn(BATCH, heads, SEQ, 6, dtype=torch.float64) for heads in (4, 2, 2, 4)]


@pytest.mark.parametrize("documented", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "blocked"])
@pytest.mark.parametrize("n", [2, 4])
def test_attention_and_its_gradients_equal_one_process(n: int, backend: Backend, documented: bool) -> None:
    q, k, v, weight = known_inputs()
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    out = attention(q, k, v, packed(SEQ) if documented else None, "blocked")
    expected = [out, *torch.autograd.grad((out * weight).sum(), inputs)]
    ranks = run_ranks(n, attend_here, n, backend, documented)
    for name, parts, truth in zip(("out", "q", "k", "v"), zip(*ranks, strict=True), expected, strict=True):
        error = (natural_order(list(parts), 2) - truth).norm() / truth.norm()
        assert error < 1e-12, f"{name}: {error:.2e}"


def train_here(n: int, backend: Backend, documented: bool) -> dict[str, Tensor]:
    """Loss and gradients of this rank's part of the batch, summed over cp."""
    mesh = axis(n)
    index = mesh.get_local_rank()
    model = a_model(backend)
    for module in model.layers.values():
        block = cast(Block, module)
        block.self_attn.attend = context_attention(block.self_attn.attend, mesh)
    batch = a_batch(documented).part(held_positions(SEQ, n, index), counts_bytes=index == 0)
    assert batch.tokens.shape == (BATCH, SEQ // n)
    assert batch.num_bytes == (100 if index == 0 else 0)
    found = loss_and_gradients(model, batch)
    for value in found.values():
        dist.all_reduce(value)
    return found


@pytest.mark.parametrize("documented", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "blocked"])
@pytest.mark.parametrize("n", [2, 4])
def test_a_model_and_its_gradients_equal_one_process(n: int, backend: Backend, documented: bool) -> None:
    expected = loss_and_gradients(a_model(backend), a_batch(documented))
    found = run_ranks(n, train_here, n, backend, documented)[0]
    assert found.keys() == expected.keys()
    for name, truth in expected.items():
        error = (found[name] - truth).norm() / truth.norm()
        assert error < 1e-10, f"{name}: {error:.2e}"


def test_the_targets_of_the_parts_are_unequal() -> None:
    """Otherwise a mean over ranks would pass for a sum over targets."""
    batch = a_batch(True)
    counts = [(batch.part(held_positions(SEQ, 4, index), counts_bytes=False).targets != IGNORE).sum().item()
              for index in range(4)]  # fmt: skip
    assert len(set(counts)) == 4 and sum(counts) == (batch.targets != IGNORE).sum()


class Operations(TorchDispatchMode):
    """Records the largest tensor and counts the collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.collectives: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = [t for t in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(t)]
        self.largest = max([self.largest, *(math.prod(tensor.shape) for tensor in found)])
        if func.namespace == "_c10d_functional" and "wait" not in str(func):
            self.collectives.append(func._overloadpacket.__name__)
        return out


def operations_here(n: int, backend: Backend, seq: int, documented: bool) -> tuple[int, list[str]]:
    mesh = axis(n)
    q, k, v = (torch.randn(1, 2, seq // n, 4, requires_grad=True) for _ in range(3))
    attend = context_attention(lambda q, k, v, documents: attention(q, k, v, documents, backend), mesh)
    with Operations() as operations:
        attend(q, k, v, torch.zeros(1, seq, dtype=torch.long) if documented else None).sum().backward()
    return operations.largest, operations.collectives


@pytest.mark.parametrize(("backend", "documented"), [("sdpa", False), ("blocked", False), ("blocked", True)])
def test_no_tensor_holds_all_scores_and_keys_travel_once(backend: Backend, documented: bool) -> None:
    n, seq = 2, 1024
    for largest, collectives in run_ranks(n, operations_here, n, backend, seq, documented):
        assert largest <= 2 * 128 * seq  # 2 heads, a block of queries; all scores of a chunk are twice as many
        assert collectives == ["all_gather_into_tensor", "reduce_scatter_tensor"]


def compile_here(n: int, backend: Backend, documented: bool) -> list[tuple[float, int]]:
    """Differences of two compiled blocks to the same blocks uncompiled, and graphs compiled so far, for each."""
    from torch._dynamo.utils import counters

    mesh = axis(n)
    index = mesh.get_local_rank()
    torch.manual_seed(1)
    batch = a_batch(documented).part(held_positions(SEQ, n, index), counts_bytes=False)
    assert batch.positions is not None
    cos, sin = rope_table(MODEL, batch.positions, torch.float32)
    found: list[tuple[float, int]] = []
    for _ in range(2):
        block = Block(MODEL, backend)
        block.self_attn.attend = context_attention(block.self_attn.attend, mesh)
        results: list[list[Tensor]] = []
        x = torch.randn(BATCH, SEQ // n, MODEL.dim)
        for compiled in (False, True):
            if compiled:
                # All but the last stage of the compiler, which knows nothing of cp and takes a minute.
                block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
            own = x.clone().requires_grad_()
            out = block(own, cos, sin, batch.documents)
            results.append([out, *torch.autograd.grad(out.square().sum(), [own, *block.parameters()])])
        difference = max(float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True))
        found.append((difference, counters["stats"]["unique_graphs"]))
    return found


@pytest.mark.parametrize(
    ("backend", "documented"), [pytest.param("sdpa", False, marks=pytest.mark.long), ("blocked", True)]
)
def test_blocks_compile_to_one_graph(backend: Backend, documented: bool) -> None:
    if torch.__version__ < CONTEXT_COMPILES_FROM:  # as versions; refused, see tests/unit/engine/test_compiler.py
        return
    for first, second in run_ranks(2, compile_here, 2, backend, documented):
        assert max(first[0], second[0]) < 1e-5
        assert (first[1], second[1]) == (1, 1)


@given(st.integers(1, 9), st.integers(1, 7), st.integers(0, 2), st.data())
def test_unshard_of_shard_is_the_identity(degree: int, chunk: int, dim: int, data: st.DataObject) -> None:
    shape = [2, 3, 1]
    shape[dim] = 2 * degree * chunk
    whole = torch.arange(math.prod(shape)).view(shape)
    parts = ranks_parts(whole, degree, dim)
    assert torch.equal(natural_order(parts, dim), whole)
    index = data.draw(st.integers(0, degree - 1))
    assert torch.equal(parts[index], whole.index_select(dim, held_positions(shape[dim], degree, index)))


@given(st.integers(1, 9), st.integers(1, 7))
def test_every_position_is_held_once(degree: int, chunk: int) -> None:
    held = torch.cat([held_positions(2 * degree * chunk, degree, index) for index in range(degree)])
    assert torch.equal(held.sort().values, torch.arange(2 * degree * chunk))


def test_a_sequence_that_does_not_divide_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="12 positions, rank 0 of 4"):
        held_positions(12, 4, 0)


def test_causal_work_is_the_same_on_every_rank() -> None:
    counts = work(8192, 8)
    assert sum(counts) == 8192 * 8193 // 2
    assert imbalance(counts) == 1.0


def test_work_with_documents_is_counted_by_pairs() -> None:
    documents = packed(SEQ)
    seen = (documents[:, :, None] == documents[:, None, :]) & torch.ones(SEQ, SEQ, dtype=torch.bool).tril()
    expected = [int(seen[:, held_positions(SEQ, 4, index)].sum()) for index in range(4)]
    assert work(SEQ, 4, documents) == expected
    assert imbalance(expected) == pytest.approx(max(expected) / (sum(expected) / 4)) != 1.0
