"""tools/evaluate.py: a saved model's loss is that of transformers on the same sequences, answers only for examples."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from configs.schema import DataConfig, StoreConfig
from engine.data.batches import IGNORE, Batch, Batches
from engine.data.prepare import PrepareOptions, prepare
from tests.runs import VOCAB, make_workplace
from tools import evaluate

SEQ_LEN = 32


def make_model(folder: Path, vocab_size: int = VOCAB) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = LlamaConfig(vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                        initializer_range=0.3)  # fmt: skip
    model = LlamaForCausalLM(shape).eval()
    model.save_pretrained(folder)
    return model


def make_examples(folder: Path) -> Path:
    """Put a store of questions and answers beside the store of texts, with its tokenizer."""
    words = [f"a{'bcdefghij'[number % 9]}{number}" for number in range(60)]
    lines = [json.dumps({"prompt": f"{word} ", "completion": word[::-1]}) for word in words]
    (folder / "examples.jsonl").write_text("\n".join(lines) + "\n")
    prepare(
        PrepareOptions(
            sources=(str(folder / "examples.jsonl"),),
            out=folder / "examples",
            tokenizer=folder / "store" / "tokenizer" / "tokenizer.model",
            workers=1,
        )
    )
    return folder / "examples"


def heldout(store: Path, *, apart: bool) -> list[Batch]:
    data = DataConfig(
        stores=(StoreConfig(path=str(store)),),
        seq_len=SEQ_LEN,
        global_batch_size=1,
        packing="none" if apart else "concat",
    )
    batches = Batches(data, 0, "heldout", objective="sft" if apart else "next_token")
    return list(batches.heldout_microbatches(0, 1, 1))


@torch.no_grad()
def theirs(model: LlamaForCausalLM, batches: list[Batch]) -> tuple[float, int]:
    """Mean loss and count of targets."""
    total, count = 0.0, 0
    for batch in batches:
        logits = model(input_ids=batch.tokens).logits
        total += F.cross_entropy(logits[0], batch.targets[0], ignore_index=IGNORE, reduction="sum").item()
        count += int((batch.targets != IGNORE).sum())
    return total / count, count


def test_losses_are_those_of_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = make_workplace(tmp_path) / "store"
    examples = make_examples(tmp_path)
    model = make_model(tmp_path / "hf")
    argv = [str(tmp_path / "hf"), "--store", str(store), "--store", str(examples), "--seq-len", str(SEQ_LEN)]
    assert evaluate.main(argv) == 0
    first, second = capsys.readouterr().out.splitlines()
    for line, path, objective in ((first, store, "next_token"), (second, examples, "sft")):
        loss, count = theirs(model, heldout(path, apart=objective == "sft"))
        found = re.fullmatch(
            rf"{re.escape(str(path))}  {objective}  held-out loss (\S+)  bits/byte \S+  ([\d,]+) tokens", line
        )
        assert found, line
        assert float(found[1]) == pytest.approx(loss, abs=6e-5)
        assert int(found[2].replace(",", "")) == count


def test_a_store_of_another_tokenizer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = make_workplace(tmp_path) / "store"
    make_model(tmp_path / "hf", vocab_size=64)
    capsys.readouterr()
    assert evaluate.main([str(tmp_path / "hf"), "--store", str(store)]) == 2
    assert capsys.readouterr().err == (
        f"error: tokens of {store} = {VOCAB}: must be at most model.vocab_size = 64 "
        "(the store is of another tokenizer than the model).\n"
    )


def test_a_loss_that_is_not_finite_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = make_workplace(tmp_path) / "store"
    model = make_model(tmp_path / "hf")
    with torch.no_grad():
        model.lm_head.weight[3] = 3e38  # finite, and its products are not
    model.save_pretrained(tmp_path / "spoiled")
    capsys.readouterr()
    assert evaluate.main([str(tmp_path / "spoiled"), "--store", str(store), "--seq-len", str(SEQ_LEN)]) == 1
    assert capsys.readouterr().err == (
        f"error: held-out loss of {tmp_path / 'spoiled'} on {store} = nan: must be finite "
        "(a weight is NaN or infinite, or the format is too narrow for it). Take an earlier checkpoint with --step.\n"
    )


def test_negative_counts_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(tmp_path), "--store", "none", "--seq-len", "-1"]) == 2
    assert capsys.readouterr().err == "error: --seq-len and --max-sequences: must be at least 0.\n"
