"""Pipeline parallelism, the model's side: which layers a stage has, which stages a rank has, and tied embeddings.

A stage is a Llama without the parts that other stages have: what it lacks passes its input on, and layers keep their
numbers, so every parameter has the bare model's name. Stages follow each other around the ranks (stage s on rank s mod
pp), or down and up again in a V (rank r has stages r and 2 pp - 1 - r), or as a CSV's rows say. How microbatches run
through them is engine/pipelined.py's part.

Sources: arXiv:2104.04473 section 2.2 (several stages a rank), arXiv:2401.10241 section 6 (V).
"""

import copy
import csv
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from configs.errors import LayoutError, problem
from configs.layout import V_SCHEDULES, stages_per_rank
from configs.schema import ModelConfig, ParallelConfig
from models.flops import flops_per_token
from models.linear import Marks
from models.llama import Llama


class HeadCopy(nn.Module):
    """The last stage's own copy of a tied embedding: what the head multiplies with, under the embedding's name."""

    def __init__(self, weight: Tensor) -> None:
        """Hold the weight, a parameter; the stage's lm_head holds the same one."""
        super().__init__()
        self.weight = cast(nn.Parameter, weight)

    def forward(self, hidden: Tensor, marks: Marks | None = None) -> Tensor:
        """Pass the hidden states on: tokens were looked up by the first stage."""
        return hidden


class NoEmbedding(nn.Identity):
    """What a later stage has in the place of the embedding: hidden states come in and go on."""

    def forward(self, input: Tensor, marks: Marks | None = None) -> Tensor:
        """Pass the hidden states on."""
        return input


class Stages(nn.Module):
    """Several stages of one rank under the bare model's names, for optimizers and checkpoints; it can't be called."""

    def __init__(self, stages: Sequence[Llama]) -> None:
        """Hold the stages, their parts first: torch names a parameter by its first place."""
        super().__init__()
        for name in ("embed_tokens", "norm", "lm_head"):
            parts = [getattr(stage, name) for stage in stages]
            held = [part for part in parts if isinstance(part, nn.Module) and list(part.parameters())]
            assert len(held) <= 1, f"{len(held)} stages of one rank have {name}"
            if held:
                self.add_module(name, held[0])
        self.layers = nn.ModuleDict({name: layer for stage in stages for name, layer in stage.layers.items()})
        self.stages = nn.ModuleList(stages)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Stages":
        """Reach each parameter once, by its stage: FSDP2 has to hear of a new one."""
        for stage in self.stages:
            stage._apply(fn, recurse)
        return self


def split_stages(model: Llama, parallel: ParallelConfig, seq_len: int, rank: int) -> list[Llama]:
    """Cut a model on the meta device into the stages of a pipeline rank, first to last; without a pipeline, itself."""
    if parallel.pp == 1:
        return [model]
    placed = stages_of_ranks(parallel)
    num_stages = sum(len(stages) for stages in placed)
    layers = layers_of_stages(model.config, parallel, seq_len, num_stages)
    mine = placed[rank]
    if model.config.tie_embeddings and {0, num_stages - 1} <= set(mine):
        # Refused by configs/refusals.py; a CSV's placement is known here only.
        what = "parallel.schedule with the first and the last stage on one rank, and model.tie_embeddings"
        why = "one rank would hold the weight twice under one name"
        raise LayoutError(problem(what, "", "is refused", why, "Use a schedule that doesn't turn back, as 1F1B."))
    return [_stage(model, layers[index], first=index == 0, last=index == num_stages - 1) for index in mine]


def join_stages(stages: Sequence[Llama]) -> nn.Module:
    """Make one module of a rank's stages, once nothing in them is replaced any more; a single stage is itself."""
    return stages[0] if len(stages) == 1 else Stages(stages)


def stages_of(model: nn.Module) -> list[Llama]:
    """Return what `join_stages` joined."""
    return cast(list[Llama], list(model.stages)) if isinstance(model, Stages) else [cast(Llama, model)]


def stages_of_ranks(parallel: ParallelConfig) -> list[list[int]]:
    """Give the numbers of each pipeline rank's stages, in ascending order."""
    if parallel.schedule_csv:
        return _stages_of_csv(parallel)
    pp, loops = parallel.pp, stages_per_rank(parallel)
    if parallel.schedule in V_SCHEDULES:
        return [[rank, 2 * pp - 1 - rank] for rank in range(pp)]
    return [[loop * pp + rank for loop in range(loops)] for rank in range(pp)]


def layers_of_stages(model: ModelConfig, parallel: ParallelConfig, seq_len: int, num_stages: int) -> list[range]:
    """Divide the layers among the stages: as the config counts them, or so that the costliest stage costs least."""
    counts = parallel.layers_per_stage
    if counts and (len(counts) != num_stages or sum(counts) != model.num_layers):
        expected = f"must be {num_stages} counts whose sum is model.num_layers = {model.num_layers}"
        raise LayoutError(problem("parallel.layers_per_stage", list(counts), expected))
    if not counts and num_stages > model.num_layers:
        expected = f"must be at most model.num_layers = {model.num_layers}"
        raise LayoutError(problem("stages of the pipeline", num_stages, expected, "each has a layer at least"))
    counts = counts or _counts_by_cost(model, seq_len, num_stages)
    starts = [sum(counts[:stage]) for stage in range(num_stages)]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


