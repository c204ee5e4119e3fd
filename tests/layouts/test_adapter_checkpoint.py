"""Checkpoints of adapters: only what is trained is in them, any layout loads them, and the base must be the same."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from configs.check import resolve
from configs.load import config_to_dict
from configs.schema import CheckpointConfig, Config
from engine.base_identity import base_identity
from engine.build import build_passes
from engine.checkpoint.checkpointer import Checkpointer, open_checkpoint
from engine.checkpoint.state import saved_tensors
from engine.fault.guard import Guard
from engine.lr import lr_at
from engine.optim import build_optimizer
from engine.ranks import Ranks
from engine.saved_model import open_adapter
from engine.step import train_step
from engine.weights import starting_weights
from models.adapters import trained_shapes
from models.hf_write import write_hf
from models.llama import Llama
from models.peft_format import write_peft
from parallel.apply import build_model
from parallel.mesh import build_layout
from tests.ranks import run_ranks
from tests.runs import make_workplace, run_to_end, steps_of
from tests.training import adapted_batch, layout_config, lively, my_microbatches, train_on, whole

LORA: dict[str, Any] = {"kind": "lora", "rank": 3, "alpha": 6.0, "bias": "lora_only",
                        "targets": ["all-linear", "lm_head"]}  # fmt: skip
SEVERAL: dict[str, Any] = {"kind": "lora", "targets": ["q_proj", "down_proj"],
                           "members": [{"name": "a", "rank": 2}, {"name": "b", "rank": 5}]}  # fmt: skip
MODEL: dict[str, Any] = {"attention_bias": True, "mlp_bias": True}
LAYOUTS: list[tuple[int, dict[str, Any], str]] = [
    (1, {}, "auto"),
    (3, {}, "sharded"),
    (2, {"tp": 2}, "replicated"),
    (4, {"pp": 2, "tp": 2}, "sharded"),
]


def make_config(adapter: dict[str, Any], parallel: dict[str, Any] | None = None, base: str = "sharded") -> Config:
    model = MODEL | {"num_layers": 2}
    given = {**adapter, "base": base} if adapter else {}
    return layout_config(3, model=model, adapter=given, parallel=parallel or {})


def save_starts(configs: dict[Path, Config]) -> None:
    """Save what the seed draws, B too, before any step: the same numbers on every layout."""
    for folder, given in configs.items():
        config = resolve(given, dist.get_world_size())
        layout = build_layout(config.parallel, torch.device("cpu"))
        model = build_model(config, layout, lively(starting_weights(config), config))
        with Checkpointer(folder, CheckpointConfig(asynchronous=False)) as checkpointer:
            meta = {"config": config_to_dict(config), "base": base_identity(config, checkpointer.ranks)}
            checkpointer.save(1, model, build_optimizer(model, config.optim), meta)


def go_on(config: Config, folder: Path, steps: int) -> tuple[list[float], bool]:
    """Load what there is, train up to `steps`, and save; losses, and whether what was loaded is what was saved."""
    config = resolve(config, dist.get_world_size())
    layout = build_layout(config.parallel, torch.device("cpu"))
    start = starting_weights(config)
    losses, equal = [], True
    with Checkpointer(folder, CheckpointConfig()) as checkpointer:
        found = checkpointer.find_latest()
        # What a checkpoint doesn't bring back would be zero.
        model = build_model(config, layout, lively(start, config) if found is None else start)
        optimizer = build_optimizer(model, config.optim)
        _, forward_backward = build_passes(config, layout, model)
        if found is not None:
            checkpointer.load(found, model, optimizer)
            reader = open_checkpoint(found.path)
            loaded = {name: whole(tensor) for name, tensor in saved_tensors(model, optimizer).items()}
            equal = all(torch.equal(tensor, reader.read(name)) for name, tensor in loaded.items())
        guard = Guard(config.fault, 0, layout.device)
        for step in range(found.step if found is not None else 0, steps):
            batches = my_microbatches(adapted_batch(step, False, config), layout, config.data.micro_batch_size)
            lr = lr_at(step, config.lr, config.optim.lr, config.run.steps)
            max_norm = config.optim.max_grad_norm
            result = train_step(model, optimizer, forward_backward, batches, lr, max_norm, layout, guard)
            losses.append((result.loss_sum / result.num_tokens).item())
        if found is None:
            checkpointer.save(steps, model, optimizer, {"config": config_to_dict(config)})
    return losses, equal


def test_the_exported_file_is_the_same_whatever_layout_saved_it(tmp_path: Path) -> None:
    adapters = {"lora": LORA, "several": SEVERAL, "prefix": {"kind": "prefix", "num_virtual_tokens": 5}}
    files: dict[str, set[bytes]] = {}
    for number, (n, parallel, base) in enumerate(LAYOUTS):
        folders = {name: tmp_path / f"{name}-{number}" for name in adapters}
        run_ranks(n, save_starts, {folders[name]: make_config(adapters[name], parallel, base) for name in adapters})
        for name, folder in folders.items():
            saved = open_adapter(folder)
            assert saved is not None
            for member in [each.name for each in saved.config.members] or [""]:
                alone, out = saved.of(member), tmp_path / f"peft-{name}{member}-{number}"
                write_peft(out, alone.model, alone.config, alone.tensors(), base_name=None)
                for file in out.iterdir():
                    files.setdefault(f"{name}{member}/{file.name}", set()).add(file.read_bytes())
    assert len(files) == 3 * 4
    assert {name: len(contents) for name, contents in files.items()} == dict.fromkeys(files, 1)


def test_an_adapter_goes_on_from_any_layout_on_any_other(tmp_path: Path) -> None:
    expected = train_on(1, make_config(LORA)).losses
    first = run_ranks(4, go_on, make_config(LORA, {"pp": 2, "tp": 2}), tmp_path / "saved", 2)
    assert first[0][0] == pytest.approx(expected[:2], rel=1e-9)
    for number, (n, parallel, base) in enumerate(LAYOUTS[1:3]):
        shutil.copytree(tmp_path / "saved", tmp_path / str(number))
        found = run_ranks(n, go_on, make_config(LORA, parallel, base), tmp_path / str(number), 3)
        assert all(equal for _, equal in found)
        assert found[0][0] == pytest.approx(expected[2:], rel=1e-9)


def test_a_checkpoint_holds_the_adapter_and_its_moments_and_nothing_else(tmp_path: Path) -> None:
    """So its size, and what is copied and hashed to write and prove it, are the adapter's."""
    config = resolve(make_config(LORA), 1)
    run_ranks(1, go_on, config, tmp_path, 2)
    reader = open_checkpoint(tmp_path)
    shapes = trained_shapes(config.model, config.adapter)
    keys = ("exp_avg", "exp_avg_sq", "step")
    names = {f"model.{name}" for name in shapes} | {f"optimizer.{name}.{key}" for name in shapes for key in keys}
    assert set(reader.names("")) == names
    numel = sum(torch.Size(shape).numel() for shape in shapes.values())
    stored = sum(entry.size for name, entry in reader.manifest.files.items() if name.endswith(".safetensors"))
    headers = 400 * len(names)
    assert 3 * 8 * numel <= stored <= 3 * 8 * numel + headers
    base = 8 * sum(parameter.numel() for parameter in Llama(config.model).parameters())
    assert reader.manifest.files["model-rank-00000.safetensors"].size < base


