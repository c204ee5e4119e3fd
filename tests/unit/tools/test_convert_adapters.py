"""Adapters through the tools: exported, merged, imported, and text from them; PEFT itself is in tests/golden."""

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

from configs.adapters import AdapterConfig, MemberConfig
from configs.check import resolve
from configs.load import config_to_dict, load_config
from configs.schema import CheckpointConfig, Config, DataConfig, ModelConfig, PrecisionConfig, RunConfig, StoreConfig
from engine.base_identity import base_identity
from engine.checkpoint.checkpointer import Checkpointer
from engine.saved_model import load_model, open_model
from engine.weights import starting_weights
from models.adapters import attach, trained_shapes
from models.hf_weights import HfWeights
from models.hf_write import write_hf
from models.llama import Llama
from models.peft_format import AdapterWeights, write_peft
from models.quantized import dequantize, quantize
from tools import convert, generate

VOCAB = 300
CPU = torch.device("cpu")
LORA = AdapterConfig(kind="lora", rank=4, alpha=12.0, targets=("q_proj", "down_proj"))
Q_PROJ = "layers.0.self_attn.q_proj"


def make_config(adapter: AdapterConfig, base: Path | None, **model: Any) -> Config:
    fields = {"vocab_size": VOCAB, "dim": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 128}
    config = Config(
        run=RunConfig(name="tiny", steps=2),
        model=ModelConfig(**{**fields, "max_seq_len": 64, "init_from": str(base or ""), **model}),
        data=DataConfig(stores=(StoreConfig(path="data/none"),), seq_len=64, global_batch_size=1),
        adapter=adapter,
        precision=PrecisionConfig(compute="bf16"),
    )
    return resolve(config, 1)


def make_base(folder: Path, **model: Any) -> Path:
    """A base in bf16 whose logits are far from each other."""
    config = replace(make_config(AdapterConfig(), None, **model).model, init_from="")
    torch.manual_seed(0)
    whole = Llama(config)
    for name, parameter in whole.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    write_hf(folder, config, whole.named_parameters(), dtype=torch.bfloat16)
    return folder


def trained_model(config: Config) -> Llama:
    """What a run of the adapter could have made: the base, and random numbers for what is trained."""
    model = Llama(config.model)
    attach(model, config.adapter)
    start = starting_weights(config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
        else:
            start(parameter.data, name, tuple(parameter.shape), (0,) * parameter.dim())
    return model


def make_run(folder: Path, config: Config) -> Path:
    with Checkpointer(folder / "checkpoints", CheckpointConfig(asynchronous=False)) as checkpointer:
        meta = {"config": config_to_dict(config), "base": base_identity(config)}
        checkpointer.save(2, trained_model(config), None, meta)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


@pytest.fixture
def run(tmp_path: Path, base: Path) -> Path:
    return make_run(tmp_path / "run", make_config(LORA, base))


def run_tool(tool: Any, *argv: str | Path) -> int:
    return tool.main([str(word) for word in argv])


def done(*argv: str | Path) -> None:
    assert run_tool(convert, *argv, "--tokenizer", "none") == 0


def refusal(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str]:
    capsys.readouterr()
    code = run_tool(convert, *argv)
    return code, capsys.readouterr().err.removeprefix("error: ").rstrip("\n")


def logits(model: Llama) -> torch.Tensor:
    with torch.no_grad():
        return model.lm_head(model(torch.arange(40).view(2, 20) * 7 % VOCAB))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() / b.norm() < 1e-5)


