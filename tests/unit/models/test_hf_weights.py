"""The reader of slices and the writer of shards, each against the safetensors library and by exact error text."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import CheckpointError
from configs.schema import ModelConfig
from models.hf_config import hf_config
from models.hf_weights import HfWeights, hf_name, our_name, parameter_shapes
from models.hf_write import write_hf


def make_config(tie: bool = False, bias: bool = False) -> ModelConfig:
    return ModelConfig(
        vocab_size=17,
        dim=12,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        ffn_dim=20,
        tie_embeddings=tie,
        attention_bias=bias,
        mlp_bias=bias,
    )


def random_tensors(config: ModelConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in parameter_shapes(config).items()}


def write(folder: Path, config: ModelConfig, max_shard_bytes: int = 10**9) -> dict[str, torch.Tensor]:
    tensors = random_tensors(config)
    write_hf(folder, config, tensors.items(), dtype=torch.float32, max_shard_bytes=max_shard_bytes)
    return tensors


def write_plain(folder: Path, config: ModelConfig, tensors: dict[str, torch.Tensor]) -> None:
    """A folder as some other program might write it, whatever the tensors are."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(config, "float32", 1, 2)))
    save_file({hf_name(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        HfWeights(folder).check()
    return str(caught.value)


def test_names_map_both_ways() -> None:
    names = {
        "embed_tokens.weight": "model.embed_tokens.weight",
        "layers.0.self_attn.q_proj.bias": "model.layers.0.self_attn.q_proj.bias",
        "norm.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    }
    for ours, theirs in names.items():
        assert hf_name(ours) == theirs
        assert our_name(theirs) == ours


@pytest.mark.parametrize("max_shard_bytes", [10**9, 3000, 1])
@pytest.mark.parametrize("tie", [False, True])
def test_what_is_written_is_read_bit_for_bit(tmp_path: Path, max_shard_bytes: int, tie: bool) -> None:
    config = make_config(tie=tie, bias=True)
    tensors = write(tmp_path / "hf", config, max_shard_bytes)
    weights = HfWeights(tmp_path / "hf")
    weights.check()
    assert weights.config == config
    assert sorted(weights.names()) == sorted(tensors)
    for name, tensor in tensors.items():
        assert weights.shape(name) == tuple(tensor.shape)
        assert torch.equal(weights.read(name), tensor)


def test_slices_of_any_dim_are_read(tmp_path: Path) -> None:
    tensors = write(tmp_path / "hf", make_config())
    weights = HfWeights(tmp_path / "hf")
    name = "layers.1.mlp.down_proj.weight"
    for slices in [(slice(3, 7),), (slice(0, 12), slice(5, 11)), (slice(11, 12), slice(0, 1)), (slice(12, 12),)]:
        part = weights.read(name, slices)
        assert part.is_contiguous()
        assert torch.equal(part, tensors[name][slices])


def test_what_was_read_outlives_the_file(tmp_path: Path) -> None:
    tensors = write(tmp_path / "hf", make_config())
    part = HfWeights(tmp_path / "hf").read("norm.weight")
    os.truncate(tmp_path / "hf" / "model.safetensors", 8)
    assert torch.equal(part, tensors["norm.weight"])


def test_shards_stay_within_the_limit_and_the_index_is_complete(tmp_path: Path) -> None:
    tensors = write(tmp_path / "hf", make_config(), max_shard_bytes=3000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    held = {file: load_file(tmp_path / "hf" / file) for file in files}
    assert {name: file for file, part in held.items() for name in part} == index["weight_map"]
    assert all(sum(t.nbytes for t in part.values()) <= 3000 for part in held.values())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())


def test_files_are_as_readable_as_any_other_of_the_user(tmp_path: Path) -> None:
    write(tmp_path / "hf", make_config())
    (tmp_path / "plain").touch()
    assert {path.stat().st_mode for path in (tmp_path / "hf").iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_a_lower_precision_is_rounded_once(tmp_path: Path) -> None:
    tensors = random_tensors(make_config())
    write_hf(tmp_path / "hf", make_config(), tensors.items(), dtype=torch.bfloat16)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    weights = HfWeights(tmp_path / "hf")
    assert all(torch.equal(weights.read(name), tensor.bfloat16()) for name, tensor in tensors.items())


def test_extra_files_and_token_ids_are_written(tmp_path: Path) -> None:
    config, target = make_config(), tmp_path / "deep" / "hf"
    tensors = random_tensors(config)
    extra = {"tokenizer.model": b"\x00\x01"}
    write_hf(target, config, tensors.items(), dtype=torch.float32, bos_id=3, eos_id=4, extra_files=extra)
    assert (target / "tokenizer.model").read_bytes() == b"\x00\x01"
    for name in ("config.json", "generation_config.json"):
        content = json.loads((target / name).read_text())
        assert (content["bos_token_id"], content["eos_token_id"]) == (3, 4)


def test_an_existing_folder_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    with pytest.raises(CheckpointError, match=r"hf: exists already \(nothing is ever overwritten\)\. Remove it or"):
        write(tmp_path / "hf", make_config())
    assert list(tmp_path.iterdir()) == [tmp_path / "hf"]
    assert list((tmp_path / "hf").iterdir()) == []


def test_nothing_is_left_of_a_folder_that_was_not_finished(tmp_path: Path) -> None:
    tensors = random_tensors(make_config())
    del tensors["norm.weight"]
    with pytest.raises(CheckpointError, match=r"hf: parameters without a value: norm\.weight\."):
        write_hf(tmp_path / "hf", make_config(), tensors.items(), dtype=torch.float32)
    tensors["norm.weight"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"hf: norm\.weight \(3,\) is no parameter of the model"):
        write_hf(tmp_path / "hf", make_config(), tensors.items(), dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/hf: can't be written: .*Not a directory.*Nothing was left behind"):
        write(tmp_path / "file" / "hf", make_config())


def test_everything_that_does_not_fit_is_listed_at_once(tmp_path: Path) -> None:
    tensors = random_tensors(make_config())
    del tensors["layers.1.mlp.up_proj.weight"]
    tensors["layers.0.self_attn.q_proj.bias"] = torch.zeros(24)
    tensors["norm.weight"] = torch.zeros(13)
    tensors["lm_head.weight"] = torch.zeros(17, 12, dtype=torch.int8)
    write_plain(tmp_path / "hf", make_config(), tensors)
    lines = refusal(tmp_path / "hf").splitlines()
    do = "fetch them again, or the config.json that they were saved with"
    assert lines[0] == f"{tmp_path / 'hf'}: the weights do not fit the model; {do}:"
    assert sorted(lines[1:]) == [
        "  missing: model.layers.1.mlp.up_proj.weight (20, 12)",
        "  unexpected: model.layers.0.self_attn.q_proj.bias (24,)",
        "  wrong format: lm_head.weight I8, expected one of F64, F32, F16, BF16",
        "  wrong shape: model.norm.weight (13,), expected (12,)",
    ]


def test_a_long_list_is_cut_with_its_count(tmp_path: Path) -> None:
    extra = {f"layers.{i}.input_layernorm.weight": torch.zeros(12) for i in range(2, 60)}
    write_plain(tmp_path / "hf", make_config(), random_tensors(make_config()) | extra)
    lines = refusal(tmp_path / "hf").splitlines()
    assert len(lines) == 42
    assert lines[-1] == "  ... and 18 more"


def test_what_transformers_ignores_is_ignored_here_too(tmp_path: Path) -> None:
    config = make_config(tie=True)
    tensors = random_tensors(config)
    extra = {"lm_head.weight": torch.zeros(17, 12), "layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3)}
    write_plain(tmp_path / "hf", config, tensors | extra)
    weights = HfWeights(tmp_path / "hf")
    weights.check()
    assert sorted(weights.names()) == sorted(tensors)


def test_pickles_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "hf", make_config())
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "pytorch_model.bin")
    assert refusal(tmp_path / "hf") == (
        f"{tmp_path / 'hf' / 'pytorch_model.bin'}: is a pickle, and weights are read from .safetensors only "
        "(loading a pickle runs whatever code it carries). "
        "Fetch the model's safetensors files, or save it with safe_serialization=True."
    )


def test_a_folder_without_weights_says_what_it_lacks(tmp_path: Path) -> None:
    write(tmp_path / "hf", make_config())
    (tmp_path / "hf" / "model.safetensors").unlink()
    expected = (
        f"{tmp_path / 'hf'}: holds neither model.safetensors nor model.safetensors.index.json. Fetch the folder again."
    )
    assert refusal(tmp_path / "hf") == expected


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "..", "weights.bin"]
)
def test_an_index_may_only_name_plain_files_of_its_folder(tmp_path: Path, file: str) -> None:
    write(tmp_path / "hf", make_config(), max_shard_bytes=3000)
    index = tmp_path / "hf" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": file}}))
    assert refusal(tmp_path / "hf") == (
        f"{index}: weight_map = {file!r}: must be the plain name of a .safetensors file in the same folder "
        "(no other file is opened)."
    )


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    write(tmp_path / "hf", make_config())
    path = tmp_path / "hf" / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    assert refusal(tmp_path / "hf").startswith(f"{path}: not a whole safetensors file: ")
    assert refusal(tmp_path / "hf").endswith(" Fetch it again.")


def test_a_missing_shard_and_a_false_index_are_named(tmp_path: Path) -> None:
    write(tmp_path / "hf", make_config(), max_shard_bytes=3000)
    index = tmp_path / "hf" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first, last = content["weight_map"]["model.embed_tokens.weight"], content["weight_map"]["model.norm.weight"]
    content["weight_map"]["model.norm.weight"] = first
    index.write_text(json.dumps(content))
    assert refusal(tmp_path / "hf") == (
        f"{tmp_path / 'hf' / first}: does not hold model.norm.weight "
        "(model.safetensors.index.json says that it does). Fetch the folder again."
    )
    (tmp_path / "hf" / last).unlink()
    expected = "no such file (the tensors are read from it). Fetch it again."
    assert refusal(tmp_path / "hf") == f"{tmp_path / 'hf' / last}: {expected}"
    index.write_text('{"weight_map": 3}')
    assert refusal(tmp_path / "hf").startswith(f"{index}: not a safetensors index: ")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    write(tmp_path / "hf", make_config())
    path = tmp_path / "hf" / "model.safetensors"
    path.unlink()
    os.mkfifo(path)
    assert refusal(tmp_path / "hf") == f"{path}: is not a file (the tensors are read from it). Fetch it again."
    index = path.rename(tmp_path / "hf" / "model.safetensors.index.json")
    assert refusal(tmp_path / "hf") == f"{index}: is not a file. Fetch it again."
