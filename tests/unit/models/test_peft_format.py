"""Folders of PEFT's: what is written, and every kind of folder that is refused; PEFT itself is in tests/golden."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.adapters import AdapterConfig, MemberConfig, OverrideConfig
from configs.errors import CheckpointError
from configs.schema import ModelConfig
from models.adapters import trained_shapes
from models.peft_config import adapter_of, peft_config
from models.peft_format import AdapterWeights, peft_key, split_member, write_peft

MODEL = ModelConfig(
    vocab_size=67, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48, attention_bias=True
)
LORA = AdapterConfig(kind="lora", rank=4, alpha=8.0, targets=("q_proj", "layers.1.mlp.up_proj"))
UP_PROJ = "base_model.model.model.layers.1.mlp.up_proj"


def make_tensors(adapter: AdapterConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in trained_shapes(MODEL, adapter).items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_peft(tmp_path / "peft", MODEL, LORA, make_tensors(LORA).items(), base_name="some/base")
    return tmp_path / "peft"


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refusal(folder: Path, adapter: AdapterConfig | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        AdapterWeights(folder, MODEL).check(adapter)
    return str(caught.value).replace(str(folder), "PEFT")


# -------------------- writing


def test_the_written_config_has_the_fields_that_a_reader_needs_and_no_more(folder: Path) -> None:
    assert json.loads((folder / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/base",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_modules": ["model.layers.1.mlp.up_proj", "q_proj"],
        "bias": "none",
    }


def test_overrides_become_patterns_by_name() -> None:
    adapter = AdapterConfig(
        kind="lora", rank=4, alpha=8.0, targets=("all-linear",), rslora=True, dora=True,
        overrides=(OverrideConfig(targets=("layers.0.*",), rank=2),
                   OverrideConfig(targets=("o_proj",), rank=4, alpha=1.5)),
    )  # fmt: skip
    fields = peft_config(MODEL, adapter, None)
    assert fields["rank_pattern"] == {
        f"model.layers.0.{part}": 2
        for part in ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "self_attn.k_proj", "self_attn.q_proj",
                     "self_attn.v_proj")
    }  # fmt: skip
    assert fields["alpha_pattern"] == {"o_proj": 1.5}
    assert (fields["use_rslora"], fields["use_dora"], fields["target_modules"]) == (
        True,
        True,
        ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    )


def test_the_bytes_depend_on_names_and_numbers_only(folder: Path, tmp_path: Path) -> None:
    """The order of the tensors is that of a layout's ranks."""
    backwards = list(make_tensors(LORA).items())[::-1]
    write_peft(tmp_path / "again", MODEL, LORA, backwards, base_name="some/base")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    header_bytes = struct.unpack("<Q", (folder / "adapter_model.safetensors").read_bytes()[:8])[0]
    header = json.loads((folder / "adapter_model.safetensors").read_bytes()[8 : 8 + header_bytes])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert list(header) == sorted(header)
    assert all(key.endswith(("lora_A.weight", "lora_B.weight")) for key in header), "what vLLM demands of keys"


def test_a_format_can_be_chosen_and_the_masters_is_kept(folder: Path, tmp_path: Path) -> None:
    tensors = make_tensors(LORA)
    write_peft(tmp_path / "bf16", MODEL, LORA, tensors.items(), base_name=None, dtype=torch.bfloat16)
    for name, tensor in tensors.items():
        assert torch.equal(AdapterWeights(folder, MODEL).read(name), tensor)
        assert torch.equal(AdapterWeights(tmp_path / "bf16", MODEL).read(name), tensor.bfloat16())


