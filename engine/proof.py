"""What a run reads is proved before its first step: token stores, and imported weights that bring hashes along.

Each file is hashed by one rank, about as many bytes on each, and all ranks agree on the verdict. What was proved is
remembered in the run folder by path, size, time and inode, round for round, so that a restart doesn't read terabytes
again. The files are taken to be the same on all nodes. It is a proof against accidents: who can write a store can write
its manifest.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from configs.errors import CheckpointError, ConfigError, DataError, problem
from configs.schema import Config
from engine.checkpoint.manifest import share_files
from engine.data.store import TokenStore, all_files
from engine.data.tokenizer import Tokenizer
from engine.fault.record import FaultLog
from engine.files import FileEntry, hash_file
from engine.ranks import Ranks
from models.checksums import read_checksums

SAID_FROM_BYTES = 1 << 30
"""What is read in a second or two is proved without a word."""
LISTED_PROBLEMS = 8
ROUND_BYTES = 1 << 36
"""Bytes of a rank between two words to the others: minutes on a slow disk."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """A file as it was when it was proved; another one of that name differs in one of these."""

    size: int
    mtime_ns: int
    inode: int
    sha256: str


def prove_inputs(
    config: Config,
    ranks: Ranks,
    stamp: Path,
    log: FaultLog,
    say: Callable[[str], None],
    *,
    resuming: bool,
    beat: Callable[[], object],
) -> None:
    """Prove every file of the token stores and of the folders that weights are read from; collective.

    A run that is `resuming` reads only the base of an adapter. `stamp` remembers what was proved, and `beat` is called
    whenever some of it is. Raises DataError on all ranks, naming each file that isn't what it was.
    """
    wanted = _files_of_stores(config) | _files_of_weights(config, resuming)
    known: dict[str, list[Any]] = ranks.lead(lambda: _not_proved_yet(wanted, stamp))
    files = {name: FileEntry(seen[0], seen[3]) for name, seen in known.items()}
    num_bytes = sum(entry.size for entry in files.values())
    if num_bytes >= SAID_FROM_BYTES:
        say(f"proving {num_bytes / 1e9:,.1f} GB of inputs by sha256; the next start will remember it")
    begin = time.monotonic()
    wrong: dict[str, str] = {}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing leaves the interpreter to others
        for some in _rounds(files, ROUND_BYTES * ranks.size):
            beat()
            mine = share_files(some, ranks.index, ranks.size)
            judged = dict(zip(mine, pool.map(lambda name: _judge(name, files[name]), mine), strict=True))
            found = ranks.exchange({name: text for name, text in judged.items() if text})
            for of_rank in found:
                wrong |= of_rank
            if ranks.index == 0 and not any(found):
                _remember(stamp, {name: _Seen(*known[name]) for name in some})
    if wrong:
        problems = sorted(wrong.values())
        if ranks.index == 0:
            log.own("corrupt_input", problems[0].rstrip("."), "the run didn't start", said=False, all=problems)
        raise DataError("\n".join(problems[:LISTED_PROBLEMS]))
    if num_bytes >= SAID_FROM_BYTES:
        say(f"proved at {num_bytes / 1e9 / max(time.monotonic() - begin, 1e-9):.2f} GB/s")


def prove_tokenizers(config: Config) -> None:
    """Refuse a store whose tokenizer was altered, or is not the one that the config names; rank 0 only.

    A tokenizer is small, and every checkpoint takes a copy of it along: it is hashed at every start.
    """
    for index, store in enumerate(config.data.stores):
        opened = TokenStore.open(store.path)
        for name, entry in opened.tokenizer.files.items():
            text = _judge(str(opened.path / name), entry)
            if text:
                raise DataError(text)
        trained, tokens = store.train_tokenizer, opened.tokenizer.vocab_size
        if trained and trained != tokens:
            expected = f"{store.path} has a tokenizer of {tokens} tokens already"
            do = f"Use {tokens}, another path, or remove the folder to prepare it again."
            raise ConfigError(problem(f"data.stores.{index}.train_tokenizer", trained, expected, "", do))
        named = Path(store.tokenizer)
        if store.tokenizer and named.exists() and Tokenizer(named).sha256 != opened.tokenizer.sha256:
            expected = f"{store.path} was made with another tokenizer"
            do = f"Remove the setting, or the folder {store.path} to prepare it again."
            raise ConfigError(problem(f"data.stores.{index}.tokenizer", store.tokenizer, expected, "", do))


def check_weights(folder: Path) -> None:
    """Prove the weights of an imported folder that brings hashes along, in this process alone."""
    for name, entry in _listed(folder).items():
        text = _judge(name, entry)
        if text:
            raise CheckpointError(text)


def _files_of_stores(config: Config) -> dict[str, FileEntry]:
    if config.data.verify == "sizes":
        return {}
    found: dict[str, FileEntry] = {}
    for store in config.data.stores:
        opened = TokenStore.open(store.path)
        found |= {str(opened.path / name): entry for name, entry in all_files(opened.manifest).items()}
    return found


def _files_of_weights(config: Config, resuming: bool) -> dict[str, FileEntry]:
    found: dict[str, FileEntry] = {}
    base = config.model.init_from if config.adapter.kind != "none" or not resuming else ""
    for folder in filter(None, (base, "" if resuming else config.adapter.init_from)):
        found |= _listed(Path(folder))
    return found


def _listed(folder: Path) -> dict[str, FileEntry]:
    return {str(folder / name): FileEntry(size, sha256) for name, (size, sha256) in read_checksums(folder).items()}


def _not_proved_yet(wanted: Mapping[str, FileEntry], stamp: Path) -> dict[str, list[Any]]:
    """The files that the stamp doesn't vouch for, as they are now but for the hash, which is the one they must have."""
    remembered = _read(stamp)
    found: dict[str, list[Any]] = {}
    for name, entry in wanted.items():
        try:
            info = os.stat(name)
            now = [entry.size, info.st_mtime_ns, info.st_ino, entry.sha256]
            if info.st_size != entry.size or remembered.get(os.path.abspath(name)) != _Seen(*now):
                found[name] = now
        except OSError:  # said by whoever is to hash it
            found[name] = [entry.size, 0, 0, entry.sha256]
    return found


