"""Files that are whole or not there: written, synced, hashed.

What checkpoints and token stores are made of; neither knows the other. Plain files: no torch, no process group.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

READ_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class FileEntry:
    """What a file must be to be trusted."""

    size: int
    sha256: str


def hash_file(path: Path) -> str:
    """Return the sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while data := file.read(READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


def sync_folder(path: Path) -> None:
    """Force the names in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes) -> FileEntry:
    """Write a new file, force it to the disk and return its entry."""
    with open(path, "xb", buffering=0) as file:
        write_all(file.fileno(), memoryview(data))
        os.fsync(file.fileno())
    return FileEntry(len(data), hashlib.sha256(data).hexdigest())


def write_all(descriptor: int, data: memoryview) -> None:
    """Write all of `data`; a write may end early when the disk is nearly full."""
    while data:
        data = data[os.write(descriptor, data[: 1 << 30]) :]
