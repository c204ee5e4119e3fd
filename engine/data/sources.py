"""Which files a corpus consists of, in an order that is the same on every machine.

A source is a file, a folder (searched recursively), or the word `python-stdlib` or `python-stdlib-docs`. Records come
from .jsonl, .jsonl.gz, .jsonl.zst and .parquet; any other file with a text suffix is one document. What a folder holds
besides is left out and counted by suffix, so that nothing vanishes silently. Nothing is read here but names and sizes.
"""

import difflib
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.errors import DataError, problem

STDLIB = "python-stdlib"
STDLIB_DOCS = "python-stdlib-docs"
"""Questions and answers: what a function of the standard library does, and its documentation's first line."""
RECORD_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
TEXT_SUFFIXES = frozenset(
    (
        ".txt", ".text", ".log", ".md", ".markdown", ".rst", ".org", ".tex", ".html", ".htm", ".xml", ".srt", ".vtt",
        ".toml", ".yaml", ".yml", ".ini", ".cfg", ".cmake", ".css", ".scss", ".sql", ".proto",
        ".py", ".pyi", ".pyx", ".r", ".jl", ".rb", ".php", ".pl", ".lua", ".sh", ".bash", ".zsh", ".m",
        ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".cuh", ".java", ".kt", ".scala", ".go", ".rs", ".swift",
        ".js", ".jsx", ".mjs", ".ts", ".tsx", ".cs", ".vb", ".fs", ".hs", ".ml", ".clj", ".ex", ".erl", ".el", ".lisp",
        ".scm", ".f90", ".f", ".asm", ".s", ".v", ".sv", ".vhd",
    )
)  # fmt: skip
_SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules", "site-packages"})
_STDLIB_SKIPPED = _SKIPPED_FOLDERS | {"test", "tests", "idle_test", "dist-packages", "lib-dynload"}

Kind = Literal["text", "jsonl", "parquet", "docstrings"]
Format = Literal["text", "completion", "instruction", "messages"]
FORMATS = ("text", "completion", "instruction", "messages")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of the corpus."""

    path: Path
    kind: Kind
    size_bytes: int
    """On the disk, so compressed where the file is."""
    lenient: bool = False
    """The user didn't choose this file (python-stdlib): what isn't text is passed over and not called a bad record."""
    format: Format = "text"
    """What its records hold: a text, or an example of one of the formats of examples.py."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """All files in the order in which they are read."""

    files: tuple[SourceFile, ...]
    left_out: dict[str, int]
    """Files in folders that are no text by their suffix: suffix -> count."""

    @property
    def size_bytes(self) -> int:
        """Bytes on the disk."""
        return sum(file.size_bytes for file in self.files)


def find_files(sources: Sequence[str]) -> Corpus:
    """List the files of all sources; a file that is reached twice counts once.

    Raises DataError for a path that doesn't exist, a named file of an unsupported kind, and sources without any file.
    """
    if not sources:
        raise DataError(problem("sources", "", "at least one file or folder is expected"))
    left_out: Counter[str] = Counter()
    found: dict[str, SourceFile] = {}
    for source in sources:
        for file in _expand(source, left_out):
            found.setdefault(os.path.realpath(file.path), file)
    if not found:
        names = ", ".join(map(repr, sources))
        others = f"only other files ({listed_suffixes(left_out)})" if left_out else "no file at all"
        raise DataError(problem(names, "", f"has no text: {others}", do=f"Supported: {supported()}."))
    return Corpus(tuple(found.values()), dict(sorted(left_out.items())))


def supported() -> str:
    """Name the supported suffixes, for messages."""
    few = ("txt", "md", "py", "html", "c", "js")
    return f"{', '.join(RECORD_SUFFIXES)}, and text such as {', '.join('.' + name for name in few)}"


def listed_suffixes(counts: dict[str, int], most: int = 6) -> str:
    """Name suffixes with their counts, the most frequent first."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    text = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in ranked[:most])
    return text + (", .." if len(ranked) > most else "")


def kind_of(path: Path) -> Kind | None:
    """Tell by its name how a file is read; None for what isn't text."""
    name = path.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        return "jsonl"
    if name.endswith(".parquet"):
        return "parquet"
    return "text" if path.suffix.lower() in TEXT_SUFFIXES else None


def _expand(source: str, left_out: Counter[str]) -> Iterator[SourceFile]:
    path = Path(source)
    if source == STDLIB:
        yield from stdlib_files(source)
    elif source == STDLIB_DOCS:
        size = sum(file.size_bytes for file in stdlib_files(source))
        yield SourceFile(_stdlib_root(source), "docstrings", size, lenient=True, format="completion")
    elif path.is_dir():
        for file in _walk(path, _SKIPPED_FOLDERS):
            kind = kind_of(file)
            if kind is None:
                left_out[file.suffix.lower()] += 1
            else:
                yield SourceFile(file, kind, file.stat().st_size)
    elif path.is_file():
        kind = kind_of(path)
        if kind is None:
            raise DataError(problem(source, "", "is of no supported kind", f"supported: {supported()}", _advice(path)))
        yield SourceFile(path, kind, path.stat().st_size)
    elif path.exists():
        raise DataError(problem(source, "", "is neither a file nor a folder"))
    else:
        raise DataError(problem(source, "", "no such file or folder", do=_nearest(source)))


def _stdlib_root(source: str) -> Path:
    root = Path(sysconfig.get_path("stdlib"))
    if not root.is_dir():
        raise DataError(problem(source, "", f"{sys.executable} has no standard library at {root}"))
    return root


def stdlib_files(source: str = STDLIB) -> Iterator[SourceFile]:
    """List Python's own modules without their tests: about 12 MB of real text that every machine has."""
    for file in _walk(_stdlib_root(source), _STDLIB_SKIPPED):
        if file.suffix == ".py":
            yield SourceFile(file, "text", file.stat().st_size, lenient=True)


def _walk(root: Path, skipped: frozenset[str]) -> Iterator[Path]:
    """Yield plain files below a folder, sorted by the bytes of their relative paths; hidden ones are passed over."""
    found: list[tuple[bytes, Path]] = []

    def refuse(error: OSError) -> None:
        raise DataError(problem(str(error.filename), "", f"can't be read: {error.strerror}")) from None

    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                found.append((os.fsencode(path.relative_to(root).as_posix()), path))
    for _, path in sorted(found):
        yield path


def _nearest(source: str) -> str:
    path = Path(source)
    folder = path.parent
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    if close:
        return f"Did you mean {str(folder / close[0])!r}?"
    close = difflib.get_close_matches(source, [STDLIB, STDLIB_DOCS], n=1)
    return f"Did you mean {close[0]!r}?" if close else "Give files or folders that are there."


def _advice(path: Path) -> str:
    name = path.name.lower()
    if name.endswith(".json"):
        return "Write one object a line and call it .jsonl."
    if name.endswith((".gz", ".zst")):
        return "Unpack it first."
    if name.endswith((".csv", ".tsv", ".arrow", ".feather")):
        return "Convert it to .parquet or .jsonl."
    return "Rename it to .txt if it is text."