def test_what_is_not_the_adapters_is_not_written(tmp_path: Path) -> None:
    """Base weights above all: PEFT writes those of targeted embeddings."""
    tensors = make_tensors(LORA)
    extra = {**tensors, "embed_tokens.weight": torch.zeros(67, 32)}
    with pytest.raises(CheckpointError) as caught:
        write_peft(tmp_path / "x", MODEL, LORA, extra.items(), base_name=None)
    text = "embed_tokens.weight (67, 32) is no parameter of the adapter that is exported."
    assert str(caught.value) == f"{tmp_path / 'x'}: {text}"
    name = tensors.popitem()[0]
    with pytest.raises(CheckpointError) as caught:
        write_peft(tmp_path / "x", MODEL, LORA, tensors.items(), base_name=None)
    assert str(caught.value) == f"{tmp_path / 'x'}: parameters without a value: {name}."
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_never_overwritten(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="exists already \\(nothing is ever overwritten\\)"):
        write_peft(folder, MODEL, LORA, make_tensors(LORA).items(), base_name=None)


def test_members_are_told_apart_by_their_names() -> None:
    assert split_member("layers.0.mlp.up_proj.lora_A.fast.weight", ["fast"]) == (
        "layers.0.mlp.up_proj.lora_A.weight",
        "fast",
    )
    assert split_member("layers.0.mlp.up_proj.lora_A.weight", ["fast"]) == ("layers.0.mlp.up_proj.lora_A.weight", "")
    assert split_member("layers.0.mlp.up_proj.lora_A.weight.weight", ["weight"]) == (
        "layers.0.mlp.up_proj.lora_A.weight",
        "weight",
    )
    assert split_member("layers.0.mlp.up_proj.bias", ["fast"]) == ("layers.0.mlp.up_proj.bias", "")


def test_a_member_alone_has_its_own_rank_everywhere() -> None:
    overrides = (OverrideConfig(targets=("q_proj",), rank=2, alpha=3.0),)
    several = AdapterConfig(kind="lora", rank=4, alpha=8.0, overrides=overrides)
    alone = adapter_of(several, MemberConfig(name="wide", rank=16))
    assert (alone.rank, alone.alpha, alone.overrides[0].rank, alone.overrides[0].alpha) == (16, 8.0, 16, 3.0)
    assert adapter_of(several, MemberConfig(name="same")) == several


def test_keys_are_pefts() -> None:
    assert peft_key("lm_head.lora_B.weight") == "base_model.model.lm_head.lora_B.weight"
    assert (
        peft_key("layers.0.self_attn.q_proj.bias") == "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"
    )


# -------------------- reading


def test_slices_are_read_as_parts_of_the_whole(folder: Path, tmp_path: Path) -> None:
    weights = AdapterWeights(folder, MODEL)
    assert torch.equal(
        weights.read("layers.1.mlp.up_proj.lora_B.weight", (slice(8, 24), slice(1, 3))),
        make_tensors(LORA)["layers.1.mlp.up_proj.lora_B.weight"][8:24, 1:3],
    )
    prefix = AdapterConfig(kind="prefix", num_virtual_tokens=5)
    tensors = make_tensors(prefix)
    write_peft(tmp_path / "prefix", MODEL, prefix, tensors.items(), base_name=None)
    weights = AdapterWeights(tmp_path / "prefix", MODEL)
    assert load_file(tmp_path / "prefix" / "adapter_model.safetensors")["prompt_embeddings"].shape == (5, 2 * 2 * 16)
    for name, tensor in tensors.items():
        assert weights.shape(name) == (5, 16)
        assert torch.equal(weights.read(name), tensor)
        assert torch.equal(weights.read(name, (slice(1, 3),)), tensor[1:3])
        assert torch.equal(weights.read(name, (slice(None), slice(4, 9))), tensor[:, 4:9])


