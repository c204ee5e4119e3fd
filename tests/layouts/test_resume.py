"""A run goes on elsewhere: on another number of ranks, with other settings, and not with what contradicts it.

What the ranks really trained on is watched, on each of them, where the train step hands over the microbatches.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from configs.check import resolve
from configs.cli import parse_command_line
from configs.load import load_config
from engine.build import build_run
from engine.checkpoint.checkpointer import open_checkpoint
from engine.checkpoint.state import saved_tensors
from engine.data.batches import Batch
from engine.data.prepare import PrepareOptions, prepare
from engine.train import train
from models.hf_weights import HfWeights
from models.hf_write import write_hf
from models.llama import Llama
from tests.ranks import run_ranks
from tests.runs import make_texts, make_workplace, run_to_end, steps_of
from tools import convert

HALF, ALL = 5, 10
# A constant learning rate, so that the first half is the same run whether or not it knows of the second.
CHANGES = {
    "lr = 3e-3": "lr = 1e-2",
    "warmup_steps = 2": 'schedule = "constant"\n[precision]\ncompute = "fp32"',
    "max_seq_len = 64": "max_seq_len = 64\nattention_bias = true",
    "every_steps = 10": "every_steps = 0",
}


def watched(workplace: Path, *argv: str) -> dict[str, Any]:
    """Train on the ranks there are; return the state before the first step, and what this rank trained on."""
    os.chdir(workplace)
    _, config = parse_command_line(["tiny.toml", *argv], "test")
    run = build_run(resolve(config, dist.get_world_size()), "", torch.device("cpu"), dist.get_world_size(), None)
    place = {axis: run.layout.index(axis) for axis in ("pp", "tp")} | {"dp": run.layout.dp_rank}
    found = {"step": run.step, "state": state_of(run.model, run.optimizer), "batches": [], "place": place}
    forward_backward = run.forward_backward

    def spy(microbatches: Sequence[Batch], num_tokens: Tensor) -> Tensor:
        found["batches"].append([places_of(batch) for batch in microbatches])
        return forward_backward(microbatches, num_tokens)

    run.forward_backward = spy
    try:
        train(run)
    finally:
        run.close()
    return found


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    whole = {}
    for name, tensor in saved_tensors(model, optimizer).items():
        whole[name] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
    return whole


def places_of(batch: Batch) -> list[dict[int, list[int]]]:
    """Token and target at each position that this rank has, for each sequence."""
    seq = range(batch.tokens.shape[1])
    positions = [list(seq)] * len(batch.tokens) if batch.positions is None else batch.positions.tolist()
    rows = zip(positions, batch.tokens.tolist(), batch.targets.tolist(), strict=True)
    return [{place: pair for place, *pair in zip(*row, strict=True)} for row in rows]


def token_stream(ranks: list[dict[str, Any]]) -> list[list[list[tuple[int, Any]]]]:
    """Each step's global batch as its sequences, put together from the ranks that see different tokens, in order."""
    readers: dict[int, list[dict[str, Any]]] = {}
    for rank in ranks:
        if rank["place"]["pp"] == rank["place"]["tp"] == 0:
            readers.setdefault(rank["place"]["dp"], []).append(rank)
    stream = []
    for step in range(len(ranks[0]["batches"])):
        rows: list[dict[int, Any]] = []
        for dp in sorted(readers):
            parts = [[row for batch in rank["batches"][step] for row in batch] for rank in readers[dp]]
            # The ranks of cp have parts of the same sequences.
            rows += [{place: pair for part in row for place, pair in part.items()} for row in zip(*parts, strict=True)]
        stream.append([sorted(row.items()) for row in rows])
    return stream


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_workplace(tmp_path_factory.mktemp("workplace"))
    text = (folder / "tiny.toml").read_text()
    for before, after in CHANGES.items():
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    (folder / "tiny.toml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def whole(workplace: Path) -> list[dict[str, Any]]:
    """Ten steps on two ranks, in one go."""
    return run_ranks(2, watched, workplace, "--run.name", "whole", "--run.steps", str(ALL))


@pytest.fixture(scope="module")
def half(workplace: Path, whole: list[dict[str, Any]]) -> Path:
    """The run folder of the first five steps on two ranks."""
    first = run_ranks(2, watched, workplace, "--run.name", "half", "--run.steps", str(HALF))
    assert token_stream(first) == token_stream(whole)[:HALF]
    return workplace / "runs" / "half"


@pytest.mark.parametrize(
    ("n", "other"),
    [
        pytest.param(1, (), marks=pytest.mark.long),
        pytest.param(2, ("--data.micro_batch_size", "1"), marks=pytest.mark.long),
        pytest.param(4, (), marks=pytest.mark.long),
        pytest.param(4, ("--parallel.dp_replicate", "2", "--data.micro_batch_size", "1"), marks=pytest.mark.long),
        pytest.param(2, ("--parallel.tp", "2"), marks=pytest.mark.long),
        pytest.param(2, ("--parallel.cp", "2"), marks=pytest.mark.long),
        pytest.param(2, ("--parallel.pp", "2"), marks=pytest.mark.long),
        (4, ("--parallel.tp", "2", "--parallel.pp", "2", "--parallel.schedule", "GPipe")),
    ],
)
def test_another_layout_continues_with_the_same_state_and_the_same_tokens(
    workplace: Path, whole: list[dict[str, Any]], half: Path, n: int, other: tuple[str, ...]
) -> None:
    name = f"on-{n}{''.join(other)}"
    shutil.copytree(half, workplace / "runs" / name)
    resumed = run_ranks(n, watched, workplace, "--run.name", name, "--run.steps", str(ALL), *other)
    assert [rank["step"] for rank in resumed] == [HALF] * n
    assert token_stream(resumed) == token_stream(whole)[HALF:]
    saved = open_checkpoint(half / "checkpoints")
    assert {tensor for rank in resumed for tensor in rank["state"]} == set(saved.names(""))
    for rank in resumed:
        assert rank["state"].keys() == set(saved.names("")) or "--parallel.pp" in other
        for tensor, value in rank["state"].items():
            assert torch.equal(value, saved.read(tensor)), tensor
    lines, expected = (steps_of(workplace / "runs" / run) for run in (name, "whole"))
    assert [line[1] for line in lines] == list(range(1, ALL + 1))
    assert lines[:HALF] == expected[:HALF]
    for line, truth in zip(lines[HALF:], expected[HALF:], strict=True):
        _, _, loss, grad_norm, lr, num_tokens, *_ = line
        assert (lr, num_tokens) == (truth[4], truth[5])
        assert (loss, grad_norm) == (pytest.approx(truth[2], rel=1e-5), pytest.approx(truth[3], rel=1e-4))


SAVED_ON = [
    (4, ("--parallel.dp_shard", "2", "--parallel.tp", "2"), (3, ())),
    pytest.param(2, ("--parallel.pp", "2"), (2, ("--parallel.tp", "2")), marks=pytest.mark.long),
    pytest.param(4, ("--parallel.cp", "2", "--parallel.pp", "2"), (1, ()), marks=pytest.mark.long),
]


@pytest.mark.parametrize(("n", "layout", "then"), SAVED_ON)
def test_what_any_layout_saved_another_continues(
    workplace: Path, whole: list[dict[str, Any]], n: int, layout: tuple[str, ...], then: tuple[int, tuple[str, ...]]
) -> None:
    name = f"from-{'-'.join(layout[::2] + layout[1::2])}".replace("--parallel.", "")
    steps = ("--data.global_batch_size", "12") if then[0] == 3 else ()
    first = run_ranks(n, watched, workplace, "--run.name", name, "--run.steps", str(HALF), *layout, *steps)
    saved = open_checkpoint(workplace / "runs" / name / "checkpoints")
    state = {tensor: saved.read(tensor) for tensor in saved.names("")}
    # Before its first step an optimizer has no state.
    assert {tensor for tensor in state if tensor.startswith("model.")} == whole[0]["state"].keys()
    out = workplace / "exported" / name
    assert convert.main(["export", str(workplace / "runs" / name), str(out), "--dtype", "fp32"]) == 0
    exported = HfWeights(out)
    for tensor, value in state.items():
        kind, _, parameter = tensor.partition(".")
        assert kind != "model" or torch.equal(exported.read(parameter), value), tensor
    resumed = run_ranks(then[0], watched, workplace, "--run.name", name, "--run.steps", str(ALL), *then[1], *steps)
    for rank in resumed:
        assert rank["step"] == HALF
        for tensor, value in rank["state"].items():
            assert torch.equal(value, state[tensor]), tensor
    if not steps:
        assert token_stream(first) + token_stream(resumed) == token_stream(whole)
        for line, truth in zip(
            steps_of(workplace / "runs" / name), steps_of(workplace / "runs" / "whole"), strict=True
        ):
            assert line[4:] == truth[4:]
            assert (line[2], line[3]) == (pytest.approx(truth[2], rel=1e-5), pytest.approx(truth[3], rel=1e-4))


def test_the_token_stream_is_not_the_same_batch_again(whole: list[dict[str, Any]]) -> None:
    """What the other tests compare must be able to differ."""
    stream = token_stream(whole)
    assert len({str(batch) for batch in stream}) == ALL
    assert len({str(row) for batch in stream for row in batch}) == 8 * ALL


def cloned(workplace: Path, half: Path, name: str) -> tuple[Path, tuple[str, ...]]:
    """A copy of the half run, and the command that continues it."""
    run = workplace / "runs" / name
    shutil.copytree(half, run)
    return run, ("--run.name", name, "--run.steps", str(ALL))


def test_what_may_change_does_change(workplace: Path, half: Path) -> None:
    run, command = cloned(workplace, half, "changed")
    other = ("--data.micro_batch_size", "2", "--metrics.every_steps", "2", "--checkpoint.every_steps", "2")
    code, output = run_to_end(workplace, 1, *command, *other, "--eval.every_steps", "4")
    assert code == 0, output
    assert "continuing from runs/changed/checkpoints/step-00000005\n" in output
    lines = [line[:2] for line in steps_of(run)]
    # The first step of a start is always logged.
    assert lines[HALF:] == [("step", 6), ("step", 8), ("eval", 8), ("step", 10), ("eval", 10)]
    assert open_checkpoint(run / "checkpoints").step == ALL
    assert open_checkpoint(run / "checkpoints").meta["layout"]["world_size"] == 1
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000008", "step-00000010"]


def test_a_config_that_contradicts_the_checkpoint_is_refused_with_every_difference(workplace: Path, half: Path) -> None:
    run, command = cloned(workplace, half, "contradicted")
    before = (run / "metrics.jsonl").read_bytes()
    other = ("--optim.lr", "2e-2", "--run.seed", "1", "--data.seq_len", "8", "--metrics.every_steps", "5")
    code, output = run_to_end(workplace, 1, *command, *other)
    assert code == 2
    assert output.endswith(
        "error: runs/contradicted/checkpoints/step-00000005 can't be continued with this config:\n"
        "  run.seed: the checkpoint has 0, the config 1\n"
        "  data.seq_len: the checkpoint has 16, the config 8\n"
        "  optim.lr: the checkpoint has 0.01, the config 0.02\n"
        "Give the run's own values, or another --run.name to start a new run.\n"
    )
    assert (output.count("error:"), output.count("Traceback")) == (1, 0)
    assert (run / "metrics.jsonl").read_bytes() == before
    assert open_checkpoint(run / "checkpoints").step == HALF


def test_fewer_steps_than_are_done_are_refused(workplace: Path, half: Path) -> None:
    _, command = cloned(workplace, half, "shorter")
    code, output = run_to_end(workplace, 1, *command[:-1], "3")
    assert code == 2
    assert output.endswith(
        "error: run.steps = 3: runs/shorter/checkpoints/step-00000005 is further already. "
        "Use --run.steps 5 or more, or another --run.name.\n"
    )


def test_a_longer_run_under_a_cosine_is_said(workplace: Path) -> None:
    command = ("--run.name", "longer", "--lr.schedule", "cosine", "--run.steps")
    assert run_to_end(workplace, 1, *command, "4")[0] == 0
    code, output = run_to_end(workplace, 1, *command, "6")
    assert code == 0
    assert (
        "run.steps: the checkpoint has 4, the config 6; under lr.schedule = 'cosine' the learning rate follows another "
        "curve from here on\ncontinuing from runs/longer/checkpoints/step-00000004\n"
    ) in output
    assert [line[1] for line in steps_of(workplace / "runs" / "longer")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("tokenizer", ["the same", "another"])
def test_a_store_with_other_data_or_another_tokenizer_is_refused(workplace: Path, half: Path, tokenizer: str) -> None:
    name = f"data-{tokenizer.replace(' ', '-')}"
    _, command = cloned(workplace, half, name)
    make_texts(workplace / f"{name}-texts", "tar")
    same = tokenizer == "the same"
    options = PrepareOptions(
        sources=(str(workplace / f"{name}-texts"),),
        out=workplace / name,
        tokenizer=workplace / "store" / "tokenizer" if same else None,
        train_tokenizer=0 if same else 290,
        workers=1,
    )
    prepare(options)
    code, output = run_to_end(workplace, 1, *command, "--data.stores.0.path", name)
    before, after = (prepared_hash(workplace / store) for store in ("store", name))
    expected = (
        f"  data.stores.0: the checkpoint was trained on other data (its hash {before[:12]}, now {after[:12]})\n"
        if same
        else "  data.stores: made with another tokenizer than the checkpoint's\n"
    )
    assert code == 2
    assert f"error: runs/{name}/checkpoints/step-00000005 can't be continued with this config:\n{expected}" in output
    assert "Traceback" not in output


def prepared_hash(store: Path) -> str:
    from engine.data.store import TokenStore

    return TokenStore.open(store).fingerprint


def test_a_store_that_only_moved_continues(workplace: Path, half: Path) -> None:
    run, command = cloned(workplace, half, "moved")
    shutil.copytree(workplace / "store", workplace / "elsewhere")
    code, output = run_to_end(workplace, 1, *command, "--data.stores.0.path", "elsewhere")
    assert code == 0, output
    assert open_checkpoint(run / "checkpoints").step == ALL


def test_a_folder_to_start_from_is_read_at_step_0_only(workplace: Path) -> None:
    config = resolve(load_config(workplace / "tiny.toml", []), 1).model
    torch.manual_seed(0)
    model = Llama(config)
    write_hf(workplace / "hf", model.config, model.named_parameters(), dtype=torch.float32)
    command = ("--run.name", "from-hf", "--model.init_from", "hf", "--run.steps")
    started = run_ranks(2, watched, workplace, *command, str(HALF))
    for name, parameter in model.named_parameters():
        assert torch.equal(started[0]["state"][f"model.{name}"], parameter), name
    shutil.rmtree(workplace / "hf")
    code, output = run_to_end(workplace, 1, *command, str(ALL))
    assert code == 0, output
    assert [line[1] for line in steps_of(workplace / "runs" / "from-hf")] == list(range(1, ALL + 1))
    code, output = run_to_end(workplace, 1, "--model.init_from", "hf", "--run.name", "not-yet-started")
    assert code == 2
    assert output == (
        "error: model.init_from = 'hf': no Hugging Face model there. Give a folder with config.json and "
        "*.safetensors.\n"
    )
