"""The same few steps of training on any layout, through the parts that a run is built from, and what came of them.

A test asks `train_on(n, config, ...)` for one process and for a layout, and compares losses, gradients and weights by
tensor. Batches are synthetic: no power of two anywhere that a degree doesn't ask for, and sequences with unequal
numbers of targets, some with none, so that a mean of means would show.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from configs.check import resolve
from configs.load import config_from_dict
from configs.schema import Config
from engine.build import build_passes
from engine.data.batches import IGNORE, Batch
from engine.fault.guard import Guard
from engine.lr import lr_at
from engine.optim import build_optimizer
from engine.step import part_of_rank, train_step
from engine.weights import starting_weights
from models.init import fill_local
from parallel.apply import build_model
from parallel.materialise import Fill
from parallel.mesh import Layout, build_layout
from tests.ranks import run_ranks

TRAINED_A_START = 12
"""Each training leaves process groups in its ranks, and gloo's threads wake up all the time."""
VOCAB, SEQ, BATCH = 68, 24, 12  # uneven on 3 ranks; 68 rows over fsdp 4 and tp 2 are uneven too


def layout_config(steps: int, **sections: dict[str, Any]) -> Config:
    """A small config in fp64, with overrides by section."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"steps": steps},
        "model": {"vocab_size": VOCAB, "dim": 20, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6,
                  "ffn_dim": 28, "max_seq_len": SEQ},
        "data": {"seq_len": SEQ, "global_batch_size": BATCH, "stores": [{"path": "unused"}]},
        "objective": {"chunk_tokens": 10},
        "optim": {"lr": 3e-3, "max_grad_norm": 0.3},
        "lr": {"warmup_steps": min(3, steps - 1)},
        "precision": {"compute": "fp64", "master": "fp64"},
    }  # fmt: skip
    for section, values in sections.items():
        tree.setdefault(section, {}).update(values)
    return config_from_dict(tree, "test")


def global_batch(step: int, documents: bool, vocab_size: int = VOCAB) -> Batch:
    """The batch of a step: targets missing at the ends; documents are three to a sequence, each from position 0."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(vocab_size, (BATCH, SEQ + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    for row in range(BATCH):
        targets[row, (row * 5 + step) % SEQ :] = IGNORE
    positions = numbers = None
    if documents:
        ends = torch.stack([(torch.randperm(SEQ - 1, generator=generator) + 1)[:2].sort()[0] for _ in range(BATCH)])
        places = torch.arange(SEQ).expand(BATCH, SEQ)
        numbers = (places[..., None] >= ends[:, None]).sum(dim=-1)
        starts = torch.cat([torch.zeros(BATCH, 1, dtype=torch.long), ends], dim=1).gather(1, numbers)
        positions = places - starts
    return Batch(tokens[:, :-1].contiguous(), targets, positions, numbers, num_bytes=0)


def adapted_batch(step: int, documents: bool, config: Config) -> Batch:
    """The batch of a step with what the run's adapter must know of its positions, as the data layer gives it."""
    batch, adapter = global_batch(step, documents, config.model.vocab_size), config.adapter
    places = torch.arange(BATCH * SEQ).view(BATCH, SEQ) + step * BATCH * SEQ if adapter.dropout else None
    if adapter.kind not in ("prompt", "prefix"):
        return replace(batch, places=places)
    begins = torch.zeros(BATCH, SEQ, dtype=torch.long) if batch.documents is None else batch.documents
    before = torch.arange(SEQ).expand(BATCH, SEQ)
    # The place within the document, or the sequence: its first ones are virtual, as far as it has so many.
    place = before - torch.searchsorted(begins, begins)
    virtual = torch.where(place < adapter.num_virtual_tokens, place, -1)
    batch.targets[virtual >= 0] = IGNORE
    return replace(batch, places=places, virtual=virtual)