def test_everything_that_does_not_fit_is_listed(folder: Path) -> None:
    """PEFT warns of missing keys and loads the rest; keys that match nothing it drops."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"{UP_PROJ}.lora_A.weight"] = torch.zeros(3, 32)
    tensors[f"{UP_PROJ}.lora_B.weight"] = tensors[f"{UP_PROJ}.lora_B.weight"].to(torch.int32)
    tensors["base_model.model._orig_mod.model.layers.0.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 32)
    tensors["model.layers.0.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 32)
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, file)
    first, *lines = refusal(folder).splitlines()
    assert first == "PEFT: the adapter does not fit; use the base and the settings that it was trained with:"
    assert sorted(lines) == [
        "  missing: base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight (32, 4)",
        "  unexpected: base_model.model._orig_mod.model.layers.0.mlp.up_proj.lora_A.weight (4, 32)",
        "  unexpected: model.layers.0.mlp.up_proj.lora_A.weight (4, 32)",
        f"  wrong format: {UP_PROJ}.lora_B.weight I32, expected one of F64, F32, F16, BF16",
        f"  wrong shape: {UP_PROJ}.lora_A.weight (3, 32), expected (4, 32)",
    ]


def test_a_missing_layer_is_an_error(folder: Path) -> None:
    """What is left of an adapter when one stage of a pipeline wrote it."""
    edit(folder, target_modules=["q_proj", "up_proj"])
    assert refusal(folder) == (
        "PEFT: the adapter does not fit; use the base and the settings that it was trained with:\n"
        "  missing: base_model.model.model.layers.0.mlp.up_proj.lora_A.weight (4, 32)\n"
        "  missing: base_model.model.model.layers.0.mlp.up_proj.lora_B.weight (48, 4)"
    )


def test_a_long_list_of_differences_is_cut(tmp_path: Path) -> None:
    deep = AdapterConfig(kind="lora", rank=4)
    write_peft(tmp_path / "peft", MODEL, deep, make_tensors(deep).items(), base_name=None)
    save_file({}, tmp_path / "peft" / "adapter_model.safetensors")
    model = ModelConfig(vocab_size=67, dim=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48)
    with pytest.raises(CheckpointError, match=r"\.\.\. and 16 more$"):
        AdapterWeights(tmp_path / "peft", model).check()


def test_an_adapter_that_is_not_the_one_that_is_trained_is_refused(folder: Path) -> None:
    other = AdapterConfig(kind="lora", rank=4, alpha=16.0, targets=("q_proj", "o_proj"), rslora=True, dropout=0.5)
    assert refusal(folder, other) == (
        "PEFT: the adapter does not fit; use the base and the settings that it was trained with:\n"
        "  rslora: False in the folder, True in the run's adapter\n"
        "  layers.0.self_attn.q_proj: rank 4, alpha 8 in the folder, rank 4, alpha 16 in the run's adapter\n"
        "  layers.1.self_attn.q_proj: rank 4, alpha 8 in the folder, rank 4, alpha 16 in the run's adapter\n"
        "  layers.1.mlp.up_proj: rank 4, alpha 8 in the folder, nothing in the run's adapter\n"
        "  layers.0.self_attn.o_proj: nothing in the folder, rank 4, alpha 16 in the run's adapter\n"
        "  layers.1.self_attn.o_proj: nothing in the folder, rank 4, alpha 16 in the run's adapter"
    )
    assert "  kind: lora in the folder, prompt in the run's adapter" in refusal(folder, AdapterConfig(kind="prompt"))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA': must be one of LORA, PROMPT_TUNING, PREFIX_TUNING"),
        ({"peft_type": ["LORA"]}, "peft_type = ['LORA']: must be one of LORA, PROMPT_TUNING, PREFIX_TUNING"),
        ({"task_type": "SEQ_CLS"}, "task_type = 'SEQ_CLS': must be 'CAUSAL_LM'."),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = ['lm_head']: is not supported (it changes what is comp"),
        ({"layers_to_transform": [0]}, "layers_to_transform = [0]: is not supported (it changes what is computed). "),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True: is not supported (it changes what is computed). "),
        ({"lora_bias": True}, "lora_bias = True: is not supported (it changes what is computed). "),
        ({"trainable_token_indices": [3]}, "trainable_token_indices = [3]: is not supported"),
        ({"exclude_modules": ["q_proj"]}, "exclude_modules = ['q_proj']: is not supported"),
        ({"a_field_of_tomorrow": 7}, "a_field_of_tomorrow = 7: is not known here (so it might change what is computed"
         "). Remove it if it does not, or train the adapter without it."),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa': must be true, false, gaussian, orthogonal or e"),
        ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora': must be true, false, gaussian, orthogonal or e"),
        ({"bias": "all"}, "bias = 'all': must be 'none' or 'lora_only'."),
        ({"r": 0}, "r = 0: must be a positive whole number."),
        ({"r": "4"}, "r = '4': must be a positive whole number."),
        ({"r": 1 << 40}, "r = 1099511627776: must be a positive whole number."),
        ({"lora_alpha": -1}, "lora_alpha = -1: must be a positive number."),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan: must be a positive number."),
        ({"lora_alpha": 10**400}, f"lora_alpha = {10**400}: must be a positive number."),
        ({"lora_dropout": 1.5}, "lora_dropout = 1.5: must be a number from 0 to below 1."),
        ({"use_rslora": "yes"}, "use_rslora = 'yes': must be true or false."),
        ({"target_modules": ["c_attn"]}, "target_modules = ['c_attn']: matches no module of the model. Is it an adap"),
        ({"target_modules": None}, "target_modules = None: matches no module of the model. Is it an adapter of anoth"),
        ({"target_modules": "q_proj["}, "target_modules = 'q_proj[': not a regular expression: unterminated"),
        ({"rank_pattern": [4]}, "rank_pattern = [4]: must be an object."),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern: q_proj = 2.5: must be a positive whole number."),
        ({"rank_pattern": {"(": 2}}, "rank_pattern = '(': not a regular expression: missing )"),
        ({"rank_pattern": {"a)(b": 2}}, "rank_pattern = 'a)(b': not a regular expression: unbalanced parenthesis"),
        ({"rank_pattern": {"(.*)*x": 2}}, "rank_pattern = '(.*)*x': could take for ever to match (a group is rep"),
        ({"use_dora": True, "target_modules": ["embed_tokens"]}, "use_dora = True: is not supported on embed_tokens."),
    ],
)  # fmt: skip
def test_what_is_not_computed_here_is_refused_by_name(folder: Path, fields: dict[str, Any], text: str) -> None:
    edit(folder, **fields)
    assert refusal(folder).startswith(f"PEFT/adapter_config.json: {text}")


def test_every_reason_is_named_at_once(folder: Path) -> None:
    edit(folder, bias="all", modules_to_save=["norm"], r=-1)
    assert len(refusal(folder).splitlines()) == 3


def test_what_has_no_effect_is_ignored(folder: Path) -> None:
    edit(folder, inference_mode=True, peft_version="9.9", loftq_config={}, lora_bias=False, revision="main")
    edit(folder, megatron_core="megatron.core", qalora_group_size=16, init_lora_weights="gaussian", layers_pattern=None)
    AdapterWeights(folder, MODEL).check(LORA)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"token_dim": 16}, "token_dim = 16: the model has 32."),
        ({"num_layers": 3}, "num_layers = 3: the model has 2."),
        ({"num_attention_heads": 2}, "num_attention_heads = 2: the model has 4."),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules = 2: must be 1."),
        ({"num_virtual_tokens": None}, "num_virtual_tokens = None: must be a positive whole number."),
    ],
)
def test_a_prompt_of_another_model_is_refused(tmp_path: Path, fields: dict[str, Any], text: str) -> None:
    prompt = AdapterConfig(kind="prompt", num_virtual_tokens=5)
    write_peft(tmp_path / "peft", MODEL, prompt, make_tensors(prompt).items(), base_name=None)
    edit(tmp_path / "peft", **fields)
    assert refusal(tmp_path / "peft") == f"PEFT/adapter_config.json: {text}"


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_of_a_wrong_shape_are_refused_once(tmp_path: Path, kind: Any) -> None:
    adapter = AdapterConfig(kind=kind, num_virtual_tokens=5)
    write_peft(tmp_path / "peft", MODEL, adapter, make_tensors(adapter).items(), base_name=None)
    width = 32 if kind == "prompt" else 64
    file = tmp_path / "peft" / "adapter_model.safetensors"
    save_file({"prompt_embeddings": torch.zeros(5, 8)}, file)
    assert refusal(tmp_path / "peft").splitlines()[1:] == [
        f"  wrong shape: prompt_embeddings (5, 8), expected (5, {width})"
    ]
    save_file({"base_model.prompt_embeddings": torch.zeros(5, width)}, file)
    assert "  unexpected: base_model.prompt_embeddings" in refusal(tmp_path / "peft")


def test_a_pickle_is_refused(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert refusal(folder) == (
        "PEFT/adapter_model.bin: is a pickle, and weights are read from .safetensors only "
        "(loading a pickle runs whatever code it carries). Save it with safe_serialization=True."
    )


@pytest.mark.parametrize("length", [0, 5, 200, -3])
def test_a_truncated_file_is_refused(folder: Path, length: int) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    text = refusal(folder)
    assert text.startswith("PEFT/adapter_model.safetensors: not a whole safetensors file: ")
    assert text.endswith(". Fetch it again.")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_not_opened(folder: Path, make: Callable[[Path], None]) -> None:
    """A pipe would be waited for."""
    file = folder / "adapter_model.safetensors"
    file.unlink()
    make(file)
    expected = "is not a file (the tensors are read from it). Fetch it again."
    assert refusal(folder) == f"PEFT/adapter_model.safetensors: {expected}"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_adapter_that_is_not_finite_is_refused(folder: Path, tmp_path: Path, value: float) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"{UP_PROJ}.lora_B.weight"][3, 1] = value
    save_file({key: tensor.bfloat16() for key, tensor in tensors.items()}, file)
    assert refusal(folder).splitlines() == [
        "PEFT: the adapter does not fit; use the base and the settings that it was trained with:",
        f"  not finite: {UP_PROJ}.lora_B.weight (48, 4), 1 of its values are NaN or infinite",
    ]
    prefix = AdapterConfig(kind="prefix", num_virtual_tokens=5)
    learned = make_tensors(prefix)
    learned["layers.1.self_attn.v_proj.prefix_tokens"][:2] = value
    write_peft(tmp_path / "prefix", MODEL, prefix, learned.items(), base_name=None)
    assert refusal(tmp_path / "prefix").splitlines()[1:] == [
        "  not finite: prompt_embeddings (5, 64), 32 of its values are NaN or infinite"
    ]


def test_folders_that_hold_no_adapter_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    text = "no such file (the tensors are read from it). Fetch it again."
    assert refusal(folder) == f"PEFT/adapter_model.safetensors: {text}"
    path = folder / "adapter_config.json"
    for content, text in (
        ("{", "not readable as JSON: "),
        ("[" * 100_000, "not readable as JSON: "),
        ("[]", "must be a JSON object, not a list."),
    ):
        path.write_text(content)
        assert refusal(folder).startswith(f"PEFT/adapter_config.json: {text}")
    with open(path, "w") as file:
        file.truncate(1 << 25)
    assert refusal(folder) == (
        "PEFT/adapter_config.json: not readable as JSON: it has 33,554,432 bytes. Fetch it again."
    )
    path.unlink()
    text = "no such file (an adapter of PEFT's is a folder with an adapter_config.json in it). Give that folder."
    assert refusal(folder) == f"PEFT/adapter_config.json: {text}"
    assert refusal(tmp_path / "gone") == "PEFT: no such folder. Give the folder that holds adapter_config.json."
