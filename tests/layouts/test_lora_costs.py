"""What an adapter costs: collectives, bytes and matrix products, counted; what is frozen has none of its own."""

import gc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from configs.check import resolve
from configs.schema import CheckpointConfig, Config
from engine.build import build_passes
from engine.checkpoint.checkpointer import Checkpointer
from engine.fault.guard import Guard
from engine.loss import chunk_cross_entropy, next_token
from engine.optim import build_optimizer
from engine.step import train_step
from engine.weights import starting_weights
from models.adapters import attach
from models.linear import Linear
from models.llama import Llama
from models.quantized import held_bytes, quantize_frozen
from models.rope import rope_table
from parallel.apply import build_model
from parallel.fsdp import free_gathered
from parallel.materialise import local_part
from parallel.mesh import build_layout
from parallel.tensor import split_tensors
from tests.ranks import ranks, run_ranks
from tests.training import adapted_batch, layout_config, my_microbatches

RANK = 5  # no other dim has it
TARGETS = ["all-linear", "embed_tokens", "lm_head"]
BIASES = {"num_layers": 1, "attention_bias": True, "mlp_bias": True}


class Calls(TorchDispatchMode):
    """Counts operators by name, and lists the collectives with the shape of what they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.collectives: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        self.operators[name] += 1
        # FSDP calls the process group, tensor parallelism the functional operators.
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in name:
            given = [arg for arg in args if isinstance(arg, Tensor)]
            self.collectives.append((name.strip("_"), tuple(given[-1].shape) if given else ()))
        return func(*args, **(kwargs or {}))

    @property
    def products(self) -> int:
        """Matrix products."""
        return sum(self.operators[name] for name in ("mm", "addmm", "bmm", "baddbmm"))

    def kinds(self) -> Counter[str]:
        """Count the collectives by name."""
        return Counter(name for name, _ in self.collectives)


# ---- collectives of the activations


def split_model(adapter: dict[str, Any]) -> Llama:
    """One block over two ranks of tp, without FSDP; its values don't matter."""
    config = resolve(layout_config(1, model=BIASES, adapter=adapter, parallel={"tp": 2}), 2)
    with torch.device("meta"):
        model = Llama(config.model)
        attach(model, config.adapter)
    split_tensors(model, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.1)
    return model


def count_block(adapter: dict[str, Any]) -> tuple[Counter[str], Counter[str]]:
    """Collectives of a block's forward and backward."""
    model = split_model(adapter)
    x = torch.randn(2, 12, 20, requires_grad=True)  # (batch, seq/tp, dim)
    cos, sin = rope_table(model.config, torch.arange(24)[None], torch.float32)
    with Calls() as forward:
        out = model.layers["0"](x, cos, sin)
    with Calls() as backward:
        out.sum().backward()
    return forward.kinds(), backward.kinds()


LORA = {"kind": "lora", "rank": RANK, "targets": TARGETS}


@pytest.mark.parametrize(
    "adapter",
    [
        LORA,
        LORA | {"rslora": True, "bias": "lora_only"},
        {"kind": "bottleneck"},
        {"kind": "prefix"},
        {"kind": "bitfit"},
    ],
    ids=lambda adapter: adapter["kind"],
)
@ranks(2)
def test_an_adapter_adds_no_collective_to_a_block(adapter: dict[str, Any]) -> None:
    twice = {"all_gather_into_tensor": 2, "reduce_scatter_tensor": 2}
    bare = count_block({"kind": "freeze", "trainable": ["layers.0.input_layernorm.weight"]})
    assert count_block(adapter) == bare == (twice, twice)


@ranks(2)
def test_dora_adds_a_sum_of_norms_to_each_projection_that_is_split_by_its_inputs() -> None:
    forward, backward = count_block(LORA | {"dora": True, "targets": ["all-linear"]})
    twice = {"all_gather_into_tensor": 2, "reduce_scatter_tensor": 2}
    assert forward == twice | {"all_reduce": 2}
    assert backward == twice


@ranks(2)
def test_adapters_of_embedding_and_head_add_no_collective() -> None:
    """Beside a model that is trained whole: gradients reach the embedding in both."""
    tokens = torch.arange(48).view(2, 24)
    seen = []
    for adapter in ({"kind": "none"}, LORA):
        model = split_model(adapter)
        head_loss = next_token(layout_config(1).objective, chunk_cross_entropy)
        with Calls() as calls:
            head_loss(model, model(tokens), tokens, None).backward()
        seen.append(calls.kinds())
    assert seen[0] == seen[1]


# ---- collectives of a step


def lora_config(base: str = "sharded", rows: int = 3, **sections: dict[str, Any]) -> Config:
    adapter = {"kind": "lora", "rank": RANK, "targets": TARGETS, "base": base}
    given = {"model": {"num_layers": 2}, "data": {"micro_batch_size": rows}} | sections
    return layout_config(1, adapter=adapter, **given)


