"""Checkpoints over ranks: saved on one layout and loaded on another, in the background, with bad bytes refused."""

import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from configs.errors import CheckpointError
from configs.schema import CheckpointConfig
from engine.checkpoint.checkpointer import Checkpointer, open_checkpoint
from tests.ranks import ranks, run_ranks

LAYOUTS = {"1": (1,), "2": (2,), "3": (3,), "4": (4,), "2x2": (2, 2)}
PLAIN = (0,)  # one rank, no FSDP: plain tensors


class Tiny(nn.Module):
    """Tied embeddings, shapes that no number of ranks divides, shards that are empty, and a persistent buffer."""

    def __init__(self, seed: int, dim: int = 6) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed_tokens = nn.Embedding(11, dim)
        self.layers = nn.ModuleList([nn.Linear(dim, dim) for _ in range(2)])
        self.short = nn.Linear(dim, 3)
        self.norm = nn.LayerNorm(1)
        self.lm_head = nn.Linear(dim, 11, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("seen", torch.tensor([seed]))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed_tokens(tokens)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        return self.lm_head(hidden).sum(-1, keepdim=True) + self.norm(self.short(hidden).sum(-1, keepdim=True))


def build(layout: tuple[int, ...], seed: int, dim: int = 6) -> tuple[Tiny, torch.optim.Optimizer]:
    model = Tiny(seed, dim)
    if layout != PLAIN:
        names = ("dp_replicate", "dp_shard")[-len(layout) :]
        mesh = init_device_mesh("cpu", layout, mesh_dim_names=names)
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for module in model.modules():
            if hasattr(module, "set_gradient_divide_factor"):
                module.set_gradient_divide_factor(1.0)  # type: ignore[operator]
                module.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=False)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for step in range(steps):
        model(torch.arange(10).reshape(2, 5) % (step + 7)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every tensor by name, gathered: the test's own way, not the checkpoint's."""
    state = {}
    for name, parameter in model.named_parameters():
        state[f"model.{name}"] = whole(parameter)
        for key, value in optimizer.state[parameter].items():
            state[f"optimizer.{name}.{key}"] = whole(value)
    return state | {f"model.{name}": buffer.clone() for name, buffer in model.named_buffers()}


def hash_of(state: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        flat = state[name].contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{name} {state[name].dtype} {tuple(state[name].shape)}".encode() + flat.numpy().tobytes())
    return digest.hexdigest()


def config(**changes: Any) -> CheckpointConfig:
    return CheckpointConfig(**({"keep_last": 10, "keep_best": False} | changes))


def save_steps(
    folder: Path, layout: tuple[int, ...], steps: list[int], tokenizer: Path | None = None, **changes: Any
) -> list[str]:
    """Train and save; the hash of the state of each step."""
    hashes = []
    model, optimizer = build(layout, seed=1)
    with Checkpointer(folder, config(**changes)) as checkpointer:
        for step in steps:
            train(model, optimizer)
            hashes.append(hash_of(state_of(model, optimizer)))
            checkpointer.save(step, model, optimizer, {"step": step, "num_tokens": 7 * step}, tokenizer)
        checkpointer.wait()
    return hashes


def load_newest(folder: Path, layout: tuple[int, ...], stepped: bool = False) -> tuple[str, int, list[str]]:
    """Load into another model; the state's hash, the step, and what was refused."""
    model, optimizer = build(layout, seed=2)
    if stepped:
        train(model, optimizer, 1)
    with Checkpointer(folder, config()) as checkpointer:
        found = checkpointer.find_latest()
        assert found is not None
        checkpointer.load(found, model, optimizer)
        assert found.meta == {"step": found.step, "num_tokens": 7 * found.step}
    assert model.lm_head.weight is model.embed_tokens.weight
    return hash_of(state_of(model, optimizer)), found.step, found.refused


def solo(folder: Path, steps: list[int], **changes: Any) -> list[str]:
    return save_steps(folder, PLAIN, steps, **changes)


# -------------------- layouts


@pytest.mark.parametrize(
    "saved_on", [pytest.param(name, marks=[] if name in ("3", "2x2") else [pytest.mark.long]) for name in LAYOUTS]
)
def test_any_layout_loads_what_any_other_saved(tmp_path: Path, saved_on: str) -> None:
    layout = LAYOUTS[saved_on]
    hashes = run_ranks(torch.Size(layout).numel(), save_steps, tmp_path, layout, [100])
    assert len({tuple(h) for h in hashes}) == 1
    want = (hashes[0][0], 100, [])
    chunks = [chunk for entry in open_checkpoint(tmp_path).manifest.tensors.values() for chunk in entry.chunks]
    assert not any(0 in chunk.shape for chunk in chunks)  # a rank without rows has nothing to say
    assert load_newest(tmp_path, PLAIN) == want
    for loaded_on in ("1", "3", "4", "2x2"):
        other = LAYOUTS[loaded_on]
        stepped = loaded_on == "4"  # into an optimizer that has state of its own, too
        num_ranks = torch.Size(other).numel()
        assert run_ranks(num_ranks, load_newest, tmp_path, other, stepped) == [want] * num_ranks


def test_a_run_without_a_process_group_saves_what_ranks_load(tmp_path: Path) -> None:
    hashes = save_steps(tmp_path, PLAIN, [5])
    assert run_ranks(3, load_newest, tmp_path, (3,)) == [(hashes[0], 5, [])] * 3


def test_the_resumed_run_is_the_run_bit_for_bit(tmp_path: Path) -> None:
    straight = run_ranks(2, save_steps, tmp_path / "straight", (2,), [2, 4, 6])
    run_ranks(2, save_steps, tmp_path / "cut", (2,), [2])
    assert run_ranks(2, _resume_and_train, tmp_path / "cut", 2) == [h[1:] for h in straight]


def _resume_and_train(folder: Path, times: int) -> list[str]:
    model, optimizer = build((2,), seed=3)
    with Checkpointer(folder, config()) as checkpointer:
        found = checkpointer.find_latest()
        assert found is not None
        checkpointer.load(found, model, optimizer)
    hashes = []
    for _ in range(times):
        train(model, optimizer)
        hashes.append(hash_of(state_of(model, optimizer)))
    return hashes


def test_replicas_and_tied_weights_are_stored_once(tmp_path: Path) -> None:
    run_ranks(4, save_steps, tmp_path, (2, 2), [100])
    reader = open_checkpoint(tmp_path)
    names = reader.names("")
    assert "model.embed_tokens.weight" in names
    assert not any("lm_head" in name for name in names)
    stored = sum(tensor.nbytes for path in reader.path.glob("*.safetensors") for tensor in load_file(path).values())
    assert stored == sum(reader.read(name).nbytes for name in names)


@ranks(2)
def test_parameters_still_gathered_by_an_evaluation_are_saved_and_loaded_as_shards(tmp_path: Path) -> None:
    model, optimizer = build((2,), seed=1)
    train(model, optimizer)
    want = hash_of(state_of(model, optimizer))
    other, other_optimizer = build((2,), seed=2)
    with Checkpointer(tmp_path, config()) as checkpointer:
        with torch.no_grad():
            model(torch.zeros(1, 2, dtype=torch.long))
            other(torch.zeros(1, 2, dtype=torch.long))
        assert not isinstance(model.embed_tokens.weight, DTensor)
        checkpointer.save(1, model, optimizer, {})
        found = checkpointer.find_latest()
        assert found is not None
        checkpointer.load(found, other, other_optimizer)
    assert hash_of(state_of(other, other_optimizer)) == want


def test_wrappers_leave_no_trace_in_the_names(tmp_path: Path) -> None:
    model, optimizer = build(PLAIN, seed=1)
    model.layers[0] = torch.compile(model.layers[0], backend="eager")  # type: ignore[assignment]
    assert any("_orig_mod" in name for name, _ in model.named_parameters())
    with Checkpointer(tmp_path, config()) as checkpointer:
        checkpointer.save(1, model, optimizer, {})
    assert "model.layers.0.weight" in open_checkpoint(tmp_path).names()


# -------------------- the background


@ranks(2)
def test_steps_taken_while_the_save_is_written_do_not_reach_the_file(tmp_path: Path) -> None:
    gate = threading.Event()
    reached = threading.Event()

    def at(stage: str) -> None:
        if stage == "before_shards":
            reached.set()
            assert gate.wait(30), "the test never opened the gate"

    model, optimizer = build((2,), seed=1)
    train(model, optimizer)
    want = hash_of(state_of(model, optimizer))
    with Checkpointer(tmp_path, config(), at=at) as checkpointer:
        checkpointer.save(1, model, optimizer, {"step": 1, "num_tokens": 7})
        assert reached.wait(30)
        train(model, optimizer)  # collectives of the run beside those of the save
        assert hash_of(state_of(model, optimizer)) != want
        assert not (tmp_path / "step-00000001").exists()
        gate.set()
        train(model, optimizer)
        checkpointer.save(2, model, optimizer, {"step": 2, "num_tokens": 14})
        assert (tmp_path / "step-00000001" / "manifest.json").exists()  # the second waited for the first
    assert load_at(tmp_path, 1) == want
    assert load_at(tmp_path, 2) == hash_of(state_of(model, optimizer))


def load_at(folder: Path, step: int) -> str:
    reader = open_checkpoint(folder, step=step)
    return hash_of({name: reader.read(name) for name in reader.names("")})


@ranks(2)
def test_the_blocking_mode_is_done_when_it_returns(tmp_path: Path) -> None:
    model, optimizer = build((2,), seed=1)
    train(model, optimizer)
    want = hash_of(state_of(model, optimizer))
    with Checkpointer(tmp_path, config(asynchronous=False)) as checkpointer:
        stall_s = checkpointer.save(3, model, optimizer, {})
        assert checkpointer.written is not None
        assert stall_s >= checkpointer.written.write_s > 0
        assert checkpointer.written.path == tmp_path / "step-00000003"
        assert load_at(tmp_path, 3) == want


@ranks(3)
def test_an_error_on_one_rank_is_raised_once_and_on_all(tmp_path: Path) -> None:
    def at(stage: str) -> None:
        if stage == "between_shards" and dist.get_rank() == 1 and not broken:
            broken.append(True)
            raise OSError(28, "No space left on device", "shard")

    broken: list[bool] = []
    model, optimizer = build((3,), seed=1)
    train(model, optimizer)
    with Checkpointer(tmp_path, config(), at=at) as checkpointer:
        checkpointer.save(1, model, optimizer, {})
        with pytest.raises(CheckpointError) as failure:
            checkpointer.save(2, model, optimizer, {})
        assert str(failure.value) == (
            "checkpoint of step 1: rank 1: shard: No space left on device (errno 28) "
            "(earlier checkpoints are untouched)"
        )
        dist.barrier()
        assert os.listdir(tmp_path) == []
        checkpointer.save(3, model, optimizer, {})
    assert os.listdir(tmp_path) == ["step-00000003"]


def test_an_error_of_the_last_save_is_raised_on_leaving_and_never_hides_another(tmp_path: Path) -> None:
    def at(stage: str) -> None:
        raise OSError(5, "Input/output error", "disk")

    model, optimizer = build(PLAIN, seed=1)
    text = "disk: Input/output error"
    with pytest.raises(CheckpointError, match=text), Checkpointer(tmp_path, config(), at=at) as checkpointer:
        checkpointer.save(1, model, optimizer, {})
    with pytest.raises(ZeroDivisionError) as raised, Checkpointer(tmp_path, config(), at=at) as checkpointer:
        checkpointer.save(1, model, optimizer, {})
        _ = 1 / 0
    assert "the last checkpoint failed as well" in raised.value.__notes__[0]
    assert text in raised.value.__notes__[0]


# -------------------- what fits


def test_every_difference_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    solo(tmp_path, [1])
    model, optimizer = build(PLAIN, seed=2, dim=8)
    model.layers = model.layers[:1]  # type: ignore[index]
    model.extra = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = torch.optim.AdamW(model.parameters())
    before = hash_of(state_of(model, optimizer))
    with Checkpointer(tmp_path, config()) as checkpointer:
        found = checkpointer.find_latest()
        assert found is not None
        with pytest.raises(CheckpointError) as failure:
            checkpointer.load(found, model, optimizer)
        lines = str(failure.value).splitlines()
        assert lines[0].startswith(f"{found.path}: the checkpoint doesn't fit this run, ")
        assert "  model.embed_tokens.weight: float32 [11, 6] in the checkpoint, float32 [11, 8] in the run" in lines
        assert "  model.extra: in the run, but not in the checkpoint" in lines
        assert "  model.layers.1.bias: in the checkpoint, but not in the run" in lines
        assert "  optimizer.layers.1.bias.exp_avg: in the checkpoint, but not in the run" in lines
    assert hash_of(state_of(model, optimizer)) == before


def test_weights_alone_load_without_an_optimizer(tmp_path: Path) -> None:
    solo(tmp_path, [1])
    model, _ = build(PLAIN, seed=2)
    with Checkpointer(tmp_path, config()) as checkpointer:
        found = checkpointer.find_latest()
        assert found is not None
        checkpointer.load(found, model, None)
    reader = open_checkpoint(tmp_path, weights_only=True)
    assert torch.equal(model.embed_tokens.weight, reader.read("model.embed_tokens.weight"))


def test_saved_before_the_first_step_there_is_no_optimizer_state_and_it_loads(tmp_path: Path) -> None:
    model, optimizer = build(PLAIN, seed=1)
    other, other_optimizer = build(PLAIN, seed=2)
    with Checkpointer(tmp_path, config()) as checkpointer:
        checkpointer.save(0, model, optimizer, {})
        found = checkpointer.find_latest()
        assert found is not None
        checkpointer.load(found, other, other_optimizer)
    assert not other_optimizer.state_dict()["state"]
    assert torch.equal(other.embed_tokens.weight, model.embed_tokens.weight)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_and_moments_come_back_as_the_optimizer_made_them(tmp_path: Path, fused: bool) -> None:
    model, _ = build(PLAIN, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    train(model, optimizer, 3)
    other, _ = build(PLAIN, seed=2)
    other_optimizer = torch.optim.AdamW(other.parameters(), fused=fused)
    with Checkpointer(tmp_path, config()) as checkpointer:
        checkpointer.save(3, model, optimizer, {})
        found = checkpointer.find_latest()
        assert found is not None
        checkpointer.load(found, other, other_optimizer)
    train(model, optimizer, 1)
    train(other, other_optimizer, 1)
    assert hash_of(state_of(model, optimizer)) == hash_of(state_of(other, other_optimizer))
