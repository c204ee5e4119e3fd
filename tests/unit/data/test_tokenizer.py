"""Tokenizers give back the text, exactly, and count its bytes; against sentencepiece and tokenizers themselves."""

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from configs.errors import ConfigError, DataError
from engine.data.examples import Fields
from engine.data.sources import find_files
from engine.data.tokenizer import GIVE, Tokenizer
from engine.data.tokenizer_training import sample_texts, train_tokenizer

TEXT = "def f(x):\n\n    return {'a': x}\t# caf\u00e9 \U0001f642\r\n\n\n  </s> <|endoftext|> \u2581 end  "


@pytest.fixture(scope="module")
def byte_level_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2-like tokenizer.json, whose post-processor would add an end token."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    made.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|stop|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([TEXT] * 3, trainer)
    path = tmp_path_factory.mktemp("byte-level") / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.fixture(params=["sentencepiece", "huggingface"])
def tokenizer(request: pytest.FixtureRequest, tokenizer_file: Path, byte_level_file: Path) -> Tokenizer:
    return Tokenizer(tokenizer_file if request.param == "sentencepiece" else byte_level_file)


def test_decoding_gives_back_the_text_and_the_bytes_add_up(tokenizer: Tokenizer) -> None:
    table = tokenizer.token_bytes()
    assert tokenizer.prefix_bytes() == 0
    for text in (TEXT, "", " ", "\n", "\u2581", "\0", "a\u2581\u2581b", "e\u0301 \ufb01"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert int(table[ids].sum()) == len(text.encode())


def test_the_end_token_is_never_read_out_of_a_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_token in ("</s>", "<|endoftext|>")
    assert tokenizer.eos_id not in tokenizer.encode(TEXT)
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eos_id]) == "a"
    assert tokenizer.token_bytes()[tokenizer.eos_id] == 0


