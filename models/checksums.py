"""Hashes that an exported folder brings along: checksums.json, with size and sha256 of each file of weights.

Only files of weights are listed: what a person may edit by hand, such as config.json, is not. A folder from elsewhere
has none, and is held against the model by its headers alone. Nothing here decides who reads how much of it.
"""

import hashlib
import json
import re
from pathlib import Path

from configs.errors import CheckpointError, problem

CHECKSUMS = "checksums.json"

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_BYTES = 1 << 24


def checksums_text(folder: Path) -> str:
    """Hash the weights that lie in a folder and write down what they are."""
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            files[path.name] = {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    return json.dumps({"format": "ropewalk-checksums", "files": files}, indent=2) + "\n"


def read_checksums(folder: Path) -> dict[str, tuple[int, str]]:
    """Return size and sha256 by file name, nothing where the folder says nothing; CheckpointError for a broken one."""
    path = folder / CHECKSUMS
    if not path.is_file():
        return {}
    do = "Restore the folder from a copy; remove the file only where the weights were changed on purpose."
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != "ropewalk-checksums":
            raise ValueError(f"its format is {content['format']!r}")
        found = {name: (entry["size"], entry["sha256"]) for name, entry in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(problem(str(path), "", f"can't be read as checksums: {error!r}", do=do)) from None
    for name, (size, sha256) in found.items():
        good = isinstance(size, int) and isinstance(sha256, str) and _SHA256.fullmatch(sha256) is not None
        if not good or not _NAME.fullmatch(name):
            raise CheckpointError(problem(f"{path}: files", name, "must be a plain name with size and sha256", do=do))
    return found
