"""A small real tokenizer and texts of many shapes, made once for the room's tests."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.data.prepare import Prepared, PrepareOptions, prepare
from engine.data.tokenizer_training import train_tokenizer

WORDS = "rope strand laid parallel hall twist yarn hemp tar walk fibre cable knot splice hitch".split()  # noqa: SIM905


def make_texts(count: int) -> list[str]:
    """Distinct texts of one to about sixty words, with code-like spacing and characters outside of ASCII."""
    texts = []
    for number in range(count):
        words = random.Random(number).choices(WORDS, k=1 + number * 37 % 60)
        texts.append(f"def f{number}():\n    return '{' '.join(words)}'  # caf\u00e9 {number}\n")
    return texts


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model of 320 tokens."""
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_tokenizer(iter(make_texts(200)), 320, path)
    return path


@pytest.fixture
def texts() -> list[str]:
    return make_texts(120)


@pytest.fixture
def make_store(tmp_path: Path, tokenizer_file: Path) -> Callable[..., Prepared]:
    """Prepare a store of texts, one file each, in the order given."""

    def make(texts: list[str], name: str = "store", **options: object) -> Prepared:
        folder = tmp_path / f"{name}-texts"
        folder.mkdir()
        for number, text in enumerate(texts):
            (folder / f"{number:05d}.txt").write_bytes(text.encode())
        tokenizer = None if "train_tokenizer" in options else tokenizer_file
        given = {"sources": (str(folder),), "out": tmp_path / name, "tokenizer": tokenizer, "workers": 1}
        return prepare(PrepareOptions(**(given | options)))  # pyright: ignore[reportArgumentType]

    return make
