"""Tensor parallelism: the same run as one process, the collectives it costs, what a rank holds, and chunked logits."""

import functools
import inspect
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from configs.check import resolve
from configs.errors import ConfigError
from configs.schema import CompileConfig
from engine.compiler import check_compiler
from engine.data.batches import IGNORE
from engine.loss import chunk_cross_entropy, cross_entropy_sum
from models.llama import Llama
from models.rope import rope_table
from parallel.apply import build_model
from parallel.mesh import build_layout
from parallel.tensor import split_tensors
from tests.ranks import ranks, run_ranks
from tests.training import Trained, assert_same, layout_config, train_here, train_on

BIASES = {"attention_bias": True, "mlp_bias": True, "num_layers": 2}


@functools.cache
def one_process(kv_heads: int, tied: bool, documents: bool) -> Trained:
    model = BIASES | {"num_kv_heads": kv_heads, "tie_embeddings": tied}
    return train_on(1, layout_config(3, model=model), documents)


@pytest.mark.parametrize(
    ("n", "parallel", "kv_heads", "tied", "documents"),
    [
        (2, {"tp": 2}, 1, True, True),
        pytest.param(4, {"tp": 4}, 4, False, False, marks=pytest.mark.long),
        (4, {"tp": 4}, 1, True, True),
        pytest.param(4, {"tp": 2, "dp_shard": 2}, 1, True, True, marks=pytest.mark.long),
        pytest.param(*(4, {"tp": 2, "dp_shard": 2, "accumulate": "unsharded"}, 2, False, True), marks=pytest.mark.long),
    ],
)
def test_split_matrices_train_the_same_run(
    n: int, parallel: dict[str, Any], kv_heads: int, tied: bool, documents: bool
) -> None:
    """Degrees above the number of KV heads hold these whole; gradients of what is whole are summed over the ranks."""
    model = BIASES | {"num_kv_heads": kv_heads, "tie_embeddings": tied}
    found = train_on(
        n, layout_config(3, model=model, parallel=parallel, data={"micro_batch_size": 3}), documents=documents
    )
    assert_same(found, one_process(kv_heads, tied, documents), 1e-10)


class Seen(TorchDispatchMode):
    """Counts the collectives, and notes the most rows of any tensor with so many columns."""

    def __init__(self, columns: int = -1) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.columns, self.rows = columns, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "_c10d_functional" and "wait" not in func.__name__:
            self.calls[func.__name__.split(".")[0]] += 1
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if torch.is_tensor(tensor) and tensor.dim() == 2 and tensor.shape[1] == self.columns:
                self.rows = max(self.rows, tensor.shape[0])
        return out


def split_model(tp: int, **model: Any) -> Llama:
    """A model of one block, split, without FSDP; its values don't matter."""
    config = resolve(layout_config(1, model={"num_layers": 1} | model, parallel={"tp": tp}), tp)
    with torch.device("meta"):
        whole = Llama(config.model)
    split_tensors(whole, init_device_mesh("cpu", (tp,), mesh_dim_names=("tp",)))
    whole.to_empty(device="cpu")
    for parameter in whole.parameters():
        nn.init.ones_(parameter)
    return whole


@ranks(2)
def test_a_block_gathers_twice_and_scatters_twice_each_way() -> None:
    model = split_model(2, **BIASES | {"num_layers": 1})
    x = torch.randn(2, 12, 20, requires_grad=True)  # (batch, seq/tp, dim)
    cos, sin = rope_table(model.config, torch.arange(24)[None], torch.float32)
    twice = {"all_gather_into_tensor": 2, "reduce_scatter_tensor": 2}
    with Seen() as forward:
        out = model.layers["0"](x, cos, sin)
    assert (forward.calls, out.shape) == (twice, x.shape)
    with Seen() as backward:
        out.sum().backward()
    assert backward.calls == twice


@pytest.mark.parametrize("tied", [False, True])
@ranks(2)
def test_the_logits_that_exist_are_a_chunk_of_a_shard(tied: bool) -> None:
    chunk, rows = 24, 68 // 2  # more than dim, which is the rows of the transposed weight
    model = split_model(2, tie_embeddings=tied)
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied
    for batch in (2, 6):
        tokens = torch.randint(68, (batch, 24))
        with Seen(columns=rows) as seen:
            cross_entropy_sum(model(tokens), model.lm_head.weight, tokens, chunk).backward()
        assert seen.rows == chunk
        assert seen.calls["all_reduce"] == 2 * batch * 24 // chunk
    with Seen(columns=rows) as whole:
        cross_entropy_sum(model(tokens), model.lm_head.weight, tokens, 144)
    assert whole.rows == 144, "what is looked for would be seen"