def counted_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters without copies of what another stage counts: for a norm over all stages."""
    copies = {id(module.weight) for module in model.modules() if isinstance(module, HeadCopy)}
    return (parameter for parameter in model.parameters() if id(parameter) not in copies)


def sum_tied_gradients(model: nn.Module, parallel: ParallelConfig, group: dist.ProcessGroup) -> None:
    """Add up, in place, the gradients of a tied weight's two copies; `group` is the ranks of this pipeline."""
    weights = [
        stage.embed_tokens.weight for stage in stages_of(model) if not isinstance(stage.embed_tokens, nn.Identity)
    ]
    tied = any(stage.config.tie_embeddings for stage in stages_of(model))
    if parallel.pp == 1 or not tied or not weights or weights[0].grad is None:
        return
    placed = stages_of_ranks(parallel)
    ends = {next(rank for rank, stages in enumerate(placed) if end in stages) for end in (0, sum(map(len, placed)) - 1)}
    (peer,) = ends - {dist.get_rank(group)}
    gradient = weights[0].grad
    mine = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    if mine.numel() == 0:
        return  # an uneven shard: the peer has no row either
    # Under CPU offload the gradient lies where the group can't reach it.
    sent = mine.to(gradient.device_mesh.device_type if isinstance(gradient, DTensor) else mine.device).contiguous()
    theirs = torch.empty_like(sent)
    swap = [
        dist.P2POp(dist.isend, sent, group=group, group_peer=peer),
        dist.P2POp(dist.irecv, theirs, group=group, group_peer=peer),
    ]
    for work in dist.batch_isend_irecv(swap):
        work.wait()
    # a + b and b + a are the same bits, so the copies stay one weight.
    mine += theirs.to(mine.device)


def _stage(model: Llama, layers: range, *, first: bool, last: bool) -> Llama:
    """Copy the model, on the meta device, without what other stages have."""
    stage = copy.deepcopy(model)
    for name in model.layers:
        if int(name) not in layers:
            del stage.layers[name]
    if last and not first and model.config.tie_embeddings:
        stage.embed_tokens = HeadCopy(stage.lm_head.weight)  # pyright: ignore[reportAttributeAccessIssue]
    elif not first:
        stage.embed_tokens = NoEmbedding()  # pyright: ignore[reportAttributeAccessIssue]
    if not last:
        stage.norm = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
        stage.lm_head = None  # pyright: ignore[reportAttributeAccessIssue]
    return stage


def _counts_by_cost(model: ModelConfig, seq_len: int, num_stages: int) -> list[int]:
    """Layers of each stage, at least one, such that the largest cost is smallest and then the costs most even.

    A layer and the head cost their FLOPs. The look-up costs none, but its rows are gathered, summed and updated: it
    weighs as much as a layer, or as the head where that is less.
    """
    head = flops_per_token(replace(model, num_layers=0), seq_len, causal=True)
    layer = flops_per_token(replace(model, num_layers=1), seq_len, causal=True) - head
    extra = [0.0] * num_stages
    extra[0] += min(layer, head)
    extra[-1] += head
    # (largest, sum of squares, counts) of the best division of `total` layers among the stages so far. A minimum of
    # the pair over the stages so far is enough for the largest; squares only choose among equals.
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [])}
    for stage in range(num_stages):
        later = num_stages - 1 - stage
        division: dict[int, tuple[float, float, list[int]]] = {}
        for total, (largest, squares, counts) in best.items():
            for count in range(1, model.num_layers - total - later + 1):
                cost = count * layer + extra[stage]
                found = (max(largest, cost), squares + cost * cost, [*counts, count])
                known = division.get(total + count)
                if known is None or found[:2] < known[:2]:
                    division[total + count] = found
        best = division
    return best[model.num_layers][2]


def _stages_of_csv(parallel: ParallelConfig) -> list[list[int]]:
    """Read which stages the rows of a schedule name."""
    path = Path(parallel.schedule_csv)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError) as error:
        raise LayoutError(problem("parallel.schedule_csv", str(path), "can't be read", str(error))) from error
    rows = [{int(number) for cell in row for number in _STAGE.findall(cell)} for row in table]
    if len(rows) != parallel.pp:
        expected = f"must have a row for each of the {parallel.pp} ranks of parallel.pp"
        raise LayoutError(problem(str(path), f"{len(rows)} rows", expected))
    if sorted(stage for row in rows for stage in row) != list(range(sum(map(len, rows)))) or not all(rows):
        expected = "must give each rank at least one stage, and each stage from 0 on to one rank"
        raise LayoutError(problem(str(path), [sorted(row) for row in rows], expected))
    cells = [action for row in table for cell in row for action in _ACTION.findall(cell)]
    twice = sorted({action for action in cells if cells.count(action) > 1})
    if twice:
        raise LayoutError(problem(str(path), twice[0], "must be computed once, and stands there twice"))
    return [sorted(row) for row in rows]


_ACTION = re.compile(r"(?<!\d)\d+[FBIW]\d+")
"""One computation, whole."""
_STAGE = re.compile(r"(?<!\d)(\d+)(?:F|B|I|W)\d+")
"""A computation in a cell: stage, kind, microbatch, as in `2F0`; cells of overlapped ones hold two."""
