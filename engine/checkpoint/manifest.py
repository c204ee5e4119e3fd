"""What a committed checkpoint folder is: its name, its manifest, and the proof that every byte is there.

A checkpoint is `step-00000100/` with `manifest.json`, which names every file with size and sha256, and every tensor
with dtype, shape and the chunks it is stored in. The manifest is written last and carries the hash of its own text, so
a folder is a checkpoint only when its manifest says so and its files agree. Everything here is plain JSON and plain
files: no torch, no process group, no pickle. It must not decide what is saved; checkpointer.py does.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import CheckpointError, problem
from engine.files import FileEntry, hash_file, sync_folder, write_whole

VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
MAX_MANIFEST_BYTES = 1 << 30
MAX_DIMS = 8
MISSING = "is missing"
VISIBLE_WAITS_S = (0.05, 0.15, 0.3)
"""How often, and how long after, a file that isn't seen is looked for again: network file systems cache folders, and
listing one refreshes it."""

_STEP = re.compile(r"step-(\d{8,12})")
_STALE = re.compile(r"\.(tmp|trash)-step-\d{8,12}-[0-9a-f]{8}")
_FILE = re.compile(rf"({TOKENIZER}/)?[A-Za-z0-9_][A-Za-z0-9._-]{{0,199}}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_UNSEALED = "0" * 64  # stands where the manifest's own hash goes, while it is hashed


@dataclass(frozen=True, slots=True)
class Chunk:
    """One box of a tensor: where it lies in the tensor, and the file that holds it under the tensor's name."""

    file: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: its dtype by torch's name, its whole shape, and the chunks that cover it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A checkpoint, without its bytes."""

    step: int
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    meta: dict[str, Any] = field(default_factory=dict)
    heldout_loss: float | None = None

    def to_text(self) -> str:
        """Return the manifest as JSON text that ends with the sha256 of itself."""
        head = {
            "format": "ropewalk-checkpoint",
            "version": VERSION,
            "step": self.step,
            "heldout_loss": self.heldout_loss,
        }
        files = {name: {"size": entry.size, "sha256": entry.sha256} for name, entry in self.files.items()}
        parts = [f'"{key}": {_dump(value)}' for key, value in head.items()]
        parts += [_block("files", files), _block("tensors", {n: _tensor_dict(e) for n, e in self.tensors.items()})]
        parts += [_block("meta", self.meta), f'"sha256": "{_UNSEALED}"']
        text = "{\n" + ",\n".join(parts) + "\n}\n"
        return _seal(text, _digest(text))