@pytest.mark.parametrize("chunk", [5, 100])
@ranks(2)
def test_every_rank_has_the_whole_loss_and_its_part_of_the_gradients(chunk: int) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 7, 8).double(), 30 * torch.randn(38, 8).double()  # logits that would overflow
    targets = torch.randint(38, (3, 7))
    targets[1, 2:6] = IGNORE
    mine, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    whole = weight.clone().requires_grad_()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    split = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
    truth = cross_entropy_sum(theirs, whole, targets, chunk)
    loss = cross_entropy_sum(mine, split, targets, chunk)
    truth.backward()
    loss.backward()
    assert loss.item() == pytest.approx(truth.item(), rel=1e-13)
    assert mine.grad is not None and theirs.grad is not None
    torch.distributed.all_reduce(mine.grad)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    assert isinstance(split.grad, DTensor)
    torch.testing.assert_close(split.grad.full_tensor(), whole.grad, rtol=1e-12, atol=1e-12)
    # One graph: the compiler's own kernels are test_compile.py's.
    compiled = torch.compile(inspect.unwrap(chunk_cross_entropy), fullgraph=True, backend="eager", dynamic=False)
    again = cross_entropy_sum(mine, split, targets, chunk, compiled)
    assert again.item() == loss.item()


@pytest.mark.parametrize(("n", "vocab"), [(6, 20), (6, 8)])
def test_uneven_and_empty_parts_are_where_they_say(n: int, vocab: int) -> None:
    """10 rows of a shard of tp over 3 ranks of FSDP; 4 rows leave the third rank with none."""
    run_ranks(n, fill_by_place, vocab)


def fill_by_place(vocab: int) -> None:
    """Fill each rank's rectangle with the numbers of its elements and compare the whole."""
    model = {"vocab_size": vocab, "num_layers": 1, "attention_bias": True}
    config = layout_config(1, model=model, parallel={"tp": 2}, data={"global_batch_size": 3})
    config = resolve(config, 6)

    def numbered(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)

    def fill(local: torch.Tensor, name: str, shape: tuple[int, ...], offset: tuple[int, ...]) -> None:
        part = tuple(slice(begin, begin + size) for begin, size in zip(offset, local.shape, strict=True))
        local.copy_(numbered(shape)[part])

    built = build_model(config, build_layout(config.parallel, torch.device("cpu")), fill)
    for name, parameter in built.named_parameters():
        whole = parameter.full_tensor().detach()  # pyright: ignore[reportAttributeAccessIssue]
        assert torch.equal(whole, numbered(tuple(whole.shape))), name


def count_graphs(config: Any) -> tuple[list[float], int]:
    import torch._dynamo.utils as dynamo

    found = train_here(config, False)
    return (found.losses + found.norms if found else []), dynamo.counters["stats"]["unique_graphs"]


@pytest.mark.long
def test_compiled_blocks_are_one_graph_and_the_eager_run() -> None:
    try:
        check_compiler(CompileConfig(blocks=True), torch.device("cpu"))
    except ConfigError as error:
        pytest.skip(str(error))
    small = {"model": {"num_layers": 3}, "precision": {"compute": "fp32", "master": "fp32"}, "parallel": {"tp": 2}}
    eager, none = run_ranks(2, count_graphs, layout_config(2, **small))[0]
    config = layout_config(2, **small, compile={"blocks": True})
    compiled, graphs = run_ranks(2, count_graphs, config, timeout_s=400)[0]
    assert (none, graphs) == (0, 2)  # with and without gradients
    assert compiled == pytest.approx(eager, rel=1e-4)


@ranks(2)
def test_what_the_plan_does_not_know_is_not_left_whole() -> None:
    with torch.device("meta"):
        model = Llama(resolve(layout_config(1), 2).model)
        model.layers["0"].add_module("extra", nn.Linear(2, 2))
    with pytest.raises(AssertionError, match=r"layers\.0\.extra has parameters and no line in the plan"):
        split_tensors(model, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