def collectives_of_a_step(config: Config) -> tuple[list[tuple[str, tuple[int, ...]]], int, int]:
    """Collectives with the shape given; and the numbers of trained and of frozen parameters, over all ranks."""
    config = resolve(config, dist.get_world_size())
    layout = build_layout(config.parallel, torch.device("cpu"))
    model = build_model(config, layout, starting_weights(config))
    _, forward_backward = build_passes(config, layout, model)
    batches = my_microbatches(adapted_batch(0, False, config), layout, config.data.micro_batch_size)
    with Calls() as calls:
        forward_backward(batches, torch.tensor(100))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return calls.collectives, trained, sum(p.numel() for p in model.parameters()) - trained


def test_copies_of_factors_are_added_up_once_a_step_whatever_the_number_of_microbatches() -> None:
    found = {}
    for rows in (6, 2):
        config = lora_config(rows=rows, parallel={"dp_shard": 2, "tp": 2})
        calls, *_ = run_ranks(4, collectives_of_a_step, config)[0]
        found[rows] = [call for call in calls if call[0] == "all_reduce" and RANK in call[1]]
        reductions = [call for call in calls if "reduce_scatter" in call[0] and len(call[1]) == 1]
        found[rows, "fsdp"] = len(reductions)
    assert found[6] == found[2] and len(found[6]) == 2 * 7 + 2, "one of each pair of factors is on both ranks"
    assert found[6, "fsdp"] == found[2, "fsdp"] > 0


def gathered(calls: list[tuple[str, tuple[int, ...]]], name: str) -> int:
    """Elements that this rank gave to the collectives of a name."""
    return sum(torch.Size(shape).numel() for kind, shape in calls if name in kind)


def test_a_replicated_base_is_not_gathered_and_a_sharded_one_not_reduced() -> None:
    n, microbatches = 2, 2
    for base in ("sharded", "replicated"):
        calls, trained, frozen = run_ranks(n, collectives_of_a_step, lora_config(base, parallel={"dp_shard": n}))[0]
        assert {kind for kind, _ in calls} == {"allgather_base", "reduce_scatter_base"}
        # Padded to an even number of rows.
        assert trained / n <= gathered(calls, "reduce_scatter") / n < 1.1 * trained / n + 100
        if base == "replicated":
            assert gathered(calls, "allgather") <= 2 * microbatches * (1.1 * trained + 100)
        else:
            assert gathered(calls, "allgather") > frozen / n


# ---- bytes

LARGE = {"num_layers": 2, "vocab_size": 512, "dim": 128, "num_heads": 4, "head_dim": 32, "ffn_dim": 256}
LOWER = {"compute": "bf16", "master": "fp32"}


def bytes_after_a_step(config: Config) -> tuple[int, int, int, int]:
    """On this rank: of frozen parameters, of trained ones, of their state; and of all tensors that live."""
    config = resolve(config, dist.get_world_size())
    layout = build_layout(config.parallel, torch.device("cpu"))
    model = build_model(config, layout, starting_weights(config))
    optimizer = build_optimizer(model, config.optim)
    _, forward_backward = build_passes(config, layout, model)
    batches = my_microbatches(adapted_batch(0, False, config), layout, 3)
    train_step(model, optimizer, forward_backward, batches, 1e-3, 1.0, layout, Guard(config.fault, 0, layout.device))
    del batches
    free_gathered(model)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is None for p in frozen)
    assert {id(p) for p in optimizer.state} == {id(p) for p in trained}
    state = [t for kept in optimizer.state.values() for t in kept.values() if t.dim()]
    gc.collect()
    storages = {
        part.untyped_storage()._cdata: part.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor)
        for part in [tensor]
        if tensor.layout == torch.strided and tensor.device.type == "cpu" and type(tensor) in (Tensor, nn.Parameter)
    }
    return held(frozen), held(trained), held(state), sum(storages.values())


def held(tensors: list[Any]) -> int:
    """Bytes of this rank's parts."""
    return sum(local_part(tensor)[0].nbytes for tensor in tensors)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("base", ["sharded", "replicated"])
def test_a_frozen_parameter_is_its_16_bits_or_its_codes_and_nothing_more(quantization: str, base: str) -> None:
    adapter = {"kind": "lora", "rank": RANK, "quantization": quantization, "base": base}
    config = layout_config(1, model=LARGE, adapter=adapter, precision=LOWER, data={"micro_batch_size": 3})
    with torch.device("meta"):
        bare = Llama(resolve(config, 1).model)
    each = {
        name: held_bytes(quantization, *p.shape) if "_proj." in name else 2 * p.numel()
        for name, p in bare.named_parameters()
    }
    projections = [p.numel() for name, p in bare.named_parameters() if "_proj." in name]
    bits = 8 * sum(count for name, count in each.items() if "_proj." in name) / sum(projections)
    assert bits == 16 if quantization == "none" else 4.125 < bits < 4.2
    factors = sum(RANK * sum(p.shape) for name, p in bare.named_parameters() if "_proj." in name)
    share = 2 if base == "sharded" else 1
    of_ranks = run_ranks(2, bytes_after_a_step, config)
    assert sum(trained for _, trained, _, _ in of_ranks) == 4 * factors
    for frozen, trained, state, living in of_ranks:
        # Uneven shards differ by a row or so.
        assert frozen == pytest.approx(sum(each.values()) / share, rel=0.02)
        assert state == 2 * trained
        # Nothing else lives that would be as large as a copy of a part of the base.
        assert living - frozen - trained - state < 0.25 * frozen