def hash_of(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


# -------------------- export


def test_export_writes_the_adapter_alone(
    run: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = hash_of(base)
    assert run_tool(convert, "export", run, tmp_path / "peft") == 0
    assert f"its base: {base}" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "checksums.json",
    ]
    config = make_config(LORA, base)
    weights = AdapterWeights(tmp_path / "peft", config.model)
    weights.check(LORA)
    expected = dict(trained_model(config).named_parameters())
    assert all(torch.equal(weights.read(name), expected[name]) for name in weights.names())
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    run_tool(convert, "export", run, tmp_path / "bf16", "--dtype", "bf16")
    assert AdapterWeights(tmp_path / "bf16", config.model).read(weights.names()[0]).dtype == torch.bfloat16
    assert hash_of(base) == before


def test_export_does_not_need_the_base(run: Path, base: Path, tmp_path: Path) -> None:
    base.rename(tmp_path / "away")
    assert run_tool(convert, "export", run, tmp_path / "peft") == 0


def test_several_adapters_are_exported_each_to_its_folder(base: Path, tmp_path: Path, capsys: Any) -> None:
    several = replace(LORA, members=(MemberConfig(name="a", rank=2), MemberConfig(name="b", alpha=3.0)))
    config = make_config(several, base)
    run = make_run(tmp_path / "run", config)
    assert run_tool(convert, "export", run, tmp_path / "both") == 0
    assert run_tool(convert, "export", run, tmp_path / "only", "--member", "b") == 0
    assert hash_of(tmp_path / "both" / "b") == hash_of(tmp_path / "only")
    parameters = dict(trained_model(config).named_parameters())
    for member in ("a", "b"):
        weights = AdapterWeights(tmp_path / "both" / member, config.model)
        weights.check(replace(LORA, rank=2) if member == "a" else replace(LORA, alpha=3.0))
        assert torch.equal(weights.read(f"{Q_PROJ}.lora_A.weight"), parameters[f"{Q_PROJ}.lora_A.{member}.weight"])
    code, text = refusal(capsys, "export", run, tmp_path / "both")
    assert (code, text.startswith(f"{tmp_path / 'both'}: exists already (nothing is ever overw")) == (2, True)
    code, text = refusal(capsys, "merge", run, tmp_path / "merged", "--tokenizer", "none")
    where = f"{run}/checkpoints/step-00000002"
    assert (code, text) == (2, f"--member: {where} holds a, b. Choose one.")
    assert refusal(capsys, "export", run, tmp_path / "x", "--member", "c") == (
        2,
        f"--member = 'c': {where} holds a, b. Choose one.",
    )
    done("merge", run, tmp_path / "merged", "--member", "a")
    alone = logits(load_model(open_model(run, member="a"), CPU, torch.float32))
    assert not same(alone, logits(load_model(open_model(run, member="b"), CPU, torch.float32)))


@pytest.mark.parametrize(
    "adapter",
    [AdapterConfig(kind="bitfit"), AdapterConfig(kind="freeze", last_layers=1, trainable=("embed_tokens.*",))],
)
def test_what_changes_the_model_itself_is_exported_whole(adapter: AdapterConfig, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", attention_bias=True)
    config = make_config(adapter, base, attention_bias=True)
    run = make_run(tmp_path / "run", config)
    done("export", run, tmp_path / "whole", "--dtype", "fp32")
    written, expected = HfWeights(tmp_path / "whole"), trained_model(config)
    written.check()
    for name, parameter in expected.named_parameters():
        assert torch.equal(written.read(name), parameter), name
    assert same(logits(load_model(open_model(run), CPU, torch.float32)), logits(expected))


def test_the_base_of_a_run_can_be_exported_without_the_adapter(tmp_path: Path, capsys: Any) -> None:
    """Of a drawn base there is no folder yet."""
    config = make_config(LORA, None)
    run = make_run(tmp_path / "run", config)
    done("export", run, tmp_path / "drawn", "--no-adapter")
    assert run_tool(convert, "export", run, tmp_path / "peft") == 0
    assert "its base: drawn from the seed; export --no-adapter writes it" in capsys.readouterr().out
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    together = load_model(open_model(tmp_path / "drawn", adapter=tmp_path / "peft"), CPU, torch.float32)
    assert same(logits(together), logits(load_model(open_model(run), CPU, torch.float32)))


# -------------------- merge


def test_a_merge_adds_in_fp32_and_casts_once(run: Path, base: Path, tmp_path: Path) -> None:
    before = hash_of(base), hash_of(run)
    done("merge", run, tmp_path / "merged")
    merged, weights = HfWeights(tmp_path / "merged"), HfWeights(base)
    parameters = dict(trained_model(make_config(LORA, base)).named_parameters())
    for name in weights.names():
        expected = weights.read(name)
        if name.removesuffix(".weight").endswith(LORA.targets):
            a, b = (parameters[name.replace(".weight", f".lora_{part}.weight")] for part in "AB")
            expected = torch.addmm(expected.float(), b, a, alpha=3.0).bfloat16()
            assert not torch.equal(expected, weights.read(name))
        assert torch.equal(merged.read(name), expected), name
    assert (hash_of(base), hash_of(run)) == before


def test_all_ways_to_the_same_merged_model_give_the_same_files(run: Path, base: Path, tmp_path: Path) -> None:
    done("merge", run, tmp_path / "1")
    run_tool(convert, "export", run, tmp_path / "peft")
    done("merge", tmp_path / "peft", tmp_path / "2")
    done("merge", base, tmp_path / "3", "--adapter", tmp_path / "peft")
    base.rename(tmp_path / "moved")
    done("merge", tmp_path / "peft", tmp_path / "4", "--base", tmp_path / "moved")
    done("merge", run, tmp_path / "5", "--base", tmp_path / "moved")
    assert len({hash_of(tmp_path / str(number)) for number in range(1, 6)}) == 1


def test_a_qlora_adapter_is_merged_onto_what_its_base_says(base: Path, tmp_path: Path) -> None:
    config = make_config(replace(LORA, quantization="nf4"), base)
    run = make_run(tmp_path / "run", config)
    done("merge", run, tmp_path / "merged", "--dtype", "fp32")
    parameters = dict(trained_model(config).named_parameters())
    a, b = (parameters[f"{Q_PROJ}.lora_{part}.weight"] for part in "AB")
    weight = HfWeights(base).read(f"{Q_PROJ}.weight")
    seen = dequantize("nf4", quantize("nf4", weight), torch.float32)
    assert 0.05 < (seen - weight).norm() / weight.norm() < 0.15
    assert torch.equal(HfWeights(tmp_path / "merged").read(f"{Q_PROJ}.weight"), torch.addmm(seen, b, a, alpha=3.0))
    merged = load_model(open_model(tmp_path / "merged"), CPU, torch.float32)
    assert same(logits(merged), logits(load_model(open_model(run), CPU, torch.float32)))


@pytest.mark.parametrize("adapter", [LORA, AdapterConfig(kind="prompt", num_virtual_tokens=3)])
def test_export_says_that_the_base_was_quantised(
    adapter: AdapterConfig, base: Path, tmp_path: Path, capsys: Any
) -> None:
    run = make_run(tmp_path / "run", make_config(replace(adapter, quantization="nf4"), base))
    capsys.readouterr()
    assert run_tool(convert, "export", run, tmp_path / "peft") == 0
    text = "it was trained over that base in nf4 (dequantised), whose logits differ from the plain base's"
    text += "; merge adds it to what it was trained on" if adapter.kind == "lora" else ""
    assert capsys.readouterr().out.splitlines()[1:] == [f"its base: {base}", text]


@pytest.mark.parametrize("kind", ["bottleneck", "prompt", "prefix"])
def test_what_is_no_part_of_a_weight_is_not_merged(kind: Any, base: Path, tmp_path: Path, capsys: Any) -> None:
    run = make_run(tmp_path / "run", make_config(AdapterConfig(kind=kind), base))
    assert refusal(capsys, "merge", run, tmp_path / "merged", "--tokenizer", "none") == (
        1,
        f"adapter.kind = {kind!r}: can't be merged (what it adds is no part of a weight of the base). "
        "Export it, or keep the run.",
    )
    if kind == "bottleneck":
        assert refusal(capsys, "export", run, tmp_path / "peft") == (
            1,
            "adapter.kind = 'bottleneck': can't be exported (PEFT has no format for it). "
            "tools/generate.py uses the run itself.",
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]


# -------------------- import


def test_import_of_an_adapter_writes_a_config_that_trains_it_further(
    run: Path, base: Path, tmp_path: Path, capsys: Any
) -> None:
    run_tool(convert, "export", run, tmp_path / "peft")
    out = tmp_path / "further.toml"
    assert run_tool(convert, "import", base, "--out", out, "--adapter", tmp_path / "peft") == 0
    config = resolve(load_config(out, []), 2)
    assert config.adapter == replace(LORA, init_from=str(tmp_path / "peft"))
    assert config.optim.lr == 2e-4
    assert "For LoRA" not in out.read_text()
    assert f"{tmp_path / 'peft'}: lora, every tensor in place" in capsys.readouterr().out
    fill = starting_weights(config)
    found = torch.empty(64, 4)
    fill(found, f"{Q_PROJ}.lora_B.weight", (64, 4), (0, 0))
    assert torch.equal(found, AdapterWeights(tmp_path / "peft", config.model).read(f"{Q_PROJ}.lora_B.weight"))
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    code, text = refusal(capsys, "import", base, "--out", tmp_path / "y.toml", "--adapter", tmp_path / "peft")
    assert (code, text.startswith(f"{tmp_path / 'peft' / 'adapter_config.json'}: peft_type = None: must be")) == (
        1,
        True,
    )
    assert not (tmp_path / "y.toml").exists()


@pytest.mark.parametrize(
    ("adapter", "tie", "module", "why"),
    [
        (
            replace(LORA, targets=("embed_tokens", "q_proj")),
            True,
            "embed_tokens",
            "the base's embedding and head share one weight, and merging an adapter of one would change the other",
        ),
        (
            replace(LORA, targets=("lm_head",), dora=True),
            False,
            "lm_head",
            "the loss multiplies with the head in chunks, and would need its rows' lengths in each under DoRA",
        ),
    ],
)
def test_what_no_run_trains_is_merged_and_not_imported(
    adapter: AdapterConfig, tie: bool, module: str, why: str, tmp_path: Path, capsys: Any
) -> None:
    base = make_base(tmp_path / "base", tie_embeddings=tie)
    peft, model = tmp_path / "peft", HfWeights(base).config
    tensors = ((name, torch.ones(shape)) for name, shape in trained_shapes(model, adapter).items())
    write_peft(peft, model, adapter, tensors, base_name=str(base))
    assert refusal(capsys, "import", base, "--out", tmp_path / "x.toml", "--adapter", peft) == (
        1,
        f"{peft}: target_modules = {module!r}: PEFT's adapter has LoRA there, and can't be trained further here "
        f"({why}). `merge` takes it; train the merged model.",
    )
    done("merge", peft, tmp_path / "merged")


# -------------------- what can't be


def test_user_errors_are_one_line(run: Path, base: Path, tmp_path: Path, capsys: Any) -> None:
    run_tool(convert, "export", run, tmp_path / "peft")
    where, out = f"{run}/checkpoints/step-00000002", tmp_path / "out"
    for argv, code, text in (
        (["merge", base, out], 2, f"{base}: has no adapter to merge. Give a run of an adapter, a folder of PEFT's, or "
         "--adapter PEFT_FOLDER."),
        (["merge", base, out, "--base", base], 2, f"--base: {base} has no adapter."),
        (["export", base, out, "--member", "a", "--no-adapter"], 2,
         f"--member: {base} has no adapter.\n--no-adapter: {base} has no adapter."),
        (["merge", run, out, "--adapter", tmp_path / "peft"], 2,
         f"--adapter = '{tmp_path / 'peft'}': {where} has an adapter already. Merge that first."),
        (["merge", run, out, "--member", "a"], 2, f"--member = 'a': {where} holds one adapter, which has no name."),
        (["merge", tmp_path / "peft", out, "--step", "2"], 1,
         f"{tmp_path / 'peft'}: is a PEFT folder, which has no steps to choose from. Leave that out."),
        (["export", run, out, "--base", base], 2,
         f"--base = '{base}': has no effect: the adapter alone is written."),
        (["export", run, tmp_path / "peft"], 1,
         f"{tmp_path / 'peft'}: exists already (nothing is ever overwritten). Remove it or give another name."),
        (["merge", run, tmp_path / "peft", "--tokenizer", "none"], 1,
         f"{tmp_path / 'peft'}: exists already (nothing is ever overwritten). Remove it or give another name."),
    ):  # fmt: skip
        assert refusal(capsys, *argv) == (code, text)
    path = tmp_path / "peft" / "adapter_config.json"
    fields = json.loads(path.read_text())
    long = "x" * 5000  # no path can be so long
    for name, text in (
        ("org/model", "its base 'org/model' is no folder here"),
        (long, f"its base {long[:200]!r} is no folder here"),
        (None, "names no base"),
    ):
        path.write_text(json.dumps(fields | {"base_model_name_or_path": name}))
        assert refusal(capsys, "merge", tmp_path / "peft", out) == (
            1,
            f"{tmp_path / 'peft'}: {text}. Give --base HF_FOLDER.",
        )
    assert not out.exists()


def test_a_folder_of_pefts_without_its_json_is_told_apart(run: Path, tmp_path: Path, capsys: Any) -> None:
    run_tool(convert, "export", run, tmp_path / "peft")
    where, out = tmp_path / "peft", tmp_path / "out"
    text = "is a folder of PEFT's, and a run is needed here. Give the run that it was exported from."
    assert refusal(capsys, "export", where, out) == (1, f"{where}: {text}")
    (where / "adapter_config.json").unlink()
    text = "no such file (an adapter of PEFT's is a folder with an adapter_config.json in it). Give that folder."
    for command in ("merge", "export"):
        assert refusal(capsys, command, where, out) == (1, f"{where / 'adapter_config.json'}: {text}")


def test_an_adapter_is_not_used_over_another_base(run: Path, base: Path, tmp_path: Path, capsys: Any) -> None:
    file = base / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, text = refusal(capsys, "merge", run, tmp_path / "merged", "--tokenizer", "none")
    assert code == 1
    assert text.startswith(f"{run}/checkpoints/step-00000002: base = '")
    assert text.endswith(
        "(the checkpoint holds an adapter, which belongs to the base that it was trained on). "
        "Point model.init_from at that base again, unchanged, or start a new run under another --run.name."
    )


def test_a_member_can_not_name_a_folder_elsewhere(base: Path, tmp_path: Path, capsys: Any) -> None:
    several = replace(LORA, members=(MemberConfig(name="a"), MemberConfig(name="/etc/b")))
    run = make_run(tmp_path / "run", make_config(replace(several, members=()), base))
    with Checkpointer(run / "checkpoints", CheckpointConfig(asynchronous=False)) as checkpointer:
        config = make_config(LORA, base)
        meta = {"config": config_to_dict(replace(config, adapter=several)), "base": base_identity(config)}
        checkpointer.save(3, trained_model(config), None, meta)
    where = f"{run}/checkpoints/step-00000003"
    assert refusal(capsys, "export", run, tmp_path / "out") == (1, f"{where}: member = '/etc/b': must be a plain name.")


# -------------------- text


def make_tokenizer(folder: Path) -> Path:
    text = "the quick brown fox jumps over the lazy dog\nand the dog sleeps until the fox is gone\n"
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines(keepends=True) * 20), model_writer=model, model_type="bpe",
        vocab_size=VOCAB - 5, byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    (folder / "t.model").write_bytes(model.getvalue())
    return folder / "t.model"


def test_generate_with_and_without_the_adapter(run: Path, base: Path, tmp_path: Path, capsys: Any) -> None:
    run_tool(convert, "export", run, tmp_path / "peft")
    tokenizer = make_tokenizer(tmp_path)
    capsys.readouterr()

    def text(*argv: str | Path) -> str:
        options = ["--prompt", "the dog", "--greedy", "--max-new-tokens", "12", "--tokenizer", tokenizer]
        assert run_tool(generate, *argv, *options, "--dtype", "fp32") == 0
        return capsys.readouterr().out

    adapted = text(run)
    assert text(run, "--merged") == adapted != text(run, "--no-adapter")
    # Folders of Hugging Face's begin a text as transformers does.
    assert text(tmp_path / "peft") == text(base, "--adapter", tmp_path / "peft") != text(base)
    assert text(run, "--no-adapter", "--adapter", tmp_path / "peft") == adapted
    assert run_tool(generate, base, "--merged", "--tokenizer", tokenizer) == 2
    assert capsys.readouterr().err == f"error: --merged: {base} has no adapter to merge. Leave it out.\n"


def test_learned_positions_stand_before_the_prompt(base: Path, tmp_path: Path, capsys: Any) -> None:
    run = make_run(tmp_path / "run", make_config(AdapterConfig(kind="prompt", num_virtual_tokens=9), base))
    options = ["--prompt", "the dog", "--greedy", "--tokenizer", make_tokenizer(tmp_path), "--dtype", "fp32"]
    assert run_tool(generate, run, *options) == 0
    adapted = capsys.readouterr()
    assert run_tool(generate, run, *options, "--no-adapter") == 0
    assert capsys.readouterr().out != adapted.out
    assert run_tool(generate, run, "--prompt", "dog" * 55, *options[2:]) == 2
    text = "must be shorter than model.max_seq_len = 64 less the 9 virtual tokens before it. Shorten the prompt.\n"
    assert capsys.readouterr().err.endswith(text)
