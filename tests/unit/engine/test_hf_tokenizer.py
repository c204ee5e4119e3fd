"""Exported tokenizers give, in transformers, the ids that sentencepiece gave."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer

from configs.errors import DataError
from engine.hf_tokenizer import leading_ids, rewritten, special_ids, tokenizer_files

TEXT = (
    "the quick brown fox jumps over the lazy dog and the dog sleeps\n"
    "def jump(self, height=3):\n    return self.quick * height\n"
    "  indented twice, 1234 numbers\tand tabs, caf\u00e9 na\u00efve\n"
)
OURS = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}
LLAMA_2 = {"normalization_rule_name": "identity", "add_dummy_prefix": True, "remove_extra_whitespaces": False}
DEFAULT = {"normalization_rule_name": "nmt_nfkc", "add_dummy_prefix": True, "remove_extra_whitespaces": True}
UNSEEN = (
    "The  dog\n\n    returns 42 foxes; \u4f60\u597d \U0001f642",
    "jumps over",
    "\tself.quick=1\r\n",
    "quick" * 50,
    "x <s> y",
)


def train(kind: str, normalization: dict[str, Any], **options: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines(keepends=True) * 20),
        model_writer=model,
        model_type=kind,
        vocab_size=330,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **(normalization | options),
    )
    return model.getvalue()


@pytest.mark.parametrize("normalization", [OURS, LLAMA_2, DEFAULT], ids=["ours", "llama2", "default"])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_autotokenizer_gives_sentencepieces_ids_and_text(
    kind: str, normalization: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "source.model").write_bytes(train(kind, normalization))
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "source.model"))
    for name, content in tokenizer_files(tmp_path / "source.model").items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    loaded: Any = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.unk_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
    assert len(loaded) == original.vocab_size()
    for text in (TEXT, *UNSEEN[:-1]):
        ids = original.encode(text)
        assert loaded(text)["input_ids"] == ids
        assert loaded.decode(ids) == original.decode(ids)


def test_user_defined_symbols_stay_whole() -> None:
    model = train("bpe", OURS, user_defined_symbols=["<|user|>", "\n"])
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    text = "dog<|user|>fox\n\n the"
    assert rewritten(model, "x").encode(text).ids == original.encode(text)


def test_a_model_of_another_kind_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        rewritten(train("char", OURS), "some.model")
    assert str(caught.value) == (
        "some.model: must be a BPE or unigram model to be rewritten as tokenizer.json. "
        "Export without it: --tokenizer none."
    )


def test_a_model_that_can_not_be_rewritten_faithfully_is_refused() -> None:
    """tokenizer.json has nothing for spaces that end a word instead of beginning it."""
    with pytest.raises(DataError) as caught:
        rewritten(train("bpe", DEFAULT, treat_whitespace_as_suffix=True), "some.model")
    assert str(caught.value) == (
        "some.model: can't be rewritten as tokenizer.json: other ids for 'Hello world'. "
        "Export without it: --tokenizer none."
    )


def test_settings_of_another_tokenizer_class_do_not_survive(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train("bpe", OURS, user_defined_symbols=["<|end|>"]))
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_prefix_space": True,
        "eos_token": "<|end|>",
        "pad_token": "<unk>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    written = json.loads(tokenizer_files(tmp_path / "tokenizer.model")["tokenizer_config.json"])
    assert written == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "pad_token": "<unk>",
        "eos_token": "<|end|>",
    }


def test_the_special_tokens_and_what_stands_before_a_text_are_found(tmp_path: Path) -> None:
    source = tmp_path / "source.model"
    source.write_bytes(train("bpe", OURS))
    assert special_ids(source) == (1, 2)
    assert leading_ids(source) == [1]  # transformers' Llama tokenizer begins a text with <s>
    for name, content in tokenizer_files(source).items():
        (tmp_path / name).write_bytes(content)
    assert special_ids(tmp_path / "tokenizer.json") == (1, 2)
    assert leading_ids(tmp_path / "tokenizer.json") == []  # ours were trained without


def test_a_tokenizer_json_is_passed_on_with_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "source.model").write_bytes(train("bpe", OURS))
    given = tokenizer_files(tmp_path / "source.model")
    for name, content in given.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "config.json").write_text("{}")
    found = tokenizer_files(tmp_path / "tokenizer.json")
    assert sorted(found) == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert found["tokenizer.json"] == given["tokenizer.json"]
