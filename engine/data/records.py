"""Files -> raw records -> text or fields, without ever holding a file whole.

`read_records` runs in the one process that reads: it splits files into raw bytes, each with its place. `to_text` runs
in the workers: it decodes, parses and judges; `to_fields` gives all that a record holds, for examples.py to judge. A
record that holds nothing usable is a BadRecord, with a kind to count and a place to look at; a file that can't be read
as what it claims to be is a DataError.
"""

import difflib
import gzip
import io
import json
import zlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, cast

import zstandard

from configs.errors import DataError, problem
from engine.data.docstrings import read_docstrings
from engine.data.sources import SourceFile, stdlib_files

MAX_TEXT_BYTES = 8 << 20
"""A text file longer than this is read as several documents, cut at line ends: a tokenizer's memory is many times the
document's."""
MAX_RECORD_BYTES = 64 << 20
"""A longer line or value is a bad record."""
_READ_BYTES = 1 << 18
_BOM = b"\xef\xbb\xbf"

BadKind = Literal[
    "broken_json", "missing_field", "not_text", "not_utf8", "empty", "too_long",
    "no_target", "unmarked", "no_end", "template", "over_seq_len",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record without usable text, or an example that can't be trained on."""

    kind: BadKind
    where: str
    """file:line, or file:row of a parquet file."""
    what: str

    def __str__(self) -> str:
        """Return `file:line: what is wrong`."""
        return f"{self.where}: {self.what}"


class RawRecord(NamedTuple):
    """One record as it stands in its file; `data` is None for a null or for one that is too long to be read."""

    file: SourceFile
    line: int
    data: bytes | None
    disk_bytes: int
    """Bytes of the file on the disk that were read for it; they add up to the file's size."""
    fault: BadRecord | None = None
    """What is wrong with it, where reading it has shown that already."""


def read_records(file: SourceFile, text_field: str, columns: Sequence[str] = ()) -> Generator[RawRecord, None, None]:
    """Yield the records of a file; raises DataError when it can't be read to its end.

    Of a parquet file the text column is read, or, where it holds examples, those of `columns` that it has: as JSON.
    """
    try:
        if file.kind == "parquet" and file.format != "text":
            yield from _read_rows(file, columns)
        elif file.kind == "parquet":
            yield from _read_parquet(file, text_field)
        elif file.kind == "docstrings":
            for source, line, data in read_docstrings(stdlib_files(), file.path):
                yield RawRecord(replace(source, format=file.format), line, data, 0)
        elif file.kind == "jsonl":
            yield from _read_lines(file)
        else:
            yield from _read_text(file)
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        why = str(error) or "it ends too early"
        do = "It is truncated or altered: fetch or write it again."
        raise DataError(problem(str(file.path), "", "can't be unpacked", why, do)) from None
    except OSError as error:
        raise DataError(problem(str(file.path), "", f"can't be read: {error.strerror or error}")) from None


def to_text(record: RawRecord, text_field: str) -> str | BadRecord | None:
    """Return the text of a record, what is wrong with it, or None for what is no record at all (a blank line)."""
    found = _parse(record, text_field)
    return None if isinstance(found, BadRecord) and record.file.lenient else found


def to_fields(record: RawRecord) -> dict[str, Any] | BadRecord | None:
    """Return the fields of a record of examples, what is wrong with it, or None for what is no record at all."""
    text = _decode(record)
    found = text if not isinstance(text, str) else _load_fields(text, f"{record.file.path}:{record.line}")
    return None if isinstance(found, BadRecord) and record.file.lenient else found


def _parse(record: RawRecord, text_field: str) -> str | BadRecord | None:
    where = f"{record.file.path}:{record.line}"
    if record.data is None and record.file.kind == "parquet":
        return BadRecord("not_text", where, f"{text_field!r} is null")
    text = _decode(record)
    if isinstance(text, str) and record.file.kind == "jsonl":
        text = _field(text, text_field, where)
    if isinstance(text, str) and not text.strip():
        return BadRecord("empty", where, "no text")
    return text


def _decode(record: RawRecord) -> str | BadRecord | None:
    """The record as a string; None for a blank line between records."""
    file, line, data, _, fault = record
    if fault is not None:
        return fault
    if data is None or len(data) > MAX_RECORD_BYTES:
        return BadRecord("too_long", f"{file.path}:{line}", f"longer than {MAX_RECORD_BYTES >> 20} MiB")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start) if file.kind == "text" else 0
        return BadRecord("not_utf8", f"{file.path}:{line}", f"byte 0x{data[error.start]:02x} is not UTF-8")
    return None if file.kind == "jsonl" and not text.strip() else text


