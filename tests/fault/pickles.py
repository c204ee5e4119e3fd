"""Pickles for tests: files that run code when they are loaded, and the search for pickles in files of a run.

A payload leaves a sentinel behind; where that never appears, nothing loaded it.
"""

import io
import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

_FRAME = re.compile(rb"\x80[\x04\x05]\x95(.{8})", re.S)
_ZIP = b"PK\x03\x04"
_LEAST = 12
"""Bytes of a pickle that could do anything; fewer are found by chance, as where a file begins with a number."""


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.sentinel,)


def payloads(sentinel: Path) -> dict[str, bytes]:
    """Return the payload in the forms in which such files are found: bare, by protocol, and as torch.save writes it."""
    packed = io.BytesIO()
    torch.save({"state": Payload(sentinel)}, packed)
    bare = {f"protocol {number}": pickle.dumps(Payload(sentinel), number) for number in (0, 2, 5)}
    return bare | {"torch.save": packed.getvalue()}


def holds_pickle(data: bytes) -> str:
    """Say how these bytes hold a pickle; empty where they hold none."""
    try:
        *_, (_, _, end) = pickletools.genops(data)
    except Exception:
        end = 0
    if end and end >= _LEAST:
        return f"a pickle of {end} bytes"
    for match in _FRAME.finditer(data):  # protocol 4 and 5 say how long a frame is
        if 2 < int.from_bytes(match[1], "little") <= len(data) - match.end():
            return f"a pickle's frame at byte {match.start()}"
    if data.startswith(_ZIP) or zipfile.is_zipfile(io.BytesIO(data)):
        return "an archive, as torch.save writes"
    return ""
