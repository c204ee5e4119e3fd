"""The identity of a base: the same for the same numbers however they lie in files, another for any other number."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.adapters import AdapterConfig
from configs.check import resolve
from configs.errors import CheckpointError
from configs.schema import Config, DataConfig, ModelConfig, RunConfig, StoreConfig
from engine.base_identity import base_identity, check_base
from models.hf_write import write_hf
from models.llama import Llama

MODEL = ModelConfig(vocab_size=61, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48)


def identity(folder: Path | None, seed: int = 0, **model: Any) -> str:
    config = Config(
        run=RunConfig(name="x", steps=1, seed=seed),
        model=replace(MODEL, init_from=str(folder or ""), **model),
        data=DataConfig(stores=(StoreConfig(path="x"),), seq_len=16, global_batch_size=1),
        adapter=AdapterConfig(kind="lora"),
    )
    return base_identity(resolve(config, 1))


def write(folder: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    options.setdefault("dtype", torch.bfloat16)
    write_hf(folder, MODEL, Llama(MODEL).named_parameters(), **options)
    return folder


def test_the_same_numbers_are_the_same_base(tmp_path: Path) -> None:
    """Cut into other files, under another name, with a config.json that says the same at more length."""
    whole = identity(write(tmp_path / "whole"))
    cut = write(tmp_path / "cut", max_shard_bytes=4000)
    assert len(list(cut.glob("*.safetensors"))) > 3
    path = cut / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"transformers_version": "9"}, indent=8))
    assert identity(cut) == whole
    assert len(whole) == 64


def test_any_other_number_format_or_field_is_another_base(tmp_path: Path) -> None:
    found = {identity(write(tmp_path / "bf16")), identity(write(tmp_path / "fp32", dtype=torch.float32))}
    found.add(identity(tmp_path / "bf16", norm_eps=1e-6))
    file = write(tmp_path / "bit") / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"].view(torch.uint8)[-2] ^= 1
    save_file(tensors, file)
    found.add(identity(tmp_path / "bit"))
    first, second = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
    tensors[first], tensors[second] = tensors[second], tensors[first]
    save_file(tensors, file)
    found.add(identity(tmp_path / "bit"))
    assert len(found) == 5


def test_a_drawn_base_is_its_seed_and_its_shape() -> None:
    assert identity(None) == identity(None)
    assert len({identity(None), identity(None, seed=1), identity(None, rope_theta=5e5)}) == 3


def test_a_folder_that_can_not_be_read_is_refused(tmp_path: Path) -> None:
    (write(tmp_path / "hf") / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        identity(tmp_path / "hf")


def test_another_base_is_named_by_both_hashes() -> None:
    check_base({"base": "a" * 64}, "a" * 64, "step-00000001")
    check_base({}, "", "a full run's step-00000001")
    with pytest.raises(CheckpointError) as caught:
        check_base({"base": "a" * 64}, "b" * 64, "step-00000001")
    assert str(caught.value) == (
        "step-00000001: base = 'aaaaaaaaaaaa..': the base is now bbbbbbbbbbbb.. "
        "(the checkpoint holds an adapter, which belongs to the base that it was trained on). "
        "Point model.init_from at that base again, unchanged, or start a new run under another --run.name."
    )
