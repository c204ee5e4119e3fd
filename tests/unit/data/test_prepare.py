"""A corpus becomes a token store: what is read, counted, refused and published, against plain Python."""

import fcntl
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from configs.errors import ConfigError, DataError
from configs.schema import StoreConfig
from engine.data import prepare as prepare_module
from engine.data.encoding import num_workers, text_hash
from engine.data.prepare import Prepared, PrepareOptions, Progress, is_held_out, prepare, prepare_from_config
from engine.data.staging import staged_folder
from engine.data.store import TokenStore
from engine.data.tokenizer import Tokenizer

Make = Callable[..., Prepared]


def documents_of(path: Path, split: Any, tokenizer: Tokenizer) -> list[str]:
    store = TokenStore.open(path, verify="full").split(split)
    bounds = store.offsets.tolist()
    read = [store.read(begin, end).tolist() for begin, end in itertools.pairwise(bounds)]
    assert all(ids[-1] == tokenizer.eos_id and tokenizer.eos_id not in ids[:-1] for ids in read)
    return [tokenizer.decode(ids) for ids in read]


def tree(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_every_document_is_on_the_side_that_its_hash_says(
    make_store: Make, texts: list[str], tokenizer_file: Path
) -> None:
    texts = texts + texts[:40]
    path = make_store(texts, heldout_fraction=0.2).path
    tokenizer = Tokenizer(tokenizer_file)
    train, heldout = documents_of(path, "train", tokenizer), documents_of(path, "heldout", tokenizer)
    limit = int(0.2 * 2**64)
    assert heldout == [text for text in texts if text_hash(text) < limit]
    assert train == [text for text in texts if text_hash(text) >= limit]
    assert not set(train) & set(heldout)
    assert 0.1 < len(heldout) / len(texts) < 0.3


def test_the_hash_of_a_text_never_changes() -> None:
    # A store made years ago and one made today must agree on what is held out.
    assert [text_hash(text) for text in ("", "rope")] == [15833606621190827242, 6391249703242200416]


def test_the_share_of_held_out_texts() -> None:
    hashes = np.array([text_hash(str(number)) for number in range(20_000)], dtype=np.uint64)
    assert abs(is_held_out(hashes, 0.05).mean() - 0.05) < 0.005
    assert not is_held_out(hashes, 0.0).any()


def test_a_small_corpus_holds_out_the_document_of_the_lowest_hash(
    make_store: Make, texts: list[str], tokenizer_file: Path
) -> None:
    few = [texts[3], texts[1], texts[3], texts[2], texts[1]]
    path = make_store(few, heldout_fraction=1e-9).path
    lowest = min(few, key=text_hash)
    tokenizer = Tokenizer(tokenizer_file)
    assert documents_of(path, "heldout", tokenizer) == [text for text in few if text == lowest]
    assert documents_of(path, "train", tokenizer) == [text for text in few if text != lowest]
    assert sorted(entry.name for entry in path.iterdir()) == [
        "heldout",
        "manifest.json",
        "token_bytes.bin",
        "tokenizer",
        "train",
    ]


def test_a_single_document_is_trained_on(make_store: Make) -> None:
    manifest = make_store(["only one", "only one"]).manifest
    assert (manifest.splits["train"].documents, manifest.splits["heldout"].documents) == (2, 0)


def test_the_store_does_not_depend_on_the_number_of_workers(
    make_store: Make, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.data.encoding.CHUNK_BYTES", 1000)
    one = make_store(texts, name="one", train_tokenizer=300)
    two = make_store(texts, name="two", train_tokenizer=300, workers=2, sources=one.manifest.preparation["sources"])
    assert tree(one.path) == tree(two.path)


def test_workers_are_as_many_as_the_corpus_is_worth() -> None:
    assert num_workers(7, 0) == 7
    assert num_workers(0, 1 << 20) == 1
    assert num_workers(0, 1 << 40) >= 1


def write_bad(tmp_path: Path) -> Path:
    lines = ['{"text": "one"}', "{", '{"text": ""}', '{"text": "two"}', "{", '{"texts": "x"}']
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_a_bad_record_ends_the_preparation(tmp_path: Path, tokenizer_file: Path) -> None:
    path = write_bad(tmp_path)
    with pytest.raises(DataError) as caught:
        prepare(PrepareOptions(sources=(str(path),), out=tmp_path / "store", tokenizer=tokenizer_file))
    what = "not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"
    do = "Repair it, or leave such records out: tools/prepare.py --on-bad-record skip."
    assert str(caught.value) == f"{path}:2: {what}. {do}"
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.jsonl"]


def test_bad_records_are_counted_and_named(
    tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "BAD_EXAMPLES", 2)
    path = write_bad(tmp_path)
    options = PrepareOptions(
        sources=(str(path),), out=tmp_path / "store", tokenizer=tokenizer_file, on_bad_record="skip"
    )
    prepared = prepare(options)
    assert prepared.bad_records == {"broken_json": 2, "empty": 1, "missing_field": 1}
    examples = json.loads((tmp_path / "store" / "manifest.json").read_text())["preparation"]["bad_records"]["examples"]
    assert [example.split(": ")[:2] for example in examples] == [
        ["broken_json", f"{path}:2"],
        ["empty", f"{path}:3"],
    ]
    assert sum(split.documents for split in prepared.manifest.splits.values()) == 2


def test_a_corpus_without_any_document_is_refused(tmp_path: Path, tokenizer_file: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x"}\n' * 3)
    options = PrepareOptions(
        sources=(str(path),), out=tmp_path / "store", tokenizer=tokenizer_file, on_bad_record="skip"
    )
    with pytest.raises(DataError) as caught:
        prepare(options)
    first = f"The first: missing_field: {path}:1: field 'text' is missing (fields: 'body')"
    assert str(caught.value) == f"'{path}': no document in 1 files (3 missing_field). {first}"


def test_nothing_is_left_to_train_on(make_store: Make, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        make_store(["a b c"], heldout_fraction=0.999999)
    assert str(caught.value) == f"{tmp_path}/store: every document would be held out. Lower --heldout-fraction."


def test_max_bytes_stops_before_the_document_that_exceeds_it(
    make_store: Make, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = np.cumsum([len(text.encode()) for text in texts])
    for name, chunk_bytes in (("chunks", 500), ("whole", 1 << 20)):
        monkeypatch.setattr("engine.data.encoding.CHUNK_BYTES", chunk_bytes)
        for limit, count in ((int(sizes[9]), 10), (int(sizes[9]) - 1, 9), (int(sizes[-1]), len(texts))):
            manifest = make_store(texts, name=f"{name}-{limit}", max_bytes=limit).manifest
            assert sum(split.documents for split in manifest.splits.values()) == count
            assert sum(split.bytes for split in manifest.splits.values()) == sizes[count - 1]
    with pytest.raises(DataError) as caught:
        make_store(texts, name="none", max_bytes=3)
    what = f"is less than the first document, of {sizes[0]} bytes"
    assert str(caught.value) == f"max_bytes = 3: {what}. Allow more."


def test_an_existing_folder_is_never_written_over(make_store: Make, texts: list[str], tmp_path: Path) -> None:
    path = make_store(texts).path
    before = tree(path)
    with pytest.raises(DataError) as caught:
        prepare(PrepareOptions(sources=(str(tmp_path / "store-texts"),), out=path, train_tokenizer=300))
    why = "nothing is written over"
    assert str(caught.value) == f"{path}: exists already ({why}). Remove it or choose another folder."
    assert tree(path) == before


def test_an_interruption_leaves_nothing(make_store: Make, texts: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(texts[0])

    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(PrepareOptions(sources=(str(folder),), out=tmp_path / "out" / "store", train_tokenizer=300), interrupt)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_a_killed_preparation_left_is_taken_over(make_store: Make, texts: list[str], tmp_path: Path) -> None:
    left = tmp_path / ".store.preparing"
    (left / "train").mkdir(parents=True)
    (left / "train" / "tokens-00000.bin").write_bytes(b"half")
    (left / "manifest.json").write_text("{}")
    path = make_store(texts).path
    TokenStore.open(path, verify="full")
    assert not left.exists()
    assert sorted(entry.name for entry in path.iterdir())[0] == "heldout"


def test_two_builders_of_one_folder(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "store") as folder:
        (folder / "a").write_text("first")
        with pytest.raises(DataError) as caught, staged_folder(tmp_path / "store"):
            pytest.fail("two builders")
        (folder / "b").write_text("first")
    do = "Wait for it, or choose another folder."
    assert str(caught.value) == f"{tmp_path}/.store.preparing: another process is writing here. {do}"
    assert sorted(os.listdir(tmp_path / "store")) == ["a", "b"]


def test_a_folder_that_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="exists already"), staged_folder(tmp_path / "store") as folder:
        (folder / "a").write_text("mine")
        (tmp_path / "store").mkdir()
        (tmp_path / "store" / "b").write_text("theirs")
    assert os.listdir(tmp_path / "store") == ["b"]
    assert not (tmp_path / ".store.preparing").exists()


def test_a_full_disk_is_one_clear_message(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught, staged_folder(tmp_path / "store"):
        raise OSError(28, "No space left on device")
    do = "Make room or choose another folder; nothing was left behind."
    assert str(caught.value) == f"{tmp_path}/store: can't be written (No space left on device). {do}"
    assert list(tmp_path.iterdir()) == []


def test_the_lock_is_free_after_a_preparation(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "store") as folder:
        lock = os.open(folder / "lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(lock)
    assert os.listdir(tmp_path / "store") == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"tokenizer": None},
            "tokenizer: exactly one way to get one is expected. Give either --tokenizer FILE or "
            "--train-tokenizer VOCAB.",
        ),
        (
            {"tokenizer": None, "train_tokenizer": 300, "eos_token": "</s>", "heldout_fraction": 1.0, "workers": -1},
            "--eos-token = '</s>': goes with --tokenizer only (a trained tokenizer's is </s>).\n"
            "--heldout-fraction = 1.0: must be at least 0 and below 1.\n"
            "--workers = -1: must not be negative.",
        ),
    ],
)
def test_impossible_options_are_refused(
    tmp_path: Path, tokenizer_file: Path, changes: dict[str, Any], expected: str
) -> None:
    given = {"sources": ("python-stdlib",), "out": tmp_path / "store", "tokenizer": tokenizer_file}
    with pytest.raises(ConfigError) as caught:
        prepare(PrepareOptions(**(given | changes)))
    assert str(caught.value) == expected
    assert list(tmp_path.iterdir()) == []


def test_a_vocabulary_larger_than_the_type_is_refused(tmp_path: Path) -> None:
    words = {f"w{number}": number for number in range(70_000)} | {"<eos>": 70_000, "[UNK]": 70_001}
    made = tokenizers.Tokenizer(models.WordLevel(words, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("w1 w69999 w2")
    options = {"sources": (str(tmp_path / "a.txt"),), "tokenizer": tmp_path / "tokenizer.json"}
    with pytest.raises(DataError) as caught:
        prepare(PrepareOptions(**options, out=tmp_path / "narrow", dtype="uint16"))
    what = "must hold the 70002 tokens of tokenizer.json (it holds 65536)"
    assert str(caught.value) == f"dtype = 'uint16': {what}. Use uint32."
    prepared = prepare(PrepareOptions(**options, out=tmp_path / "wide"))
    split = TokenStore.open(prepared.path).split("train")
    assert split.read(0, 4).tolist() == [1, 69999, 2, 70000]
    assert prepared.manifest.preparation["inexact_documents"] == 1  # this tokenizer drops the spaces


def test_documents_begin_with_a_token_only_when_asked(make_store: Make, texts: list[str]) -> None:
    without = TokenStore.open(make_store(texts, name="without").path)
    asked = TokenStore.open(make_store(texts, name="with", bos=True).path)
    assert without.tokenizer.bos_id is None and asked.tokenizer.bos_id == 1
    assert asked.split("train").num_tokens - without.split("train").num_tokens == without.split("train").num_documents
    assert asked.split("train").read(0, 1).tolist() == [1]


def test_a_store_is_made_from_a_config_once(tmp_path: Path, texts: list[str]) -> None:
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    config = StoreConfig(path=str(tmp_path / "store"), sources=(str(tmp_path / "texts"),), train_tokenizer=300)
    seen: list[Progress] = []
    path = prepare_from_config(config, seen.append)
    assert {progress.stage for progress in seen} == {"training the tokenizer", "tokenizing"}
    assert seen[-1].done_bytes == seen[-1].total_bytes > 0
    assert seen[-1].documents == len(texts)
    before = (path / "manifest.json").stat().st_mtime_ns
    assert prepare_from_config(config) == path
    assert (path / "manifest.json").stat().st_mtime_ns == before


def test_a_config_without_sources_names_the_missing_store(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        prepare_from_config(StoreConfig(path=str(tmp_path / "none")))
    assert str(caught.value) == f"{tmp_path}/none: no such token store. Make it with tools/prepare.py."
