"""Which files of a folder are read, and in which order."""

import os
from pathlib import Path

import pytest

from configs.check import BUILT_IN_SOURCES
from configs.errors import DataError
from engine.data.sources import STDLIB, STDLIB_DOCS, find_files, kind_of

SUPPORTED = ".jsonl, .jsonl.gz, .jsonl.zst, .parquet, and text such as .txt, .md, .py, .html, .c, .js"


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    return path


def test_the_config_knows_the_built_in_sources() -> None:
    assert BUILT_IN_SOURCES == (STDLIB, STDLIB_DOCS)


def test_kinds() -> None:
    names = ["a.txt", "a.MD", "a.py", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.json", "a.png", "README"]
    kinds = [kind_of(Path(name)) for name in names]
    assert kinds == ["text", "text", "text", "jsonl", "jsonl", "jsonl", "parquet", None, None, None]


def test_a_folder_is_searched_in_byte_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "B.txt", "a.txt", ".hidden.txt", ".git/x.txt", "__pycache__/x.py", "pic.png"):
        touch(tmp_path / name)
    corpus = find_files([str(tmp_path)])
    names = [file.path.relative_to(tmp_path).as_posix() for file in corpus.files]
    assert names == ["B.txt", "a.txt", "a/z.md", "b.txt"]
    assert corpus.left_out == {".png": 1}
    assert corpus.size_bytes == 4


def test_a_file_that_is_reached_twice_counts_once(tmp_path: Path) -> None:
    path = touch(tmp_path / "a.txt")
    os.symlink(path, tmp_path / "b.txt")
    assert len(find_files([str(path), str(tmp_path)]).files) == 1


def test_the_standard_library_without_its_tests() -> None:
    corpus = find_files([STDLIB])
    names = [file.path.as_posix() for file in corpus.files]
    assert any(name.endswith("/json/decoder.py") for name in names)
    assert not [name for name in names if "/test/" in name or "/tests/" in name or "site-packages" in name]
    assert corpus.size_bytes > 5_000_000
    assert all(file.lenient for file in corpus.files)


def test_a_missing_path_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    touch(tmp_path / "novels" / "a.txt")
    with pytest.raises(DataError) as caught:
        find_files([str(tmp_path / "novel")])
    expected = f"{tmp_path}/novel: no such file or folder. Did you mean '{tmp_path}/novels'?"
    assert str(caught.value) == expected


def test_a_misspelled_word_is_recognised() -> None:
    with pytest.raises(DataError) as caught:
        find_files(["python-stdlb"])
    assert str(caught.value) == "python-stdlb: no such file or folder. Did you mean 'python-stdlib'?"


@pytest.mark.parametrize(
    ("name", "do"),
    [
        ("a.json", "Write one object a line and call it .jsonl."),
        ("a.txt.gz", "Unpack it first."),
        ("a.csv", "Convert it to .parquet or .jsonl."),
        ("a.bin", "Rename it to .txt if it is text."),
    ],
)
def test_an_unsupported_file_is_refused(tmp_path: Path, name: str, do: str) -> None:
    path = touch(tmp_path / name)
    with pytest.raises(DataError) as caught:
        find_files([str(path)])
    assert str(caught.value) == f"{path}: is of no supported kind (supported: {SUPPORTED}). {do}"


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    touch(tmp_path / "a.png")
    with pytest.raises(DataError) as caught:
        find_files([str(tmp_path)])
    assert str(caught.value) == f"'{tmp_path}': has no text: only other files (1 .png). Supported: {SUPPORTED}."