def test_a_full_run_saves_all_of_it(tmp_path: Path) -> None:
    config = resolve(make_config({}), 1)
    run_ranks(1, go_on, config, tmp_path, 1)
    names = {name.removeprefix("model.") for name in open_checkpoint(tmp_path).names()}
    assert names == {name for name, _ in Llama(config.model).named_parameters()}
    assert base_identity(config) == ""


# -------------------- the base


def identity_here(config: Config) -> str:
    ranks = Ranks(30)
    try:
        return base_identity(resolve(config, dist.get_world_size()), ranks)
    finally:
        ranks.close()


def make_base(config: Config, folder: Path, **cut: Any) -> Path:
    torch.manual_seed(5)
    write_hf(folder, config.model, Llama(config.model).named_parameters(), dtype=torch.float32, **cut)
    return folder


def test_ranks_share_the_hashing_of_a_base_and_agree(tmp_path: Path) -> None:
    config = resolve(make_config(LORA), 1)
    base = make_base(config, tmp_path / "hf")
    config = layout_config(3, model=MODEL | {"num_layers": 2, "init_from": str(base)}, adapter=LORA)
    alone = base_identity(resolve(config, 1))
    assert len(alone) == 64
    assert run_ranks(3, identity_here, config) == [alone] * 3


def test_a_changed_base_is_refused_and_a_moved_one_is_not(tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path)
    model = {"vocab_size": 300, "dim": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 24}
    config = resolve(layout_config(3, model={**model, "head_dim": 0, "max_seq_len": 64}), 1)
    make_base(config, workplace / "hf")
    given = ["--adapter.kind", "lora", "--eval.every_steps", "0", "--lr.warmup_steps", "1", "--model.init_from"]
    assert run_to_end(workplace, 1, *given, "hf", "--run.steps", "2")[0] == 0
    meta = json.loads(next((workplace / "runs/tiny/checkpoints").glob("*/manifest.json")).read_text())["meta"]
    shutil.copytree(workplace / "hf", workplace / "moved")
    code, output = run_to_end(workplace, 1, *given, "moved", "--run.steps", "3")
    assert (code, [entry[1] for entry in steps_of(workplace / "runs/tiny")]) == (0, [1, 2, 3]), output
    file = workplace / "hf" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (workplace / "hf" / "checksums.json").unlink()  # with them it would be refused as altered
    code, output = run_to_end(workplace, 1, *given, "hf", "--run.steps", "4")
    assert code == 1
    assert f"step-00000003: base = '{meta['base'][:12]}..': the base is now " in output
    assert "(the checkpoint holds an adapter, which belongs to the base that it was trained on). Point " in output
