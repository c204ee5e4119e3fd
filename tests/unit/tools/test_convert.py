"""The whole way: a run's checkpoint -> Hugging Face folder -> transformers, and back to a config and to text."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.check import resolve
from configs.load import config_to_dict, load_config
from configs.schema import CheckpointConfig, Config, DataConfig, ModelConfig, PrecisionConfig, RunConfig, StoreConfig
from engine.checkpoint.checkpointer import Checkpointer
from engine.data.tokenizer import Tokenizer
from engine.generate import Sampling
from engine.generate import generate as generate_tokens
from engine.saved_model import load_model, open_model
from models.hf_weights import HfWeights
from models.llama import Llama
from tools import convert, generate

TEXT = "the quick brown fox jumps over the lazy dog\nand the dog sleeps until the fox is gone\n"
VOCAB = 300


def make_config(tie: bool = True) -> Config:
    model = ModelConfig(
        vocab_size=VOCAB,
        dim=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        ffn_dim=48,
        max_seq_len=64,
        tie_embeddings=tie,
        rope_theta=5e5,
    )
    stores = (StoreConfig(path="data/none"),)
    config = Config(
        run=RunConfig(name="tiny", steps=1),
        model=model,
        data=DataConfig(stores=stores, seq_len=64, global_batch_size=1),
        precision=PrecisionConfig(compute="fp32"),
    )
    return resolve(config, 1)


def train_tokenizer(folder: Path) -> Path:
    folder.mkdir()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines(keepends=True) * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB - 5,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with checkpoints of steps 1 and 2, step 1 the better one, and a tokenizer."""
    return make_run(tmp_path)


def make_run(tmp_path: Path, tie: bool = True) -> Path:
    config = make_config(tie)
    tokenizer = train_tokenizer(tmp_path / "tokenizer")
    folder = tmp_path / "runs" / "tiny"
    with Checkpointer(folder / "checkpoints", CheckpointConfig(asynchronous=False)) as checkpointer:
        for step, loss in ((1, 2.0), (2, 3.0)):
            model = make_model(config, step)
            meta = {"config": config_to_dict(config)}
            checkpointer.save(step, model, None, meta, tokenizer, loss)
    return folder


def make_model(config: Config, seed: int) -> Llama:
    torch.manual_seed(seed)
    model = Llama(config.model)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.5)
    if not config.model.tie_embeddings:  # pieces of text, seldom bytes: those make characters in one library only
        model.lm_head.weight.data[:259] = 0.0
    return model


def run_tool(tool: Any, *argv: str | Path) -> int:
    return tool.main([str(word) for word in argv])


def refusal(capsys: pytest.CaptureFixture[str], tool: Any, *argv: str | Path) -> tuple[int, str]:
    code = run_tool(tool, *argv)
    return code, capsys.readouterr().err


@pytest.mark.parametrize("tie", [True, False])
def test_an_exported_run_gives_the_same_logits_and_ids_in_transformers(tie: bool, tmp_path: Path) -> None:
    run = make_run(tmp_path, tie)
    assert run_tool(convert, "export", run, tmp_path / "hf") == 0
    tokens = torch.randint(0, VOCAB, (2, 30))
    ours = make_model(make_config(tie), 2)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.dtype == torch.float32
    expected = ours.lm_head(ours(tokens))
    assert (theirs(tokens).logits - expected).norm() / expected.norm() < 1e-5
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "hf")
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer" / "tokenizer.model"))
    assert tokenizer(TEXT)["input_ids"] == original.encode(TEXT)
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (1, 2)
    assert theirs.generation_config.eos_token_id == tokenizer.eos_token_id == 2


def test_step_best_and_dtype_choose_what_is_exported(run: Path, tmp_path: Path) -> None:
    run_tool(convert, "export", run, tmp_path / "newest")
    run_tool(convert, "export", run, tmp_path / "first", "--step", "1")
    run_tool(convert, "export", run, tmp_path / "best", "--best", "--dtype", "bf16", "--max-shard-gb", "1e-5")
    name = "embed_tokens.weight"
    first = make_model(make_config(), 1).embed_tokens.weight
    assert torch.equal(HfWeights(tmp_path / "first").read(name), first)
    assert torch.equal(HfWeights(tmp_path / "best").read(name), first.bfloat16())
    assert torch.equal(HfWeights(tmp_path / "newest").read(name), make_model(make_config(), 2).embed_tokens.weight)
    assert len(list((tmp_path / "best").glob("*.safetensors"))) > 3