@dataclass(slots=True)
class Trained:
    """What a training left behind, whole tensors by the bare model's names."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    skipped: list[float] = field(default_factory=list)
    heldout: float = 0.0
    """Loss sum of a batch without gradients, before the first step."""
    grads: dict[str, torch.Tensor] = field(default_factory=dict)
    """Of the first step, before clipping."""
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def my_microbatches(batch: Batch, layout: Layout, size: int) -> list[Batch]:
    """This rank's part of a global batch, cut into microbatches."""
    tensors = ("tokens", "targets", "positions", "documents", "places", "virtual")
    given = {name: tensor for name in tensors if (tensor := getattr(batch, name)) is not None}
    rows = torch.arange(BATCH).chunk(layout.dp_size)[layout.dp_rank].split(size)
    parts = [replace(batch, **{name: tensor[chosen] for name, tensor in given.items()}) for chosen in rows]
    return [part_of_rank(part, layout) for part in parts]


def lively(fill: Fill, config: Config) -> Fill:
    """Fill what an adapter starts as zeros with small numbers instead: gradients of zero would hide errors."""

    def filled(local: torch.Tensor, name: str, shape: tuple[int, ...], offset: tuple[int, ...]) -> None:
        if any(part in name for part in ("lora_B", "lora_embedding_A", "bottleneck_up.weight")):
            fill_local(local, config.model, config.run.seed, f"lively {name.replace('_', '-')}", shape, offset)
        else:
            fill(local, name, shape, offset)

    return filled


def train_here(
    config: Config, documents: bool, *, same_batch: bool = False, all_ignored_at: int = -1
) -> Trained | None:
    """Train on the ranks there are; what this rank's stages hold, or None where another rank says the same."""
    config = resolve(config, dist.get_world_size())
    layout = build_layout(config.parallel, torch.device("cpu"))
    model = build_model(config, layout, lively(starting_weights(config), config))
    stage = config.parallel.pp > 1
    optimizer = build_optimizer(model, config.optim, config.adapter.lora_plus_ratio, stage=stage)
    forward, forward_backward = build_passes(config, layout, model)
    found = Trained()

    def spy(microbatches: Sequence[Batch], num_tokens: torch.Tensor) -> torch.Tensor:
        loss_sum = forward_backward(microbatches, num_tokens)
        if not found.grads:
            found.grads = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        return loss_sum

    size = config.data.micro_batch_size
    with torch.no_grad():
        heldout = replace(adapted_batch(99, documents, config), places=None)
        sums = [forward(batch) for batch in my_microbatches(heldout, layout, size)]
    found.heldout = layout.sum_over_losses(torch.stack(sums).sum().double()).item()
    guard = Guard(config.fault, len(config.adapter.members), layout.device)
    for step in range(config.run.steps):
        batch = adapted_batch(0 if same_batch else step, documents, config)
        if step == all_ignored_at:
            batch.targets.fill_(IGNORE)
        batches = my_microbatches(batch, layout, size)
        lr = lr_at(step, config.lr, config.optim.lr, config.run.steps)
        result = train_step(model, optimizer, spy, batches, lr, config.optim.max_grad_norm, layout, guard)
        loss = result.loss_sum / result.num_tokens
        found.losses.append(loss.item())
        found.norms.append(result.grad_norm.item())
        found.skipped.append(result.skipped.item())
    found.weights = {name: whole(p) for name, p in model.named_parameters()}
    speaks = all(layout.index(axis) == 0 for axis in ("dp_replicate", "dp_shard", "cp", "tp"))
    return found if speaks else None


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the whole tensor, gathered from the ranks that share it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train_on(n: int, config: Config, documents: bool = False, **batches: Any) -> Trained:
    """Train on n ranks and put the stages of a pipeline together; all ranks must agree on losses and norms.

    `batches`: same_batch trains every step on the first one's, all_ignored_at takes a step's targets away.
    """
    here = functools.partial(train_here, config, documents, **batches)
    return put_together([found for found in run_ranks(n, here, timeout_s=300) if found is not None])


