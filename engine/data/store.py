"""A token store: a folder of token ids, document bounds and a manifest that says what must be there.

    manifest.json          counts, hashes, tokenizer, what was read and what was left out
    tokenizer/             the tokenizer itself
    token_bytes.bin        uint16 (vocab): UTF-8 bytes that each token stands for
    train/, heldout/       one folder a split:
      tokens-00000.bin     uint16 or uint32 token ids, every document followed by the end-of-text token; all shards but
                           the last hold `shard_tokens`, so a token is found by division
      offsets.bin          uint64 (documents + 1): first token of each document, and the end
      bytes.bin            uint32 (documents): UTF-8 bytes of each document
      answers.bin          uint8 (tokens): 1 where the token is an answer's; in stores of examples only

All numbers are little-endian. Opening compares every size with the manifest; `verify="full"` hashes every byte, as
engine/proof.py does for a run, on all ranks together. Bounds of documents are mapped, tokens are read by position.
Written by prepare.py.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from configs.errors import DataError, problem
from engine.data.number_file import RESTORE, NumberFile
from engine.files import READ_BYTES, FileEntry, hash_file

FORMAT = "ropewalk-token-store"
VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
TOKEN_BYTES = "token_bytes.bin"
OFFSETS = "offsets.bin"
DOCUMENT_BYTES = "bytes.bin"
ANSWERS = "answers.bin"
SPLITS = ("train", "heldout")
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

SplitName = Literal["train", "heldout"]


@dataclass(frozen=True, slots=True)
class SplitEntry:
    """What the manifest says of one split."""

    documents: int
    tokens: int
    bytes: int
    files: dict[str, FileEntry]


@dataclass(frozen=True, slots=True)
class TokenizerEntry:
    """Which tokenizer the store was made with."""

    kind: str
    sha256: str
    vocab_size: int
    eos_id: int
    bos_id: int | None
    """None where documents don't begin with a token of their own, which is the default."""
    prefix_bytes: int
    """Bytes that the tokenizer itself puts before each document."""
    files: dict[str, FileEntry]