def _field(line: str, text_field: str, where: str) -> str | BadRecord:
    values = _load_fields(line, where, text_field)
    return values if isinstance(values, BadRecord) else text_of(values, text_field, where)


def _load_fields(line: str, where: str, wanted: str = "") -> dict[str, Any] | BadRecord:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadRecord("broken_json", where, f"not JSON ({error})")
    if not isinstance(values, dict):
        return BadRecord("missing_field", where, f"not an object with {wanted!r}" if wanted else "not an object")
    return values


def text_of(values: dict[str, Any], field: str, where: str) -> str | BadRecord:
    """Return the string that a field holds, or what is wrong with it."""
    if field not in values:
        names = ", ".join(map(repr, list(values)[:8])) or "none"
        return BadRecord("missing_field", where, f"field {field!r} is missing (fields: {names})")
    text = values[field]
    if not isinstance(text, str):
        return BadRecord("not_text", where, f"field {field!r} is not a string but {json.dumps(text)[:40]}")
    try:
        text.encode()
    except UnicodeEncodeError:
        return BadRecord("not_utf8", where, f"field {field!r} holds half of a surrogate pair")
    return text


def _read_text(file: SourceFile) -> Iterator[RawRecord]:
    with open(file.path, "rb") as stream:
        line, first = 1, True
        # An empty file is a record too: an empty one.
        while (piece := _read_piece(stream)) or first:
            text = piece.removeprefix(_BOM) if first else piece
            yield RawRecord(file, line, text, len(piece))
            line += piece.count(b"\n")
            first = False


def _read_piece(stream: IO[bytes]) -> bytes:
    """At most MAX_TEXT_BYTES, cut behind the last line end, or else before the last character begun."""
    piece = stream.read(MAX_TEXT_BYTES)
    if len(piece) < MAX_TEXT_BYTES:
        return piece
    cut = piece.rfind(b"\n") + 1
    if not cut:
        cut = len(piece)
        while cut > len(piece) - 4 and piece[cut - 1] & 0xC0 == 0x80:
            cut -= 1
        cut -= piece[cut - 1] >= 0xC0
    stream.seek(cut - len(piece), io.SEEK_CUR)
    return piece[:cut]


def _read_lines(file: SourceFile) -> Iterator[RawRecord]:
    with open(file.path, "rb") as disk:
        stream = _unpacked(file.path, disk)
        line, before = 0, 0
        while data := stream.readline(MAX_RECORD_BYTES + 1):
            line += 1
            too_long = len(data) > MAX_RECORD_BYTES and not data.endswith(b"\n")
            if too_long:
                _skip_line(stream)
            now = disk.tell()
            text = data.removeprefix(_BOM) if line == 1 else data
            yield RawRecord(file, line, None if too_long else text.rstrip(b"\r\n"), now - before)
            before = now


def _skip_line(stream: IO[bytes]) -> None:
    while (rest := stream.readline(_READ_BYTES)) and not rest.endswith(b"\n"):
        pass


def _unpacked(path: Path, disk: IO[bytes]) -> IO[bytes]:
    name = path.name.lower()
    if name.endswith(".gz"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=disk))
    if name.endswith(".zst"):
        return io.BufferedReader(_ZstdFrames(disk), _READ_BYTES)
    return disk


class _ZstdFrames(io.RawIOBase):
    """The text of a .zst file of one or more frames.

    zstandard's own stream_reader takes a truncated frame for the end of the file; this one raises EOFError.
    """

    def __init__(self, disk: IO[bytes]) -> None:
        super().__init__()
        self._disk = disk
        self._frame: Any = None
        self._packed = b""
        self._text = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            packed = self._packed or self._disk.read(_READ_BYTES)
            if not packed:
                if self._frame is not None:
                    raise EOFError("it ends in the middle of a compressed frame")
                return 0
            if self._frame is None:
                # Files written with --long need windows of up to 2 GiB.
                self._frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            self._text = memoryview(self._frame.decompress(packed))
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._text))
        buffer[:size] = self._text[:size]
        self._text = self._text[size:]
        return size


