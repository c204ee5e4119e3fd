"""Every pipeline schedule trains what one process trains, and stages are cut where they cost least."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import engine.pipelined
from configs.adapters import AdapterConfig, MemberConfig
from configs.check import resolve
from configs.errors import ConfigError, LayoutError
from configs.schema import Config, ModelConfig, ParallelConfig
from engine.build import build_passes
from engine.pipelined import check_schedule, gives_each_result_its_gradient
from engine.weights import starting_weights
from models.llama import Llama
from parallel.apply import build_model
from parallel.mesh import build_layout
from parallel.pipeline import HeadCopy, join_stages, layers_of_stages, split_stages, stages_of_ranks
from tests.ranks import run_ranks
from tests.training import Trained, assert_same, global_batch, layout_config, my_microbatches, train_on

ONE = "1F1B", "GPipe"
LOOPED = "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble"
V = "ZBVZeroBubble", "DualPipeV"


def a_config(size: int = 1, layers: int = 4, tied: bool = False, **parallel: Any) -> Config:
    model = {"num_layers": layers, "tie_embeddings": tied}
    return layout_config(3, model=model, data={"micro_batch_size": size}, parallel=parallel)


@cache
def one_process(layers: int, tied: bool) -> Trained:
    return train_on(1, a_config(0, layers, tied), documents=True)


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("schedule", [*ONE, *LOOPED, *V])
def test_every_schedule_over_shards_equals_one_process(schedule: str, tied: bool) -> None:
    if tied and schedule in V:
        return  # refused, below
    found = train_on(4, a_config(pp=2, dp_shard=2, schedule=schedule, tied=tied), documents=True)
    assert_same(found, one_process(4, tied), 1e-10)


CASES: dict[str, tuple[int, int, int, bool, dict[str, Any]]] = {
    # ranks, layers, micro_batch_size, tied, parallel
    "four-stages": (4, 4, 2, True, {"pp": 4}),
    "four-ranks-in-a-v": (4, 8, 1, False, {"pp": 4, "schedule": "ZBVZeroBubble"}),
    "three-stages-a-rank": (2, 7, 3, True, {"pp": 2, "schedule": "Interleaved1F1B", "stages_per_rank": 3}),
    "uneven-layers": (2, 4, 2, False, {"pp": 2, "layers_per_stage": (3, 1)}),
    "replicas": (4, 4, 3, True, {"pp": 2, "dp_replicate": 2, "schedule": "InterleavedZeroBubble"}),
    "unsharded": (4, 4, 1, True, {"pp": 2, "dp_shard": 2, "accumulate": "unsharded"}),
    "unsharded-weights-apart": (4, 4, 1, False, {"pp": 2, "schedule": "ZBVZeroBubble", "accumulate": "unsharded"}),
    "kept-gathered": (4, 4, 2, False, {"pp": 2, "dp_shard": 2, "reshard_after_forward": False}),
}


REPEATED = ("four-ranks-in-a-v", "uneven-layers", "unsharded", "kept-gathered")
"""Cases whose parts others show."""


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.long] if case in REPEATED else []) for case in CASES]
)
def test_a_pipeline_equals_one_process(case: str) -> None:
    ranks, layers, size, tied, parallel = CASES[case]
    found = train_on(ranks, a_config(size, layers, tied, **parallel), documents=True)
    assert_same(found, one_process(layers, tied), 1e-10)


@pytest.mark.parametrize(("schedule", "mode"), [("1F1B", "full"), ("1F1B", "selective"), ("DualPipeV", "full")])
def test_recomputed_blocks_equal_one_process(schedule: str, mode: str) -> None:
    config = a_config(2, pp=2, schedule=schedule)
    found = train_on(2, replace(config, recompute=replace(config.recompute, mode=mode)), documents=True)
    assert_same(found, one_process(4, False), 1e-10)


SCHEDULES = {
    "computations": ["0F0,0F1,0F2,,0B0,0B1,0B2", ",1F0,1B0,1F1,1B1,1F2,1B2"],
    "weights-apart": ["0F0,0F1,,0I0,0F2,0W0,0I1,0W1,0I2,0W2", ",1F0,1I0,1F1,1I1,1W0,1F2,1I2,1W1,1W2"],
    "the-other-way-round": ["1F0,1B0,1F1,1B1,1F2,1B2", "0F0,0F1,0F2,,0B0,0B1,0B2"],
}


@pytest.mark.parametrize("rows", SCHEDULES)
def test_a_schedule_of_ones_own_equals_one_process(rows: str, tmp_path: Path) -> None:
    path = tmp_path / "schedule.csv"
    path.write_text("\n".join(SCHEDULES[rows]) + "\n")
    found = train_on(2, a_config(4, pp=2, schedule_csv=str(path), tied=True), documents=True)
    assert_same(found, one_process(4, True), 1e-10)


def after_a_step(config: Config) -> tuple[set[str], dict[str, tuple[int, ...]]]:
    """What the parameters are after a step, and their whole shapes."""
    layout = build_layout(config.parallel, torch.device("cpu"))
    model = build_model(config, layout, starting_weights(config))
    _, forward_backward = build_passes(config, layout, model)
    forward_backward(my_microbatches(global_batch(0, False), layout, config.data.micro_batch_size), torch.tensor(100))
    return {type(parameter.data).__name__ for parameter in model.parameters()}, {
        name: tuple(parameter.shape) for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize("schedule", ["1F1B", "InterleavedZeroBubble", "DualPipeV"])
def test_a_step_leaves_shards_under_the_bare_models_names(schedule: str) -> None:
    config = a_config(pp=2, dp_shard=2, schedule=schedule)
    with torch.device("meta"):
        bare = {name: tuple(parameter.shape) for name, parameter in Llama(config.model).named_parameters()}
    found: dict[str, tuple[int, ...]] = {}
    for kinds, shapes in run_ranks(4, after_a_step, config):
        assert kinds == {"DTensor"}
        found |= shapes
    assert found == bare


def test_weight_gradients_of_freed_blocks_would_be_lost() -> None:
    """Why blocks stay gathered where weight gradients are computed apart: torch would lose them, silently."""
    grads = run_ranks(4, _with_freed_blocks, a_config(pp=2, dp_shard=2, schedule="InterleavedZeroBubble"))
    assert any(missing for missing in grads), "torch finds them now: engine/pipelined.py needs no exception any more"


def _with_freed_blocks(config: Config) -> list[str]:
    class Freed(engine.pipelined.Stage):
        def begin(self, *arguments: Any) -> None:
            super().begin(*arguments)
            for block in self._module.model.layers.values():
                block.set_reshard_after_forward(True)  # pyright: ignore

    engine.pipelined.Stage = Freed
    layout = build_layout(config.parallel, torch.device("cpu"))
    model = build_model(config, layout, starting_weights(config))
    _, forward_backward = build_passes(config, layout, model)
    forward_backward(my_microbatches(global_batch(0, False), layout, 1), torch.tensor(100))
    return [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_compiled_halves_are_refused_where_torch_gets_them_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def adds_up_the_gradients_of_all_results(weights: Iterator[torch.Tensor], groups: Any) -> None:
        for weight in weights:  # as torch 2.11 does
            weight.grad = torch.tensor(3.0 * (2 + 7))

    def compiled(schedule: str, blocks: bool = True, **parallel: Any) -> Config:
        given = {"pp": 2, "schedule": schedule, **parallel}
        config = layout_config(3, model={"num_layers": 4}, compile={"blocks": blocks}, parallel=given)
        return resolve(config, 2)

    monkeypatch.setattr(engine.pipelined, "stage_backward_weight", adds_up_the_gradients_of_all_results)
    for schedule in ("InterleavedZeroBubble", *V):
        with pytest.raises(ConfigError) as caught:
            check_schedule(compiled(schedule))
        assert caught.value.problems == [
            f"parallel.schedule = '{schedule}': can't run compiled blocks under torch {torch.__version__} (its weight "
            "pass is wrong for functions that have a backward of their own; torch 2.13 has it mended). Install torch "
            "2.13 or newer, or use the schedule 1F1B or Interleaved1F1B."
        ]
        check_schedule(compiled(schedule, blocks=False))
    check_schedule(compiled("1F1B"))
    several = AdapterConfig(kind="lora", members=(MemberConfig(name="a"), MemberConfig(name="b")))
    with pytest.raises(ConfigError, match=r"can't run adapter\.members under torch "):
        check_schedule(replace(compiled(V[0], blocks=False), adapter=several))
    monkeypatch.undo()
    assert gives_each_result_its_gradient() == (torch.__version__ >= "2.13")  # compared as versions


MODEL = ModelConfig(
    vocab_size=128256, dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, ffn_dim=14336
)


def counts(num_stages: int, model: ModelConfig = MODEL, **parallel: Any) -> list[int]:
    config = ParallelConfig(pp=num_stages, **parallel)
    return [len(layers) for layers in layers_of_stages(model, config, 8192, num_stages)]


def test_the_head_and_the_embedding_weigh_in() -> None:
    assert counts(1) == [32]
    assert counts(2) == [17, 15]
    assert counts(4) == [8, 9, 9, 6]
    assert counts(8, layers_per_stage=(3, 4, 4, 4, 4, 5, 5, 3)) == [3, 4, 4, 4, 4, 5, 5, 3]


def test_layers_are_neither_lost_nor_doubled() -> None:
    for num_stages in range(1, 33):
        layers = layers_of_stages(MODEL, ParallelConfig(pp=num_stages), 8192, num_stages)
        assert [layer for stage in layers for layer in stage] == list(range(32))
        assert min(map(len, layers)) >= 1


def test_stages_go_around_the_ranks_or_down_and_up() -> None:
    assert stages_of_ranks(ParallelConfig(pp=3)) == [[0], [1], [2]]
    assert stages_of_ranks(ParallelConfig(pp=2, schedule="LoopedBFS", stages_per_rank=3)) == [[0, 2, 4], [1, 3, 5]]
    assert stages_of_ranks(ParallelConfig(pp=3, schedule="DualPipeV")) == [[0, 5], [1, 4], [2, 3]]


def test_a_stage_holds_its_part_only() -> None:
    config = a_config(pp=2, schedule="Interleaved1F1B", tied=True)
    with torch.device("meta"):
        model = Llama(config.model)
    ranks = [split_stages(model, config.parallel, 24, rank) for rank in (0, 1)]
    assert [[list(stage.layers) for stage in stages] for stages in ranks] == [[["0"], ["2"]], [["1"], ["3"]]]
    first, last = ranks[0][0], ranks[1][1]
    assert isinstance(last.embed_tokens, HeadCopy) and last.lm_head.weight is last.embed_tokens.weight
    assert first.lm_head is None
    names = {name for stages in ranks for name, _ in join_stages(stages).named_parameters()}
    assert names == {name for name, _ in model.named_parameters()}


def test_a_tied_weight_on_one_rank_twice_is_refused() -> None:
    config = a_config(pp=2, schedule="Interleaved1F1B", tied=True)
    with torch.device("meta"):
        model = Llama(config.model)
    with pytest.raises(LayoutError) as caught:
        split_stages(model, replace(config.parallel, schedule="ZBVZeroBubble"), 24, 0)
    assert str(caught.value) == (
        "parallel.schedule with the first and the last stage on one rank, and model.tie_embeddings: is refused (one "
        "rank would hold the weight twice under one name). Use a schedule that doesn't turn back, as 1F1B."
    )


BAD_CSV = {
    "0F0,0B0\n": "1 rows: must have a row for each of the 2 ranks of parallel.pp.",
    "0F0,0B0\n0F1,0B1\n": "must give each rank at least one stage, and each stage from 0 on to one rank.",
    "0F0,0B0\n2F0,2B0\n": "must give each rank at least one stage, and each stage from 0 on to one rank.",
    "0F0,0F0,0B0\n1F0,1B0\n": "must be computed once, and stands there twice.",
}


@pytest.mark.parametrize("text", BAD_CSV)
def test_a_csv_without_a_sound_placement_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "schedule.csv"
    path.write_text(text)
    with pytest.raises(LayoutError) as caught:
        stages_of_ranks(ParallelConfig(pp=2, schedule_csv=str(path)))
    assert str(caught.value).startswith(str(path)) and str(caught.value).endswith(BAD_CSV[text].split(" rows: ")[-1])


def test_a_csv_for_another_number_of_microbatches_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "schedule.csv"
    path.write_text("\n".join(SCHEDULES["computations"]) + "\n")
    for text in run_ranks(2, _refusal, a_config(6, pp=2, dp_shard=1, schedule_csv=str(path))):
        assert text.startswith(
            f"parallel.schedule_csv = {str(path)!r}: must be a schedule of 2 microbatches that can run"
        )


def _refusal(config: Config) -> str:
    with pytest.raises(LayoutError) as caught:
        after_a_step(config)
    return str(caught.value)
