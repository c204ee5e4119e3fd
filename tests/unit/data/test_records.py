"""Documents out of every format, and bad records by name."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from configs.errors import DataError
from engine.data import records
from engine.data.records import BadRecord, read_records, to_text
from engine.data.sources import SourceFile, find_files


def read(path: Path, field: str = "text") -> list[str | BadRecord]:
    file = find_files([str(path)]).files[0]
    found = list(read_records(file, field))
    assert sum(record.disk_bytes for record in found) <= file.size_bytes
    return [text for record in found if (text := to_text(record, field)) is not None]


def lines_of(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


TEXTS = ["one", "two\nlines", "dr\u00e9i \U0001f642", "x" * 5000]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_a_text_file_is_one_document_without_its_byte_order_mark(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbfh\xc3\xa9llo\r\n\tx\n")) == ["h\u00e9llo\r\n\tx\n"]


def test_jsonl_plain_and_packed(tmp_path: Path) -> None:
    data = lines_of(TEXTS)
    frames = zstandard.ZstdCompressor().compress(data[:40]) + zstandard.ZstdCompressor().compress(data[40:])
    assert read(write(tmp_path / "a.jsonl", data)) == TEXTS
    assert read(write(tmp_path / "b.jsonl", data.replace(b"\n", b"\r\n\n").rstrip())) == TEXTS
    assert read(write(tmp_path / "a.jsonl.gz", gzip.compress(data))) == TEXTS
    assert read(write(tmp_path / "a.jsonl.zst", frames)) == TEXTS


@pytest.mark.parametrize("dictionary", [False, True])
def test_parquet(tmp_path: Path, dictionary: bool) -> None:
    column = pa.array(TEXTS)
    table = pa.table({"id": range(4), "text": column.dictionary_encode() if dictionary else column})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    assert read(tmp_path / "a.parquet") == TEXTS


def test_bad_lines_are_named_by_kind_and_line(tmp_path: Path) -> None:
    lines = [
        b'{"text": "fine"}',
        b'{"text": "cut',
        b'{"body": "x", "id": 1}',
        b'["text"]',
        b'{"text": 7}',
        b'{"text": "\xff"}',
        b'{"text": " \\n"}',
        b'{"text": "\\ud800"}',
        b"",
        b'{"text": "fine"}',
    ]
    path = write(tmp_path / "a.jsonl", b"\n".join(lines))
    found = read(path)
    assert [found[0], found[-1]] == ["fine", "fine"]
    assert [(bad.kind, str(bad)) for bad in found[1:-1] if isinstance(bad, BadRecord)] == [
        ("broken_json", f"{path}:2: not JSON (Unterminated string starting at: line 1 column 10 (char 9))"),
        ("missing_field", f"{path}:3: field 'text' is missing (fields: 'body', 'id')"),
        ("missing_field", f"{path}:4: not an object with 'text'"),
        ("not_text", f"{path}:5: field 'text' is not a string but 7"),
        ("not_utf8", f"{path}:6: byte 0xff is not UTF-8"),
        ("empty", f"{path}:7: no text"),
        ("not_utf8", f"{path}:8: field 'text' holds half of a surrogate pair"),
    ]


def test_json_nested_too_deeply_is_a_bad_record(tmp_path: Path) -> None:
    found = read(write(tmp_path / "a.jsonl", b"[" * 100_000))
    assert [bad.kind for bad in found if isinstance(bad, BadRecord)] == ["broken_json"]


def test_bad_text_files_are_named_by_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"one\ntwo\nthr\xe9e\n")
    assert read(path) == [BadRecord("not_utf8", f"{path}:3", "byte 0xe9 is not UTF-8")]
    path = write(tmp_path / "b.txt", b"")
    assert read(path) == [BadRecord("empty", f"{path}:1", "no text")]


def test_a_null_in_parquet_is_named_by_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", None]}), path)
    assert read(path) == ["a", BadRecord("not_text", f"{path}:2", "'text' is null")]


def test_files_that_nobody_chose_are_passed_over_when_they_are_no_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.py", b"\xff")
    (record,) = read_records(SourceFile(path, "text", 1, lenient=True), "text")
    assert to_text(record, "text") is None


def test_a_long_text_file_is_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_TEXT_BYTES", 16)
    assert read(write(tmp_path / "a.txt", b"0123456789\nabcdefghi\nxyz")) == ["0123456789\n", "abcdefghi\nxyz"]


def test_a_long_line_is_cut_between_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_TEXT_BYTES", 5)
    text = "\u00e9\u4f60\U0001f642" * 4
    pieces = read(write(tmp_path / "a.txt", text.encode()))
    assert "".join(str(piece) for piece in pieces) == text


def test_a_line_that_is_too_long_is_a_bad_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 1 << 20)
    path = write(tmp_path / "a.jsonl", lines_of(["a", "b" * (3 << 20), "c"]))
    assert read(path) == ["a", BadRecord("too_long", f"{path}:2", "longer than 1 MiB"), "c"]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("keep", [0.5, 0.98])
def test_a_truncated_packed_file_is_refused(tmp_path: Path, suffix: str, keep: float) -> None:
    data = lines_of([str(number**7) for number in range(3000)])
    packed = gzip.compress(data) if suffix == "gz" else zstandard.ZstdCompressor().compress(data)
    path = write(tmp_path / f"a.jsonl.{suffix}", packed[: int(len(packed) * keep)])
    with pytest.raises(DataError) as caught:
        read(path)
    whys = {
        "gz": "Compressed file ended before the end-of-stream marker was reached",
        "zst": "it ends in the middle of a compressed frame",
    }
    do = "It is truncated or altered: fetch or write it again."
    assert str(caught.value) == f"{path}: can't be unpacked ({whys[suffix]}). {do}"


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_what_isnt_packed_at_all_is_refused(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(DataError, match=r"can't be unpacked \(.+\)\. It is truncated or altered"):
        read(write(tmp_path / f"a.jsonl.{suffix}", b'{"text": "a"}\n'))


def test_parquet_without_the_column(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"texts": ["a"], "id": [1]}), path)
    with pytest.raises(DataError) as caught:
        read(path)
    columns = "columns: 'texts', 'id'"
    assert str(caught.value) == f"{path}: has no column 'text' ({columns}). Did you mean --text-field texts?"
    with pytest.raises(DataError) as caught:
        read(path, "id")
    assert str(caught.value) == f"{path}: column 'id' must hold strings, not int64."


def test_parquet_with_the_column_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value) == f"{path}: has 2 columns 'text'. Rename or remove all but one."


def test_what_isnt_parquet_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", b"PAR1 no, it is not")
    with pytest.raises(DataError, match=r"a\.parquet: can't be read as parquet \(.+\)\."):
        read(path)