def train_each(n: int, configs: Mapping[str, Config], documents: bool = False) -> dict[str, Trained]:
    """Train one config after the other on the same n ranks, whose start takes longer than the training."""
    found: dict[str, Trained] = {}
    names = list(configs)
    for begin in range(0, len(names), TRAINED_A_START):
        some = {name: configs[name] for name in names[begin : begin + TRAINED_A_START]}
        ranks = run_ranks(n, _train_each_here, some, documents, timeout_s=300 + 20 * len(some))
        found |= {name: put_together([rank[name] for rank in ranks if rank[name] is not None]) for name in some}
    return found


def _train_each_here(configs: Mapping[str, Config], documents: bool) -> dict[str, Trained | None]:
    found: dict[str, Trained | None] = {}
    for name, config in configs.items():
        try:
            found[name] = train_here(config, documents)
        except Exception as error:
            error.add_note(f"while training {name}")
            raise
    return found


def put_together(stages: Sequence[Trained]) -> Trained:
    """Make one training of what a pipeline's stages hold; they must agree on losses and norms."""
    first = stages[0]
    for other in stages[1:]:
        assert (other.losses, other.norms, other.heldout) == (first.losses, first.norms, first.heldout)
        assert other.skipped == first.skipped
        for mine, theirs in ((first.grads, other.grads), (first.weights, other.weights)):
            for name in mine.keys() & theirs.keys():  # a tied weight lives on two stages
                assert torch.equal(mine[name], theirs[name]), f"{name} differs between stages"
            mine |= theirs
    return first


def assert_same(found: Trained, truth: Trained, bound: float) -> None:
    """Hold losses, norms, gradients and weights against the truth, tensors relative in norm."""
    for name in ("losses", "norms"):
        for mine, theirs in zip(getattr(found, name), getattr(truth, name), strict=True):
            assert abs(mine - theirs) <= bound * abs(theirs), f"{name}: {getattr(found, name)}, {getattr(truth, name)}"
    assert found.skipped == truth.skipped
    assert abs(found.heldout - truth.heldout) <= bound * abs(truth.heldout), "held-out loss"
    for part in ("grads", "weights"):
        assert_same_tensors(part, getattr(found, part), getattr(truth, part), bound)


def assert_same_tensors(
    what: str, found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], bound: float
) -> None:
    """Hold tensors by name against the truth, relative in norm."""
    assert found.keys() == truth.keys(), f"{what}: {sorted(found.keys() ^ truth.keys())}"
    for name, tensor in truth.items():
        if not tensor.is_floating_point():
            assert torch.equal(found[name], tensor), f"{what} {name}: other codes"
        elif tensor.norm() < 1e-14:
            continue  # mathematically zero: softmax doesn't see a shift of all scores
        else:
            error = ((found[name] - tensor).norm() / tensor.norm()).item()
            assert error < bound, f"{what} {name}: relative error {error:.2e}"


GRAPHS, KERNELS = "aot_eager_decomp_partition", "inductor"
"""How far torch.compile goes: to graphs of forward and backward that are run as they are, or on to kernels.

What depends on the layout is in the graphs; kernels for them take torch half a minute each.
"""


def compile_to(backend: str) -> None:
    """Have this process compile so far."""
    torch.compile = functools.partial(torch.compile, backend=backend)


def train_and_count(config: Config, backend: str = KERNELS) -> tuple[Trained | None, int]:
    """Train; whatever would be compiled after the first step is an error. Returns the number of graphs, too."""
    compile_to(backend)
    import torch._dynamo.utils as dynamo

    global train_step
    take_step = train_step

    def then_no_more(*arguments: Any) -> Any:
        result = take_step(*arguments)
        torch.compiler.set_stance("fail_on_recompile")
        return result

    train_step = then_no_more
    found = train_here(config, False)
    return found, dynamo.counters["stats"]["unique_graphs"]