def weights_before_and_after(config: Config, folder: str) -> dict[str, bool]:
    """Whether each frozen parameter is the same bits after three steps and a save in the background after each."""
    config = resolve(config, dist.get_world_size())
    layout = build_layout(config.parallel, torch.device("cpu"))
    model = build_model(config, layout, starting_weights(config))
    optimizer = build_optimizer(model, config.optim)
    before = {name: local_part(p)[0].clone() for name, p in model.named_parameters()}
    _, forward_backward = build_passes(config, layout, model)
    guard = Guard(config.fault, 0, layout.device)
    with Checkpointer(Path(folder), CheckpointConfig()) as checkpointer:
        for step in range(3):
            batches = my_microbatches(adapted_batch(step, False, config), layout, 3)
            train_step(model, optimizer, forward_backward, batches, 1e-2, 1.0, layout, guard)
            checkpointer.save(step + 1, model, optimizer, {})
    free_gathered(model)
    after = {name: torch.equal(local_part(p)[0], before[name]) for name, p in model.named_parameters()}
    assert all(after[name] != p.requires_grad for name, p in model.named_parameters()), "what is trained moves"
    return after


@pytest.mark.parametrize(
    ("quantization", "parallel", "base"),
    [("none", {"dp_shard": 2}, "sharded"), ("nf4", {"tp": 2}, "sharded"), ("nf4", {"dp_shard": 2}, "replicated")],
    ids=str,
)
def test_the_base_is_the_same_bits_after_training_and_saving(
    quantization: str, parallel: dict[str, Any], base: str, tmp_path: Path
) -> None:
    adapter = {"kind": "lora", "rank": RANK, "quantization": quantization, "base": base}
    data, optim = {"micro_batch_size": 3}, {"weight_decay": 0.5}
    config = layout_config(3, model=LARGE, adapter=adapter, precision=LOWER, data=data, optim=optim, parallel=parallel)
    assert run_ranks(2, weights_before_and_after, config, str(tmp_path / "checkpoints"))


def most_16_bit_matrices(config: Config) -> int:
    """How many whole projections there are in 16 bits at once while a quantised base is filled."""
    config = resolve(config, dist.get_world_size())
    layout = build_layout(config.parallel, torch.device("cpu"))
    fill, counts = starting_weights(config), []
    shapes = {tuple(p.shape) for p in Llama(config.model).layers.parameters() if p.dim() == 2}

    def counting(local: Tensor, name: str, shape: tuple[int, ...], offset: tuple[int, ...]) -> None:
        fill(local, name, shape, offset)
        living = [one for one in gc.get_objects() if isinstance(one, Tensor) and one.dtype == torch.bfloat16]
        counts.append(len([one for one in living if tuple(one.shape) in shapes and one.device.type == "cpu"]))

    build_model(config, layout, counting)
    return max(counts)


def test_a_quantised_base_never_exists_in_16_bits() -> None:
    adapter = {"kind": "lora", "rank": RANK, "quantization": "nf4"}
    model = LARGE | {"vocab_size": 540}  # else half of the embedding looks like a projection
    config = layout_config(1, model=model, adapter=adapter, precision=LOWER, parallel={"dp_shard": 2})
    assert max(run_ranks(2, most_16_bit_matrices, config)) <= 1
    plain = layout_config(1, model=LARGE, adapter={"kind": "lora", "rank": RANK}, precision=LOWER)
    assert run_ranks(1, most_16_bit_matrices, plain)[0] > 1, "a plain base is seen"


# ---- matrix products


def count_products(linear: Linear) -> tuple[int, int]:
    x = torch.randn(2, 3, linear.in_features, requires_grad=True)
    with Calls() as forward:
        out = linear(x)
    with Calls() as backward:
        out.sum().backward()
    return forward.products, backward.products


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_frozen_projection_multiplies_once_each_way(quantization: str) -> None:
    """No product for a gradient of its weight; of a factor two each way: its inputs' gradient and its own."""
    given: list[dict[str, Any]] = [{"kind": "none"}, {"kind": "lora", "rank": RANK, "targets": ["o_proj"]}]
    counts = []
    for adapter in given:
        frozen = adapter["kind"] != "none"
        if frozen:
            adapter |= {"quantization": quantization}
        config = resolve(layout_config(1, model=LARGE, adapter=adapter), 1)
        model = Llama(config.model)
        attach(model, config.adapter)
        quantize_frozen(model, config.adapter.quantization)
        attention = model.layers["0"].self_attn
        counts.append([count_products(part) for part in (attention.q_proj, attention.o_proj)])  # pyright: ignore
    trained, adapted = counts
    assert trained == [(1, 2), (1, 2)]
    assert adapted == [(1, 1), (3, 5)]