def test_an_altered_checkpoint_is_not_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The newest is refused and named, the good one before it taken; asked for by its step, it is an error."""
    shard = next((run / "checkpoints" / "step-00000002").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert run_tool(convert, "export", run, tmp_path / "hf") == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("note: step-00000002: ")
    assert "step-00000001" in captured.out
    code, error = refusal(capsys, convert, "export", run, tmp_path / "other", "--step", "2")
    assert (code, error.startswith("error: step-00000002: ")) == (1, True)
    assert not (tmp_path / "other").exists()


def test_import_writes_a_config_that_loads_and_names_the_folder(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_tool(convert, "export", run, tmp_path / "hf")
    out = tmp_path / "configs" / "further.toml"
    assert run_tool(convert, "import", tmp_path / "hf", "--out", out, "--store", "data/mine") == 0
    config = resolve(load_config(out, []), 2)
    assert config.model == replace(make_config().model, init_from=str(tmp_path / "hf"))
    assert (config.run.name, config.data.stores[0].path, config.data.seq_len) == ("further", "data/mine", 64)
    assert out.read_text().startswith(f"# torchrun --nproc-per-node 2 launchers/train.py {out}\n")
    # Whole models want a tenth of what LoRA does.
    assert "\n# For LoRA: --adapter.kind lora --optim.lr 2e-4\n\n" in out.read_text()
    assert config.optim.lr == 2e-5
    assert (
        f"python tools/prepare.py YOUR_TEXT --tokenizer {tmp_path / 'hf' / 'tokenizer.json'}" in capsys.readouterr().out
    )


def test_import_names_a_missing_config_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").touch()
    code, error = refusal(capsys, convert, "import", tmp_path / "hf", "--out", tmp_path / "x.toml")
    assert (code, error) == (
        1,
        f"error: {tmp_path / 'hf' / 'config.json'}: no such file (a Hugging Face folder describes its model there). "
        "Copy the model's config.json beside the weights.\n",
    )


def test_import_refuses_what_does_not_fit_and_writes_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_tool(convert, "export", run, tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 1}))
    capsys.readouterr()
    code, error = refusal(capsys, convert, "import", tmp_path / "hf", "--out", tmp_path / "x.toml")
    assert code == 1
    do = "fetch them again, or the config.json that they were saved with"
    head = f"error: {tmp_path / 'hf'}: the weights do not fit the model; {do}:\n  unexpected: model.layers.1."
    assert error.startswith(head)
    assert not (tmp_path / "x.toml").exists()


def test_nothing_is_overwritten(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_tool(convert, "export", run, tmp_path / "hf")
    capsys.readouterr()
    text = "exists already (nothing is ever overwritten). Remove it or give another name."
    assert refusal(capsys, convert, "export", run, tmp_path / "hf") == (1, f"error: {tmp_path / 'hf'}: {text}\n")
    (tmp_path / "x.toml").write_text("mine")
    code, error = refusal(capsys, convert, "import", tmp_path / "hf", "--out", tmp_path / "x.toml")
    assert (code, error) == (2, f"error: {tmp_path / 'x.toml'}: {text}\n")
    assert (tmp_path / "x.toml").read_text() == "mine"


def test_user_errors_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, convert, "export", tmp_path / "gone", tmp_path / "hf") == (
        1,
        f"error: {tmp_path / 'gone'}: no such folder. Give a run (runs/NAME), a checkpoint or a Hugging Face folder.\n",
    )
    assert refusal(capsys, convert, "export", run, tmp_path / "hf", "--tokenizer", "nope.model") == (
        2,
        "error: --tokenizer = 'nope.model': no such file. Give a tokenizer.json or a .model file.\n",
    )
    assert refusal(capsys, convert, "export", run, tmp_path / "hf", "--max-shard-gb", "0") == (
        2,
        "error: --max-shard-gb = 0.0: must be more than 0.\n",
    )
    run_tool(convert, "export", run, tmp_path / "bare", "--tokenizer", "none")
    assert not (tmp_path / "bare" / "tokenizer.json").exists()
    capsys.readouterr()
    assert refusal(capsys, convert, "export", tmp_path / "bare", tmp_path / "hf", "--step", "3") == (
        1,
        f"error: {tmp_path / 'bare'}: is a Hugging Face folder, which has no steps to choose from. Leave that out.\n",
    )
    assert refusal(capsys, convert, "export", tmp_path / "bare", tmp_path / "hf") == (
        1,
        f"error: {tmp_path / 'bare'}: no tokenizer was saved with the model. "
        "Give --tokenizer FILE, or --tokenizer none.\n",
    )


def test_a_loaded_model_has_the_checkpoints_weights_and_is_tied(run: Path) -> None:
    model = load_model(open_model(run, best=True), torch.device("cpu"), torch.float32)
    expected = make_model(make_config(), 1).state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight is model.embed_tokens.weight


def test_generate_gives_the_same_text_from_a_run_and_from_its_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, tie=False)
    run_tool(convert, "export", run, tmp_path / "hf")
    capsys.readouterr()
    options = ["--prompt", "the dog", "--max-new-tokens", "20", "--seed", "4", "--temperature", "0.5"]
    assert run_tool(generate, run, *options) == 0
    from_run = capsys.readouterr()
    assert run_tool(generate, tmp_path / "hf", *options) == 0
    from_export = capsys.readouterr()
    assert from_run.out == from_export.out
    assert from_run.out.startswith("the dog")
    assert len(from_run.out) > len("the dog\n")
    assert " tokens/s on cpu (" in from_run.err


def test_streamed_text_is_the_decoded_whole(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A random model emits bytes, whole characters and broken ones, in any order."""
    sampling = Sampling(max_new_tokens=40, temperature=5.0, top_p=1.0, seed=1)
    options = ["--max-new-tokens", "40", "--temperature", "5", "--top-p", "1", "--seed", "1"]
    assert run_tool(generate, run, "--prompt", "\u4f60", *options) == 0
    saved = open_model(run)
    assert saved.tokenizer is not None
    tokenizer = Tokenizer(saved.tokenizer)
    model = load_model(saved, torch.device("cpu"), torch.float32)
    ids = list(generate_tokens(model, tokenizer.encode("\u4f60"), sampling, tokenizer.eos_id, tokenizer.vocab_size))
    assert capsys.readouterr().out == "\u4f60" + tokenizer.decode(ids) + "\n"