def test_a_stream_gives_whole_characters_and_the_whole_text(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    parts = [stream.push(token) for token in tokenizer.encode(TEXT)]
    assert all("\ufffd" not in part for part in parts)
    assert "".join(parts) + stream.finish() == TEXT
    stream = tokenizer.stream()
    face = tokenizer.encode("\U0001f642")
    assert [stream.push(token) for token in face[:-1]] == [""] * (len(face) - 1)
    assert stream.finish() != ""


def test_a_copy_loads_with_the_same_end_token(tokenizer: Tokenizer, byte_level_file: Path, tmp_path: Path) -> None:
    tokenizer.copy_to(tmp_path / "copy")
    again = Tokenizer(tmp_path / "copy")
    assert (again.sha256, again.eos_id, again.bos_id) == (tokenizer.sha256, tokenizer.eos_id, tokenizer.bos_id)
    stop = Tokenizer(byte_level_file, "<|stop|>")
    stop.copy_to(tmp_path / "stop")
    assert stop.eos_id != Tokenizer(byte_level_file).eos_id
    assert Tokenizer(tmp_path / "stop").eos_id == stop.eos_id


def test_the_end_token_of_tokenizer_config(byte_level_file: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(byte_level_file.read_bytes())
    for written in ("<|stop|>", {"content": "<|stop|>", "lstrip": False}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": written}))
        assert Tokenizer(tmp_path).eos_token == "<|stop|>"


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]")).save(str(path))
    with pytest.raises(DataError) as caught:
        Tokenizer(path)
    why = "documents are joined by it"
    assert str(caught.value) == f"{path}: has no end-of-text token ({why}). Name one of its tokens with --eos-token."
    assert Tokenizer(path, "a").eos_id == 0


def test_an_unknown_end_token_is_refused(byte_level_file: Path) -> None:
    with pytest.raises(DataError) as caught:
        Tokenizer(byte_level_file, "<|end|>")
    expected = "--eos-token = '<|end|>': is no token of tokenizer.json. Did you mean '<|endoftext|>'?"
    assert str(caught.value) == expected


def test_llama_2_style_spaces_count_one_byte_too_many(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(models.BPE({"\u2581": 0, "a": 1, "b": 2, "</s>": 3}, []))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")  # pyright: ignore[reportAttributeAccessIssue]
    made.decoder = decoders.Metaspace(prepend_scheme="first")  # pyright: ignore[reportAttributeAccessIssue]
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.prefix_bytes() == 1
    ids = tokenizer.encode("ab a")
    assert int(tokenizer.token_bytes()[ids].sum()) - tokenizer.prefix_bytes() == 4
    stream = tokenizer.stream()
    assert "".join(stream.push(token) for token in ids) == "ab a"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.txt",
            b"x",
            "{path}: is no tokenizer. Give a sentencepiece .model or a tokenizer.json, or a folder with one.",
        ),
        (
            "a.model",
            b"IQ== 0\n",
            "{path}: is not a sentencepiece model. "
            "Where a tokenizer.json lies beside it (Llama 3's .model is of another kind), give that.",
        ),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        Tokenizer(path)
    assert str(caught.value) == expected.format(path=path)


def test_json_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    do = r"Give a tokenizer\.json of the tokenizers library, or a sentencepiece \.model\."
    with pytest.raises(DataError, match=rf"/a\.json: is not a tokenizer \(.+\)\. {do}$"):
        Tokenizer(tmp_path / "a.json")


def test_missing_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        Tokenizer(tmp_path / "no.model")
    assert str(caught.value) == f"{tmp_path}/no.model: no such tokenizer. {GIVE}"
    with pytest.raises(DataError) as caught:
        Tokenizer(tmp_path)
    assert str(caught.value) == f"{tmp_path}: holds neither tokenizer.json nor tokenizer.model. {GIVE}"


# ------------------------------------------------------------------------------------------------------------- training


def stdlib_texts() -> Iterator[str]:
    folder = Path(sysconfig.get_path("stdlib"), "json")
    for path in sorted(folder.glob("*.py")):
        yield path.read_text()


def test_training_twice_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_tokenizer(stdlib_texts(), 500, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_trained_tokenizer_gives_back_code_exactly(tmp_path: Path) -> None:
    train_tokenizer(stdlib_texts(), 500, tmp_path / "a.model")
    tokenizer = Tokenizer(tmp_path / "a.model")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (500, 1, 2)
    num_bytes = num_tokens = 0
    for text in stdlib_texts():
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        num_bytes, num_tokens = num_bytes + len(text.encode()), num_tokens + len(ids)
    assert num_bytes / num_tokens > 2


@given(st.text())
def test_any_text_survives(tokenizer_file: Path, text: str) -> None:
    tokenizer = Tokenizer(tokenizer_file)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.token_bytes()[ids].sum()) == len(text.encode())


@pytest.mark.parametrize(
    ("vocab_size", "texts", "kind", "expected"),
    [
        (
            4096,
            ["hello world"],
            DataError,
            "--train-tokenizer = 4096: this corpus gives 285 tokens at most (there is too little text for more). "
            "Use 285 or less.",
        ),
        (
            300,
            ["".join(map(chr, range(0x4E00, 0x4F00)))],
            DataError,
            "--train-tokenizer = 300: this corpus needs at least 515 (each character of the text needs a token). "
            "Use 515 or more.",
        ),
        (300, [], DataError, "--train-tokenizer = 300: the corpus has no text to learn from."),
        (
            100,
            ["a"],
            ConfigError,
            "--train-tokenizer = 100: must be at least 260 (3 special tokens and 256 bytes come first).",
        ),
    ],
)
def test_impossible_vocabularies_are_refused(
    tmp_path: Path, vocab_size: int, texts: list[str], kind: type[Exception], expected: str
) -> None:
    with pytest.raises(kind) as caught:
        train_tokenizer(iter(texts), vocab_size, tmp_path / "a.model")
    assert str(caught.value) == expected
    assert not (tmp_path / "a.model").exists()


def test_the_sample_is_bounded_and_spread_over_the_corpus(tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / f"{number:03d}.txt").write_text(f"{number:04d}" * 250)
    corpus = find_files([str(tmp_path)])
    numbers = [int(text[:4]) for text in sample_texts(corpus, Fields(), 20_000, 0, lambda text: True)]
    assert len(numbers) == 20
    assert all(5 * place <= number < 5 * place + 5 for place, number in enumerate(numbers))
    first = [int(text[:4]) for text in sample_texts(corpus, Fields(), 20_000, 10_000, lambda text: True)]
    assert first == list(range(10))
    odd = [text for text in sample_texts(corpus, Fields(), 10**9, 0, lambda text: int(text[:4]) % 2 == 1)]
    assert len(odd) == 50