@dataclass(frozen=True, slots=True)
class StoreManifest:
    """A token store, without its bytes."""

    dtype: str
    shard_tokens: int
    tokenizer: TokenizerEntry
    splits: dict[str, SplitEntry]
    preparation: dict[str, Any]
    """How it was made: sources, options, bad records. Not part of the fingerprint."""

    @property
    def fingerprint(self) -> str:
        """Hash what training can see: two stores of one fingerprint hold the same tokens of the same tokenizer."""
        tokenizer = {name: getattr(self.tokenizer, name) for name in _IDENTITY}
        splits = {
            name: {"documents": split.documents, "files": {file: e.sha256 for file, e in split.files.items()}}
            for name, split in self.splits.items()
        }
        content = {"version": VERSION, "dtype": self.dtype, "shard_tokens": self.shard_tokens}
        text = json.dumps(content | {"tokenizer": tokenizer, "splits": splits}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_text(self) -> str:
        """Return the manifest as JSON text."""
        head = {"format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint}
        return json.dumps(head | _as_dict(self), indent=1, ensure_ascii=True) + "\n"


_IDENTITY = ("kind", "sha256", "vocab_size", "eos_id", "bos_id", "prefix_bytes")


class Split:
    """The documents of one side of a store."""

    def __init__(self, folder: Path, entry: SplitEntry, dtype: str, shard_tokens: int, vocab_size: int) -> None:
        """Open the files; their sizes must have been checked."""
        self.folder, self._vocab_size = folder, vocab_size
        self.num_documents, self.num_tokens, self.num_bytes = entry.documents, entry.tokens, entry.bytes
        self.offsets: npt.NDArray[np.uint64] = _map(folder / OFFSETS, np.dtype("<u8"), entry.documents + 1)
        self.document_bytes: npt.NDArray[np.uint32] = _map(folder / DOCUMENT_BYTES, np.dtype("<u4"), entry.documents)
        marked = ANSWERS in entry.files
        self._answers = NumberFile(folder / ANSWERS, np.dtype("u1"), entry.tokens) if marked else None
        self._shard_tokens, self._dtype = shard_tokens, DTYPES[dtype]
        self._shards = [
            NumberFile(folder / shard_name(index), self._dtype, min(shard_tokens, entry.tokens - index * shard_tokens))
            for index in range(num_shards(entry.tokens, shard_tokens))
        ]
        if int(self.offsets[0]) != 0 or int(self.offsets[-1]) != entry.tokens:
            what = f"must be bounds from 0 to {entry.tokens}"
            raise DataError(problem(str(folder / OFFSETS), "", what, "the file was altered", RESTORE))

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Copy tokens start..stop-1 of the split (tokens), in the store's own type.

        Raises DataError for a file that was cut since it was opened, and for a token that the tokenizer doesn't have,
        which would end in an index error of the embedding.
        """
        assert 0 <= start <= stop <= self.num_tokens, f"tokens {start}..{stop} of {self.num_tokens}"
        size, out, filled = self._shard_tokens, np.empty(stop - start, dtype=self._dtype), 0
        while start < stop:
            index, begin = divmod(start, size)
            shard, piece = self._shards[index], out[filled : filled + min(stop - start, size - begin)]
            shard.read(begin, piece)
            if int(piece.max()) >= self._vocab_size:
                wrong = int(np.argmax(piece >= self._vocab_size))
                what = f"must be below {self._vocab_size}, the tokens of the tokenizer"
                at = f"{shard.path}: token {begin + wrong}"
                raise DataError(problem(at, int(piece[wrong]), what, "the file was altered", RESTORE))
            start, filled = start + len(piece), filled + len(piece)
        return out

    def rot(self) -> None:
        """Make all tokens such as no tokenizer has, for this process only: a corrupt store, for fault.inject."""
        for shard in self._shards:
            shard.rot()

    def check_bounds(self) -> None:
        """Raise DataError unless documents follow each other; reads all of their bounds."""
        if bool((self.offsets[1:] < self.offsets[:-1]).any()):
            raise DataError(problem(str(self.folder / OFFSETS), "", "must rise", "the file was altered", RESTORE))

    @property
    def has_targets(self) -> bool:
        """Say whether any token is marked as an answer's."""
        pieces = range(0, self.num_tokens if self._answers is not None else 0, READ_BYTES)
        return any(self.read_answers(at, min(at + READ_BYTES, self.num_tokens)).any() for at in pieces)

    def read_answers(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Copy which of tokens start..stop-1 are an answer's (tokens); the store must have marks."""
        assert self._answers is not None, "a store without marks"
        assert 0 <= start <= stop <= self.num_tokens, f"tokens {start}..{stop} of {self.num_tokens}"
        marks = np.empty(stop - start, dtype="u1")
        self._answers.read(start, marks)
        return marks != 0


class TokenStore:
    """An opened token store."""

    def __init__(self, path: Path, manifest: StoreManifest) -> None:
        """Use `open`, which checks the files first."""
        self.path, self.manifest = path, manifest
        self.tokenizer = manifest.tokenizer
        self.tokenizer_folder = path / TOKENIZER
        self.fingerprint = manifest.fingerprint
        self._splits = {
            name: Split(path / name, entry, manifest.dtype, manifest.shard_tokens, manifest.tokenizer.vocab_size)
            for name, entry in manifest.splits.items()
        }

    @classmethod
    def open(cls, path: Path | str, verify: Literal["size", "full"] = "size") -> "TokenStore":
        """Open a store; raises DataError unless every file is there as the manifest says (`full`: bit for bit)."""
        path = Path(path)
        manifest = read_manifest(path)
        problems = check_files(path, manifest, verify)
        if problems:
            do = "Remove the folder and prepare it again."
            raise DataError(problem(str(path), "", "; ".join(problems), "the store is damaged", do))
        return cls(path, manifest)

    def split(self, name: SplitName) -> Split:
        """Return the train or the held-out documents."""
        return self._splits[name]

    @property
    def has_answers(self) -> bool:
        """Say whether it is a store of examples, whose answers are marked."""
        return ANSWERS in self.manifest.splits["train"].files

    def token_bytes(self) -> npt.NDArray[np.uint16]:
        """Read the UTF-8 bytes of each token (vocab)."""
        return np.fromfile(self.path / TOKEN_BYTES, dtype="<u2")


def shard_name(index: int) -> str:
    """Return the file name of a shard."""
    return f"tokens-{index:05d}.bin"


def num_shards(tokens: int, shard_tokens: int) -> int:
    """Return how many files hold so many tokens."""
    return -(-tokens // shard_tokens)


def read_manifest(path: Path) -> StoreManifest:
    """Read and judge a store's manifest; raises DataError when it isn't one, or contradicts itself."""
    where = path / MANIFEST
    try:
        text = where.read_bytes().decode()
    except (FileNotFoundError, NotADirectoryError):
        do = "Make one with tools/prepare.py."
        what = "is not a token store" if path.exists() else "no such token store"
        raise DataError(problem(str(path), "", what, f"{MANIFEST} is missing" if path.exists() else "", do)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(problem(str(where), "", "can't be read", str(error), "Prepare the store again.")) from None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(problem(str(where), "", "is not JSON", str(error), "Prepare the store again.")) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(
            problem(str(where), "", "is not the manifest of a token store", do="Make one with tools/prepare.py.")
        )
    if content.get("version") != VERSION:
        do = "Prepare the store again."
        raise DataError(problem(f"{where}: version", content.get("version"), f"this Ropewalk reads {VERSION}", do=do))
    try:
        manifest = _build(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise DataError(problem(str(where), "", "was altered", why, "Prepare the store again.")) from None
    _check_vocab(where, manifest)
    return manifest


def check_files(path: Path, manifest: StoreManifest, verify: Literal["size", "full"]) -> list[str]:
    """Return what is wrong with the files of a store."""
    problems = []
    for name, entry in all_files(manifest).items():
        file = path / name
        try:
            size = file.stat().st_size
            if not file.resolve().is_relative_to(path.resolve()):
                problems.append(f"{name} leads out of the store")
            elif size != entry.size:
                problems.append(f"{name} has {size} bytes, the manifest says {entry.size}")
            elif verify == "full" and hash_file(file) != entry.sha256:
                problems.append(f"{name} was altered: another sha256 than the manifest says")
        except OSError as error:
            problems.append(f"{name}: {error.strerror}")
    return problems


def all_files(manifest: StoreManifest) -> dict[str, FileEntry]:
    """Return every file by its path within the store."""
    files = dict(manifest.tokenizer.files)
    for name, split in manifest.splits.items():
        files |= {f"{name}/{file}": entry for file, entry in split.files.items()}
    return files


def smallest_dtype(vocab_size: int) -> str:
    """Return the narrowest type that holds every token."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def _check_vocab(where: Path, manifest: StoreManifest) -> None:
    most = 1 << 8 * DTYPES[manifest.dtype].itemsize
    if manifest.tokenizer.vocab_size > most:
        what = f"a store of {manifest.dtype} holds {most} tokens at most"
        raise DataError(problem(f"{where}: vocab_size", manifest.tokenizer.vocab_size, what))


def _build(content: dict[str, Any]) -> StoreManifest:
    """The typed manifest; ValueError when its numbers don't agree with each other or with its fingerprint."""
    tokenizer = TokenizerEntry(**{**content["tokenizer"], "files": _entries(content["tokenizer"]["files"])})
    splits = {name: SplitEntry(**{**content["splits"][name], "files": _entries(content["splits"][name]["files"])})
              for name in SPLITS}  # fmt: skip
    manifest = StoreManifest(content["dtype"], content["shard_tokens"], tokenizer, splits, content["preparation"])
    item = DTYPES[manifest.dtype].itemsize
    _check_numbers(manifest)
    if TOKEN_BYTES not in tokenizer.files or tokenizer.files[TOKEN_BYTES].size != 2 * tokenizer.vocab_size:
        raise ValueError(f"{TOKEN_BYTES} is not of {tokenizer.vocab_size} tokens")
    for name, split in splits.items():
        sizes = {OFFSETS: 8 * (split.documents + 1), DOCUMENT_BYTES: 4 * split.documents}
        for index in range(num_shards(split.tokens, manifest.shard_tokens)):
            tokens = min(manifest.shard_tokens, split.tokens - index * manifest.shard_tokens)
            sizes[shard_name(index)] = item * tokens
        if ANSWERS in splits["train"].files:
            sizes[ANSWERS] = split.tokens
        if sizes != {file: entry.size for file, entry in split.files.items()}:
            raise ValueError(f"files of {name} and its counts disagree")
    if manifest.fingerprint != content["fingerprint"]:
        raise ValueError("another fingerprint than its content has")
    return manifest


def _check_numbers(manifest: StoreManifest) -> None:
    """ValueError for what no store can hold; whoever counts by these numbers may then trust them."""
    tokenizer, counts = manifest.tokenizer, {"shard_tokens": manifest.shard_tokens - 1}
    ids = {"eos_id": tokenizer.eos_id, "bos_id": 0 if tokenizer.bos_id is None else tokenizer.bos_id}
    for name, split in manifest.splits.items():
        counts |= {f"{name}: {key}": getattr(split, key) for key in ("documents", "tokens", "bytes")}
        if manifest.shard_tokens < 1 or num_shards(split.tokens, manifest.shard_tokens) > len(split.files):
            raise ValueError(f"{name}: {split.tokens} tokens are more than its files hold")
    counts |= ids | {"prefix_bytes": tokenizer.prefix_bytes, "vocab_size": tokenizer.vocab_size - 1}
    counts |= {file: entry.size for file, entry in all_files(manifest).items()}
    wrong = [name for name, count in counts.items() if type(count) is not int or not 0 <= count < 1 << 62]
    wrong += [name for name, token in ids.items() if token not in range(tokenizer.vocab_size)]
    wrong += [file for file, entry in all_files(manifest).items() if not re.fullmatch(r"[0-9a-f]{64}", entry.sha256)]
    if wrong:
        raise ValueError(f"{wrong[0]} is out of range")


def _entries(files: dict[str, Any]) -> dict[str, FileEntry]:
    return {name: FileEntry(**entry) for name, entry in files.items()}


def _as_dict(manifest: StoreManifest) -> dict[str, Any]:
    def entries(files: dict[str, FileEntry]) -> dict[str, Any]:
        return {name: {"size": entry.size, "sha256": entry.sha256} for name, entry in files.items()}

    tokenizer = {name: getattr(manifest.tokenizer, name) for name in _IDENTITY}
    splits = {
        name: {"documents": s.documents, "tokens": s.tokens, "bytes": s.bytes, "files": entries(s.files)}
        for name, s in manifest.splits.items()
    }
    return {
        "dtype": manifest.dtype,
        "shard_tokens": manifest.shard_tokens,
        "tokenizer": tokenizer | {"files": entries(manifest.tokenizer.files)},
        "splits": splits,
        "preparation": manifest.preparation,
    }


def _map(path: Path, dtype: np.dtype[Any], length: int) -> npt.NDArray[Any]:
    """Map a file for reading; an empty file can't be mapped."""
    if length == 0:
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=(length,))
