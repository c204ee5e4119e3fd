"""DCP's safetensors storage, with the manifest in the place of DCP's metadata.

torch.distributed.checkpoint plans who writes and who reads what; here are its planner, writer and reader. The format is
that of torch's HuggingFaceStorageWriter, and torch's HuggingFaceStorageReader reads it. The writer differs in that it
streams: torch's builds the whole file in memory first (twice the shard on the host) and loses the errno of a full
disk; this one hashes each tensor while it writes it. The reader differs in that its metadata is the proved manifest:
torch's opens every file on every rank. Nothing here decides when a checkpoint is good.
"""

import dataclasses
import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from configs.errors import CheckpointError, problem
from engine.checkpoint.manifest import Chunk, Manifest, TensorEntry
from engine.files import FileEntry, sync_folder, write_all, write_whole

SAFETENSORS_DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in SAFETENSORS_DTYPES}
SPACE_FACTOR = 1.05
"""Room asked of the disk beyond the tensors: headers, manifest, the file system's own blocks."""
OTHER_FILES = 16
"""Files asked of the disk beyond those of the ranks: manifest, tokenizer, folders."""


@dataclass(frozen=True, slots=True)
class Staged:
    """One box of a tensor on this rank: what DCP's plan says of it, and its elements."""

    item: WriteItem
    data: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Stored:
    """What the writer tells the coordinator about one box."""

    chunk: Chunk
    file: FileEntry


class StagedPlanner(DefaultSavePlanner):
    """Plans the boxes of a snapshot {name: Staged} instead of live tensors; replicas are written once."""

    def __init__(self) -> None:
        """Take the snapshot as it is: its keys are the names."""
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """Offer every box that holds elements; all ranks see empty shards of the others as nothing."""
        items = [staged.item for staged in self.state_dict.values() if staged.data.numel() or 0 in _size(staged)]
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        """Return the elements of a box."""
        return self.state_dict[index.fqn].data


def _size(staged: Staged) -> torch.Size:
    assert staged.item.tensor_data is not None, f"{staged.item.index.fqn} isn't a tensor"
    return staged.item.tensor_data.size


class StreamingWriter(HuggingFaceStorageWriter):
    """Writes a rank's boxes to model-rank-N.safetensors and optimizer-rank-N.safetensors, hashed on the way.

    After DCP's save, `files` and `tensors` are the manifest's, on rank 0.
    """

    def __init__(self, path: Path, rank: int, at: Callable[[str], None]) -> None:
        """Write into `path`; `at` is told the stages before_shards, in_shard and between_shards."""
        super().__init__(str(path), save_distributed=True)
        self.folder, self.shard, self.at = path, rank, at
        self.files: dict[str, FileEntry] = {}
        self.tensors: dict[str, TensorEntry] = {}

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Refuse on rank 0, before anything is written, when the disk can't hold the checkpoint."""
        needed = sum(item.tensor_storage_size() or 0 for plan in plans for item in plan.items)
        require_space(self.folder, int(SPACE_FACTOR * needed), num_files=2 * len(plans) + OTHER_FILES)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files, force them to the disk and report them."""
        self.at("before_shards")
        results: list[WriteResult] = []
        for kind in ("model", "optimizer"):
            items = [item for item in plan.items if item.index.fqn.startswith(f"{kind}.")]
            if items:
                if results:
                    self.at("between_shards")
                name = f"{kind}-rank-{self.shard:05d}.safetensors"
                results += self._write_file(name, {item.index.fqn: item for item in items}, planner)
        assert len(results) == len(plan.items), "a rank may hold one box of a tensor, of the model or the optimizer"
        sync_folder(self.folder)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write_file(self, name: str, items: Mapping[str, WriteItem], planner: SavePlanner) -> list[WriteResult]:
        """Stream one file: header, then the tensors, large elements first so that all stay aligned."""
        tensors = {key: _tensor(planner, items[key]) for key in sorted(items)}
        order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
        digest, size = hashlib.sha256(), 0
        path = self.folder / name
        # Unbuffered: a full disk must fail in the write that it stops, with its errno.
        with open(path, "xb", buffering=0) as file:
            try:
                for data in (_header(items, tensors, order), *(tensors[key] for key in order)):
                    view = memoryview(data) if isinstance(data, bytes) else _bytes_of(data)
                    digest.update(view)
                    write_all(file.fileno(), view)
                    size += view.nbytes
                    if not isinstance(data, bytes):
                        self.at("in_shard")
                os.fsync(file.fileno())
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from None
        entry = FileEntry(size, digest.hexdigest())
        results = []
        for key, tensor in tensors.items():
            offset = items[key].index.offset
            assert offset is not None, f"{key} has no place in its tensor"
            stored = _Stored(Chunk(name, tuple(offset), tuple(tensor.shape)), entry)
            results.append(WriteResult(items[key].index, tensor.nbytes, stored))
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Collect, on rank 0, what all ranks wrote."""
        chunks: dict[str, list[Chunk]] = {}
        for result in (result for of_rank in results for result in of_rank):
            stored: _Stored = result.storage_data
            self.files[stored.chunk.file] = stored.file
            chunks.setdefault(result.index.fqn, []).append(stored.chunk)
        for name in sorted(metadata.state_dict_metadata):
            whole = metadata.state_dict_metadata[name]
            assert isinstance(whole, TensorStorageMetadata), f"{name} isn't a tensor"
            dtype = str(whole.properties.dtype).removeprefix("torch.")
            parts = sorted(chunks[name], key=lambda chunk: chunk.offset)
            self.tensors[name] = TensorEntry(dtype, tuple(whole.size), tuple(parts))