def test_generate_refuses_what_can_not_work(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, generate, run, "--top-p", "0", "--temperature", "-1") == (
        2,
        "error: temperature = -1.0: must be 0 (greedy) or more.\ntop_p = 0.0: must be above 0 and at most 1.\n",
    )
    code, error = refusal(capsys, generate, run, "--prompt", "fox " * 100)
    assert code == 2
    assert error.endswith(": must be shorter than model.max_seq_len = 64. Shorten the prompt.\n")
    code, error = refusal(capsys, generate, run, "--device", "nonsense")
    assert (code, error.startswith("error: --device = 'nonsense': can't be used (")) == (2, True)
    assert refusal(capsys, generate, run, "--seed", str(10**22))[0] == 2
    code, error = refusal(capsys, generate, run, "--threads", str(10**12))
    assert (code, error) == (2, "error: --threads = 1000000000000: must be from 0 to 1024.\n")
    # What Python makes of a byte 255 on the command line.
    code, error = refusal(capsys, generate, run, "--prompt", "\udcff")
    assert (code, error) == (2, "error: --prompt = '\\udcff': must be text in UTF-8.\n")
    assert refusal(capsys, generate, "x" * 5000)[0] == 1
    assert refusal(capsys, generate, run, "--step", "7")[0] == 1