def _dump(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def _block(name: str, content: Mapping[str, Any]) -> str:
    """One entry a line, so that a person can read it and diff it."""
    lines = [f" {_dump(key)}: {_dump(value)}" for key, value in content.items()]
    return f'"{name}": {{\n' + ",\n".join(lines) + "\n}"


def _tensor_dict(entry: TensorEntry) -> dict[str, Any]:
    chunks = [{"file": chunk.file, "offset": chunk.offset, "shape": chunk.shape} for chunk in entry.chunks]
    return {"dtype": entry.dtype, "shape": entry.shape, "chunks": chunks}


def parse_manifest(text: str, where: str) -> Manifest:
    """Return the manifest in `text`; raise CheckpointError naming `where` when it isn't exactly what was written."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _bad(where, f"isn't JSON ({error})") from None
    if not isinstance(content, dict) or content.get("format") != "ropewalk-checkpoint":
        raise _bad(where, "isn't a checkpoint's manifest")
    if content.get("version") != VERSION:
        raise CheckpointError(
            problem(f"{where}: version", content.get("version"), f"this Ropewalk reads version {VERSION}")
        )
    seal = content.get("sha256")
    if not isinstance(seal, str) or not _SHA256.fullmatch(seal):
        raise _bad(where, "has no sha256 of itself")
    actual = _digest(_seal(text, _UNSEALED))
    if actual != seal:
        raise _bad(where, f"was altered: its sha256 is {actual[:12]}.., it says {seal[:12]}..")
    try:
        return _build(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _bad(where, f"is not well-formed ({type(error).__name__}: {error})") from None


def _bad(where: str, what: str) -> CheckpointError:
    return CheckpointError(f"{where} {what}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _seal(text: str, seal: str) -> str:
    """Replace the hash at the end of the text; text that doesn't end in one is returned as it is."""
    head, mark, tail = text.rpartition('"sha256": "')
    return head + mark + seal + tail[64:]


def _build(content: dict[str, Any]) -> Manifest:
    """The typed manifest; ValueError when a part contradicts another or points outside of the folder."""
    files = {name: FileEntry(**entry) for name, entry in content["files"].items()}
    for name, entry in files.items():
        _demand(_FILE.fullmatch(name) is not None, f"file name {name!r}")
        _demand(_is_size(entry.size) and _SHA256.fullmatch(entry.sha256) is not None, f"entry of {name}")
    tensors = {}
    for name, entry in content["tensors"].items():
        chunks = [Chunk(c["file"], tuple(c["offset"]), tuple(c["shape"])) for c in entry["chunks"]]
        tensors[name] = TensorEntry(entry["dtype"], tuple(entry["shape"]), tuple(chunks))
        _check_tensor(name, tensors[name], files)
    step, meta, loss = content["step"], content["meta"], content["heldout_loss"]
    _demand(_is_size(step) and isinstance(meta, dict), "step or meta")
    _demand(loss is None or isinstance(loss, int | float), "heldout_loss")
    return Manifest(step=step, files=files, tensors=tensors, meta=meta, heldout_loss=loss)


def _check_tensor(name: str, tensor: TensorEntry, files: Mapping[str, FileEntry]) -> None:
    """ValueError unless the chunks lie within the tensor and have as many elements as it."""
    whole = f"tensor {name!r}"
    _demand(isinstance(tensor.dtype, str) and len(tensor.shape) <= MAX_DIMS, whole)
    _demand(all(_is_size(n) for n in tensor.shape), f"{whole}: shape")
    held = 0
    for chunk in tensor.chunks:
        _demand(chunk.file in files, f"{whole}: file {chunk.file!r} is not listed")
        _demand(len(chunk.offset) == len(chunk.shape) == len(tensor.shape), f"{whole}: chunk")
        for begin, length, size in zip(chunk.offset, chunk.shape, tensor.shape, strict=True):
            _demand(_is_size(begin) and _is_size(length) and begin + length <= size, f"{whole}: chunk out of bounds")
        held += _numel(chunk.shape)
    _demand(held == _numel(tensor.shape), f"{whole}: chunks hold {held} of {_numel(tensor.shape)} elements")
    _demand(len({chunk.offset for chunk in tensor.chunks}) == len(tensor.chunks), f"{whole}: chunk twice")


def _demand(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _numel(shape: Iterable[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


# -------------------- folders and names


def step_folder(step: int) -> str:
    """Return the name of the folder of a step."""
    return f"step-{step:08d}"


def list_steps(folder: Path) -> list[int]:
    """Return the steps that have a folder, newest first; a folder proves nothing yet."""
    if not folder.is_dir():
        return []
    matches = (_STEP.fullmatch(entry.name) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def temporary_name(step: int, kind: str = "tmp") -> str:
    """Return a new name beside the step's folder: `tmp` while it is written, `trash` while it is deleted."""
    return f".{kind}-{step_folder(step)}-{uuid.uuid4().hex[:8]}"


def discard(path: Path) -> None:
    """Delete a checkpoint folder such that a crash in between never leaves half of it under its name."""
    match = _STEP.fullmatch(path.name)
    assert match is not None, f"{path} is no checkpoint folder"
    trash = path.with_name(temporary_name(int(match[1]), "trash"))
    os.rename(path, trash)
    sync_folder(path.parent)
    shutil.rmtree(trash)


def discard_newer(folder: Path, step: int) -> None:
    """Delete the checkpoints from after `step`, the newest first: what a crash in between leaves is a run as it was."""
    for number in list_steps(folder):
        if number > step:
            discard(folder / step_folder(number))


def remove_stale(folder: Path) -> list[str]:
    """Delete what killed saves and deletions left in the folder; return the names."""
    stale = sorted(entry.name for entry in os.scandir(folder) if _STALE.fullmatch(entry.name))
    for name in stale:
        shutil.rmtree(folder / name)
    return stale


def copy_tokenizer(source: Path, target: Path) -> dict[str, FileEntry]:
    """Copy the plain files of a tokenizer folder into `target`/tokenizer; return their entries."""
    (target / TOKENIZER).mkdir()
    entries = {}
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.is_symlink() or not path.is_file():
            continue
        name = f"{TOKENIZER}/{path.name}"
        if not _FILE.fullmatch(name):
            raise CheckpointError(problem(str(path), "", "a name of letters, digits, '.', '_' and '-' is expected"))
        entries[name] = write_whole(target / name, path.read_bytes())
    sync_folder(target / TOKENIZER)
    return entries


# -------------------- the proof


def read_manifest(path: Path) -> str:
    """Return the text of a checkpoint folder's manifest; raise CheckpointError when there is none to read."""
    file = path / MANIFEST
    try:
        info = file.lstat()
        if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{MANIFEST} is no regular file of at most {MAX_MANIFEST_BYTES} bytes")
        return file.read_bytes().decode()
    except FileNotFoundError:
        raise CheckpointError(f"{MANIFEST} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{MANIFEST} can't be read: {error}") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{MANIFEST} isn't text") from None


def check_files(path: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Return what is wrong with these files of a checkpoint folder: presence, kind, size and sha256."""
    found = {name: _problem_of(path, name, manifest.files[name]) for name in names}
    for wait_s in VISIBLE_WAITS_S:
        missing = [name for name, problem_of in found.items() if problem_of == MISSING]
        if not missing:
            break
        time.sleep(wait_s)
        for folder in {(path / name).parent for name in missing}:
            with suppress(OSError):
                os.listdir(folder)
        found |= {name: _problem_of(path, name, manifest.files[name]) for name in missing}
    return [f"{name} {problem_of}" for name, problem_of in found.items() if problem_of]


def _problem_of(path: Path, name: str, entry: FileEntry) -> str:
    try:
        info = (path / name).lstat()
        if not stat.S_ISREG(info.st_mode) or (path / name).parent.is_symlink():
            return "is no regular file of the folder"
        if info.st_size != entry.size:
            return f"has {info.st_size} bytes, the manifest says {entry.size}"
        if (actual := hash_file(path / name)) != entry.sha256:
            return f"has sha256 {actual[:12]}.., the manifest says {entry.sha256[:12]}.."
    except FileNotFoundError:
        return MISSING
    except OSError as error:
        return MISSING if error.errno == errno.ESTALE else f"can't be read: {error}"
    return ""


def share_files(files: Mapping[str, FileEntry], rank: int, num_ranks: int) -> list[str]:
    """Return the files that this rank proves: each file on one rank, about as many bytes on each."""
    loads = [0] * num_ranks
    mine = []
    for name in sorted(files, key=lambda name: (-files[name].size, name)):
        lightest = loads.index(min(loads))
        loads[lightest] += files[name].size + 1
        if lightest == rank:
            mine.append(name)
    return mine


# -------------------- retention


def expired_steps(
    losses: Mapping[int, float | None],
    newest: int,
    *,
    keep_last: int,
    keep_every: int,
    keep_best: bool,
    keep_before: int | None = None,
) -> list[int]:
    """Return the steps to delete, oldest first, given the held-out loss of every good one; `newest` always stays.

    So does the newest from before step `keep_before`, to which the run may have to go back.
    """
    steps = sorted(losses)
    kept = {newest, *steps[-keep_last:]}
    if keep_every:
        kept |= {step for step in steps if step % keep_every == 0}
    if keep_best and (best := best_step(losses)) is not None:
        kept.add(best)
    if keep_before is not None:
        kept |= set([step for step in steps if step < keep_before][-1:])
    return [step for step in steps if step not in kept]


def best_step(losses: Mapping[int, float | None]) -> int | None:
    """Return the step with the lowest held-out loss, the newest of equals; None when no loss is known."""
    known = [(loss, -step) for step, loss in losses.items() if loss is not None]
    return -min(known)[1] if known else None