def _rounds(files: Mapping[str, FileEntry], num_bytes: int) -> Iterator[dict[str, FileEntry]]:
    """Cut the files into parts of at least so many bytes, but for the last."""
    part: dict[str, FileEntry] = {}
    left = num_bytes
    for name, entry in sorted(files.items()):
        part[name] = entry
        left -= entry.size
        if left <= 0:
            yield part
            part, left = {}, num_bytes
    if part:
        yield part


def _judge(name: str, entry: FileEntry) -> str:
    """Say what is wrong with a file; empty where nothing is."""
    do = "Restore it from a copy, or make it again."
    try:
        size = os.path.getsize(name)
        if size != entry.size:
            return problem(name, "", f"has {size} bytes, its manifest says {entry.size}", "it was altered or cut", do)
        actual = hash_file(Path(name))
    except OSError as error:
        return problem(name, "", f"can't be read: {error.strerror}", do=do)
    if actual == entry.sha256:
        return ""
    why = f"its sha256 is {actual[:12]}.., its manifest says {entry.sha256[:12]}.."
    return problem(name, "", "was altered", why, do)


def _read(stamp: Path) -> dict[str, _Seen]:
    try:
        return {name: _Seen(**seen) for name, seen in json.loads(stamp.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}  # without it, or with a torn one, everything is proved


def _remember(stamp: Path, proved: Mapping[str, _Seen]) -> None:
    held = _read(stamp) | {os.path.abspath(name): seen for name, seen in proved.items()}
    temporary = stamp.with_name(f".{stamp.name}.tmp")
    try:
        temporary.write_text(json.dumps({name: asdict(seen) for name, seen in sorted(held.items())}, indent=1) + "\n")
        os.replace(temporary, stamp)
    except OSError:
        return  # the next start proves it once more