def _tensor(planner: SavePlanner, item: WriteItem) -> torch.Tensor:
    data = planner.resolve_data(item)
    assert isinstance(data, torch.Tensor), f"{item.index.fqn} isn't a tensor"
    return data


def prove_writable(folder: Path) -> None:
    """Make a folder and write a byte into it; raise CheckpointError where that fails."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            write_whole(probe, b"probe")
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        what, do = f"can't be written: {error.strerror} (errno {error.errno})", "or set run.dir elsewhere."
        raise CheckpointError(problem(str(folder), "", what, do=f"Make it writable, make room, {do}")) from None


def require_space(folder: Path, needed_bytes: int, num_files: int) -> None:
    """Raise CheckpointError when the disk of `folder` has less room than this, or none for so many files."""
    free_bytes, free_files = free_space(folder)
    do = "Free some space, lower checkpoint.keep_last, or put run.dir on a larger disk."
    if free_bytes < needed_bytes:
        raise CheckpointError(
            f"{folder}: the checkpoint needs {needed_bytes} bytes, the disk has {free_bytes} free (nothing was "
            f"written). {do}"
        )
    if free_files < num_files:
        raise CheckpointError(
            f"{folder}: the checkpoint needs {num_files} files, the disk has inodes for {free_files} more (nothing was "
            f"written). Delete files there, or put run.dir on another disk."
        )


def free_space(folder: Path) -> tuple[int, float]:
    """Return the bytes and the files that the disk of `folder` can still take."""
    disk = os.statvfs(folder)
    # Where a file system makes inodes as it needs them, it says that it has none at all.
    return disk.f_bavail * disk.f_frsize, disk.f_favail if disk.f_files else math.inf


def _header(items: Mapping[str, WriteItem], tensors: Mapping[str, torch.Tensor], order: list[str]) -> bytes:
    """The head of a safetensors file (huggingface.co/docs/safetensors), with DCP's note of where each box lies."""
    places = {}
    for key in sorted(items):
        offset = items[key].index.offset
        places[key] = {"saved_offsets": list(offset or ())}
    note = {"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0", "format": "pt"}
    content: dict[str, Any] = {"__metadata__": note}
    begin = 0
    for key in order:
        tensor = tensors[key]
        end = begin + tensor.nbytes
        dtype = SAFETENSORS_DTYPES.get(tensor.dtype)
        if dtype is None:
            raise CheckpointError(f"{key} has dtype {tensor.dtype}, which checkpoints can't hold")
        content[key] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The elements as bytes, without a copy when the tensor is contiguous and on the host."""
    flat = tensor.detach().cpu().reshape(-1)
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


@dataclass(frozen=True, slots=True)
class _Place:
    """The file of a box, as torch's reader wants to be told."""

    relative_path: str


class ManifestReader(HuggingFaceStorageReader):
    """Reads tensors of a proved checkpoint; its metadata is the manifest, so no file is opened to find it."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Read from `path`, whose files the manifest was checked against."""
        super().__init__(str(path))
        self.folder, self.manifest = path, manifest

    def read_metadata(self) -> Metadata:
        """Return the manifest's tensors in DCP's form."""
        tensors: dict[str, Any] = {}
        places: dict[MetadataIndex, _Place] = {}
        for name, entry in self.manifest.tensors.items():
            boxes = [ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.shape)) for chunk in entry.chunks]
            properties = TensorProperties(dtype=DTYPES[entry.dtype])
            tensors[name] = TensorStorageMetadata(properties, torch.Size(entry.shape), boxes)
            for chunk in entry.chunks:
                places[MetadataIndex(name, torch.Size(chunk.offset))] = _Place(str(self.folder / chunk.file))
        metadata = Metadata(state_dict_metadata=tensors, storage_data=places)
        metadata.storage_meta = dataclasses.replace(StorageMeta(), load_id=self.load_id)
        return metadata
