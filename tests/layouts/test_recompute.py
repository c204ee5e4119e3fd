"""Recompute changes what is kept for the backward pass, counted in bytes, and not one bit of a gradient."""

import functools
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configs.check import resolve
from configs.schema import RecomputeConfig
from models.attention import Backend
from models.llama import Llama
from models.rope import rope_table
from parallel.fsdp import fsdp_roots, shard
from parallel.mesh import build_layout
from parallel.recompute import recompute
from tests.ranks import ranks
from tests.training import Trained, layout_config, train_on

BATCH, SEQ, DIM, KV_WIDTH, FFN, HEADS, LAYERS = 2, 256, 64, 32, 192, 4, 4
UNIT = BATCH * SEQ * DIM * 4
"""Bytes of the residual stream."""


class LiveBytes(TorchDispatchMode):
    """Count the bytes of storages that operations made and that live still."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in given | self._seen:
                    self._seen.add(key)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._free, key, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _free(self, key: int, count: int) -> None:
        self._seen.discard(key)
        self.live -= count


def count_bytes(mode: str, every_blocks: int = 1, backend: Backend = "sdpa") -> tuple[int, int]:
    """Bytes kept by the forward pass of the blocks, without their output, and the peak of both passes."""
    config = layout_config(
        1,
        model={"vocab_size": 8, "dim": DIM, "num_layers": LAYERS, "num_heads": HEADS, "num_kv_heads": 2,
               "head_dim": 16, "ffn_dim": FFN},
        precision={"compute": "fp32", "master": "fp32"},
    )  # fmt: skip
    model_config = resolve(config, 1).model
    torch.manual_seed(0)
    blocks = list(Llama(model_config, backend).layers.values())
    recompute(blocks, RecomputeConfig(mode=mode, every_blocks=every_blocks))  # pyright: ignore[reportArgumentType]
    x = torch.randn(BATCH, SEQ, DIM, requires_grad=True)
    cos, sin = rope_table(model_config, torch.arange(SEQ)[None], x.dtype)
    with LiveBytes() as counted:
        for block in blocks:
            x = block(x, cos, sin, None)
        kept = counted.live - UNIT
        x.sum().backward()
    return kept, counted.peak


def test_kept_bytes_fall_from_none_to_selective_to_full() -> None:
    kept, peak = zip(*(count_bytes(mode) for mode in ("none", "selective", "full")), strict=True)
    assert kept[0] > kept[1] > kept[2]
    assert peak[0] > peak[1] > peak[2]


def test_full_keeps_the_inputs_of_blocks_and_nothing_else() -> None:
    kept, _ = count_bytes("full")
    assert kept == (LAYERS - 1) * UNIT  # the first block's input was there before


def test_selective_keeps_attention_and_every_other_matrix_product() -> None:
    kept, _ = count_bytes("selective")
    keys, output_projection, up_projection = UNIT * KV_WIDTH // DIM, UNIT, UNIT * FFN // DIM
    attention = UNIT + BATCH * SEQ * HEADS * 4  # and a log-sum-exp a head
    assert kept == (LAYERS - 1) * UNIT + LAYERS * (keys + output_projection + up_projection + attention)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_every_second_block_saves_half(mode: str) -> None:
    none, every, second = count_bytes("none")[0], count_bytes(mode)[0], count_bytes(mode, 2)[0]
    # A block that is kept whole holds the input of a recomputed one, and its own.
    assert second == pytest.approx((none + every) / 2, abs=UNIT)


def test_a_pass_without_gradients_keeps_nothing() -> None:
    with torch.no_grad():
        torch.manual_seed(0)
        config = resolve(layout_config(1, precision={"compute": "fp32", "master": "fp32"}), 1)
        model = Llama(config.model)
        tokens = torch.arange(SEQ)[None] % config.model.vocab_size
        plain = model(tokens)
        recompute(list(model.layers.values()), RecomputeConfig(mode="selective"))
        with LiveBytes() as counted:
            again = model(tokens)
        assert torch.equal(plain, again)
        assert counted.live == again.nbytes


def test_names_and_classes_stay_what_they_are() -> None:
    model = Llama(resolve(layout_config(1, model={"num_layers": 4}), 1).model)
    blocks = list(model.layers.values())
    names, kinds = [name for name, _ in model.named_parameters()], {type(block) for block in blocks}
    recompute(blocks, RecomputeConfig(mode="full", every_blocks=3))
    assert [name for name, _ in model.named_parameters()] == names
    assert [type(block).__name__ for block in blocks] == ["RecomputedBlock", "Block", "Block", "RecomputedBlock"]
    assert all(isinstance(block, kind) for block in blocks for kind in kinds)


@functools.cache
def trained(n: int, mode: str, every_blocks: int = 1, **parallel: Any) -> Trained:
    """Two steps in bf16, where another order of operations would show at once."""
    config = layout_config(
        2,
        model={"num_layers": 4},
        precision={"compute": "bf16", "master": "fp32"},
        data={"micro_batch_size": 3},
        recompute={"mode": mode, "every_blocks": every_blocks},
        parallel=parallel,
    )
    return train_on(n, config)


def assert_same_bits(found: Trained, truth: Trained) -> None:
    assert (found.losses, found.norms, found.heldout) == (truth.losses, truth.norms, truth.heldout)
    for mine, theirs in ((found.grads, truth.grads), (found.weights, truth.weights)):
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.equal(mine[name], tensor), name


@pytest.mark.parametrize(("mode", "every_blocks"), [("full", 1), ("full", 2), ("selective", 1), ("selective", 3)])
@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.long), 2])
def test_recompute_trains_the_same_bits(n: int, mode: str, every_blocks: int) -> None:
    assert_same_bits(trained(n, mode, every_blocks), trained(n, "none"))


@pytest.mark.parametrize(
    "parallel",
    [
        {"prefetch_blocks": 2},
        pytest.param({"prefetch_blocks": 9}, marks=pytest.mark.long),
        pytest.param({"cpu_offload": True}, marks=pytest.mark.long),
        {"cpu_offload": True, "prefetch_blocks": 1, "accumulate": "unsharded"},
    ],
    ids=["prefetch 2", "prefetch more than there are", "offload", "offload, prefetch, unsharded"],
)
def test_prefetch_and_offload_train_the_same_bits(parallel: dict[str, Any]) -> None:
    plain = {"accumulate": parallel["accumulate"]} if "accumulate" in parallel else {}
    assert_same_bits(trained(2, "selective", **parallel), trained(2, "none", **plain))


@ranks(1)
def test_the_roots_of_a_container_of_stages_are_the_stages() -> None:
    config = resolve(layout_config(1), 1)
    layout = build_layout(config.parallel, torch.device("cpu"))
    stages = [Llama(config.model) for _ in range(2)]
    for stage in stages:
        shard(stage, list(stage.layers.values()), layout.shards, config.parallel, config.precision)
    assert fsdp_roots(stages[0]) == [stages[0]]
    # As a pipeline's container does: blocks by their own names first, then the stages that they are parts of.
    blocks = [block for stage in stages for block in stage.layers.values()]
    assert fsdp_roots(torch.nn.ModuleList([*blocks, *stages])) == stages