def _read_parquet(file: SourceFile, text_field: str) -> Iterator[RawRecord]:
    import pyarrow as pa  # here, because the workers import this module and need no pyarrow
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file.path) as table:
            _check_column(file, table.schema_arrow, text_field)
            rows, row, reported = max(1, table.metadata.num_rows), 0, 0
            for batch in table.iter_batches(batch_size=256, columns=[text_field]):
                # As bytes: a value that isn't UTF-8 is a bad record, not the end of the file.
                column = batch.column(0)
                if pa.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                for value in column.cast(pa.large_binary()).to_pylist():
                    row += 1
                    now = file.size_bytes * row // rows
                    yield RawRecord(file, row, value, now - reported)
                    reported = now
    except pa.ArrowException as error:
        why = str(error).splitlines()[0]
        raise DataError(problem(str(file.path), "", "can't be read as parquet", why, "Write it again.")) from None


def _read_rows(file: SourceFile, columns: Sequence[str]) -> Iterator[RawRecord]:
    """Rows as JSON objects, as a line of .jsonl would hold them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file.path) as table:
            rows, row, reported = max(1, table.metadata.num_rows), 0, 0
            names = [name for name in table.schema_arrow.names if name in columns]
            _check_names(file, names)
            for batch in table.iter_batches(batch_size=256, columns=names):
                for values in batch.to_pylist():
                    row += 1
                    now = file.size_bytes * row // rows
                    found = _row_as_json(values, f"{file.path}:{row}")
                    data, fault = (None, found) if isinstance(found, BadRecord) else (found, None)
                    yield RawRecord(file, row, data, now - reported, fault)
                    reported = now
    except (pa.ArrowException, ValueError) as error:  # a ValueError: text that isn't UTF-8, one name twice in a struct
        why = str(error).splitlines()[0]
        raise DataError(problem(str(file.path), "", "can't be read as parquet", why, "Write it again.")) from None


def _row_as_json(values: dict[str, Any], where: str) -> bytes | BadRecord:
    """A row as a line of .jsonl; binary values are text, what JSON has no type for is refused."""
    fields = []
    for name, value in values.items():
        try:
            fields.append(f"{json.dumps(name)}: {json.dumps(value, default=_decoded)}")
        except UnicodeDecodeError as error:
            what = f"field {name!r} holds byte 0x{error.object[error.start]:02x}, which is not UTF-8"
            return BadRecord("not_utf8", where, what)
        except TypeError as error:
            return BadRecord("not_text", where, f"field {name!r} holds {error}")
    return f"{{{', '.join(fields)}}}".encode()


def _decoded(value: Any) -> str:
    """What stands in JSON for a value of a type that JSON doesn't know."""
    if isinstance(value, bytes):
        return value.decode()
    raise TypeError(f"a {type(value).__name__}, which JSON has no type for")


def _check_names(file: SourceFile, names: Sequence[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        do = "Rename or remove all but one."
        raise DataError(problem(str(file.path), "", f"has {names.count(twice)} columns {twice!r}", do=do))


def _check_column(file: SourceFile, schema: Any, text_field: str) -> None:
    import pyarrow as pa

    names = schema.names
    if text_field not in names:
        close = difflib.get_close_matches(text_field, names, n=1)
        do = f"Did you mean --text-field {close[0]}?" if close else "Name the column with --text-field."
        columns = f"columns: {', '.join(map(repr, names[:12]))}"
        raise DataError(problem(str(file.path), "", f"has no column {text_field!r}", columns, do))
    _check_names(file, [name for name in names if name == text_field])
    kind = schema.field(text_field).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    textual = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary,
               pa.types.is_large_binary)  # fmt: skip
    if not any(is_kind(kind) for is_kind in textual):
        raise DataError(problem(str(file.path), "", f"column {text_field!r} must hold strings, not {kind}"))
