"""A token store gives back what was written, and refuses what was altered."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from configs.errors import DataError
from engine.data.number_file import NumberFile
from engine.data.prepare import Prepared
from engine.data.store import TokenStore, smallest_dtype
from engine.data.tokenizer import Tokenizer
from engine.data.writer import SplitWriter

Make = Callable[..., Prepared]
DAMAGED = "(the store is damaged). Remove the folder and prepare it again."


def test_what_is_read_is_what_the_tokenizer_gives(make_store: Make, texts: list[str], tokenizer_file: Path) -> None:
    store = TokenStore.open(make_store(texts, heldout_fraction=0.0).path, verify="full")
    tokenizer = Tokenizer(tokenizer_file)
    documents = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    split = store.split("train")
    assert split.read(0, split.num_tokens).tolist() == [token for document in documents for token in document]
    assert split.offsets.tolist() == np.cumsum([0, *map(len, documents)]).tolist()
    assert split.document_bytes.tolist() == [len(text.encode()) for text in texts]
    assert (split.num_documents, split.num_bytes) == (len(texts), sum(len(text.encode()) for text in texts))
    assert store.token_bytes().tolist() == tokenizer.token_bytes().tolist()
    assert store.split("heldout").num_tokens == 0


def test_reading_across_shards(make_store: Make, texts: list[str]) -> None:
    whole = TokenStore.open(make_store(texts, name="whole").path).split("train")
    path = make_store(texts, name="cut", shard_bytes=200).path
    cut = TokenStore.open(path, verify="full").split("train")
    assert len(list((path / "train").glob("tokens-*.bin"))) == -(-whole.num_tokens // 100)
    assert cut.read(0, cut.num_tokens).tolist() == whole.read(0, whole.num_tokens).tolist()
    for start, stop in ((0, 0), (99, 101), (100, 200), (150, 471), (cut.num_tokens - 1, cut.num_tokens)):
        assert cut.read(start, stop).tolist() == whole.read(start, stop).tolist()


def test_what_is_read_is_a_copy(make_store: Make, texts: list[str]) -> None:
    split = TokenStore.open(make_store(texts).path).split("train")
    tokens = split.read(0, 4)
    tokens[:] = 0
    assert split.read(0, 4).tolist() != [0, 0, 0, 0]


def test_the_fingerprint_follows_content_and_not_place(make_store: Make, texts: list[str], tmp_path: Path) -> None:
    first = make_store(texts)
    shutil.move(first.path, tmp_path / "moved")
    assert TokenStore.open(tmp_path / "moved").fingerprint == first.manifest.fingerprint
    assert make_store(texts, name="same").manifest.fingerprint == first.manifest.fingerprint
    assert make_store([*texts, "more"], name="more").manifest.fingerprint != first.manifest.fingerprint


def test_missing_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        TokenStore.open(tmp_path / "none")
    assert str(caught.value) == f"{tmp_path}/none: no such token store. Make one with tools/prepare.py."
    with pytest.raises(DataError) as caught:
        TokenStore.open(tmp_path)
    do = "Make one with tools/prepare.py."
    assert str(caught.value) == f"{tmp_path}: is not a token store (manifest.json is missing). {do}"
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError) as caught:
        TokenStore.open(tmp_path)
    assert (
        str(caught.value)
        == f"{tmp_path}/manifest.json: is not the manifest of a token store. Make one with tools/prepare.py."
    )


def test_a_truncated_or_missing_file_is_named(make_store: Make, texts: list[str]) -> None:
    path = make_store(texts).path
    tokens = path / "train" / "tokens-00000.bin"
    size = tokens.stat().st_size
    with open(tokens, "r+b") as file:
        file.truncate(size - 2)
    (path / "tokenizer" / "tokenizer.model").unlink()
    with pytest.raises(DataError) as caught:
        TokenStore.open(path)
    what = f"tokenizer/tokenizer.model: No such file or directory; train/tokens-00000.bin has {size - 2} bytes"
    assert str(caught.value) == f"{path}: {what}, the manifest says {size} {DAMAGED}"


def test_an_altered_byte_is_found_by_the_full_check(make_store: Make, texts: list[str]) -> None:
    path = make_store(texts).path
    tokens = path / "train" / "tokens-00000.bin"
    data = bytearray(tokens.read_bytes())
    data[10] ^= 1
    tokens.write_bytes(data)
    TokenStore.open(path)
    with pytest.raises(DataError) as caught:
        TokenStore.open(path, verify="full")
    what = "train/tokens-00000.bin was altered: another sha256 than the manifest says"
    assert str(caught.value) == f"{path}: {what} {DAMAGED}"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: m.update(version=2), "manifest.json: version = 2: this Ropewalk reads 1. Prepare the store again."),
        (lambda m: m.pop("splits"), "manifest.json: was altered (KeyError: 'splits'). Prepare the store again."),
        (
            lambda m: m["splits"]["train"].update(tokens=7),
            "manifest.json: was altered (ValueError: files of train and its counts disagree). Prepare the store again.",
        ),
        (
            lambda m: m["tokenizer"].update(eos_id=7),
            "manifest.json: was altered (ValueError: another fingerprint than its content has). "
            "Prepare the store again.",
        ),
    ],
)
def test_an_altered_manifest_is_refused(
    make_store: Make, texts: list[str], change: Callable[[dict[str, object]], object], expected: str
) -> None:
    path = make_store(texts).path
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError) as caught:
        TokenStore.open(path)
    assert str(caught.value) == f"{path}/{expected}"


def test_a_file_that_was_cut_since_it_was_opened_is_named(make_store: Make, texts: list[str]) -> None:
    """Even between a look at its size and the reading, which under a mapping would end the process by SIGBUS."""
    path = make_store(texts).path
    split, file = TokenStore.open(path).split("train"), path / "train" / "tokens-00000.bin"
    size, first = file.stat().st_size, split.read(0, 2)
    os.truncate(file, 5)
    assert split.read(0, 2).tolist() == first.tolist()
    with pytest.raises(
        DataError, match=rf"tokens-00000\.bin: has 5 bytes, the manifest says {size} \(it was cut while"
    ):
        split.read(0, 3)


def test_a_file_that_the_system_can_not_read_is_named(tmp_path: Path) -> None:
    folder = NumberFile(tmp_path, np.dtype("<u2"), 3)
    with pytest.raises(DataError, match=rf"^{tmp_path}: can't be read \(Is a directory\)\. Restore it from a copy"):
        folder.read(0, np.empty(3, dtype="<u2"))


def test_a_truncated_manifest_is_refused(make_store: Make, texts: list[str]) -> None:
    path = make_store(texts).path
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text[: len(text) // 2])
    with pytest.raises(DataError, match=r"manifest\.json: is not JSON \(.+\)\. Prepare the store again\."):
        TokenStore.open(path)


def test_the_smallest_type_that_holds_a_vocabulary() -> None:
    assert [smallest_dtype(size) for size in (1, 65536, 65537, 128256)] == ["uint16", "uint16", "uint32", "uint32"]


def test_wide_tokens_are_kept(tmp_path: Path) -> None:
    writer = SplitWriter(tmp_path / "train", "uint32", 3)
    tokens = np.array([70_000, 128_255, 5, 6, 4_000_000_000], dtype=np.uint32)
    writer.append(tokens, np.array([2, 3]), np.array([4, 5]))
    entry = writer.finish()
    assert (entry.documents, entry.tokens, entry.bytes) == (2, 5, 9)
    files = [tmp_path / "train" / f"tokens-{index:05d}.bin" for index in range(2)]
    assert np.concatenate([np.fromfile(file, dtype="<u4") for file in files]).tolist() == tokens.tolist()
