"""A Hugging Face folder from a stream of tensors: sharded safetensors with an index and hashes, config, tokenizer.

Tensors arrive one at a time and leave when their shard is full, so memory holds one shard. Everything goes to a
hidden folder beside the target, is synced, and renamed once at the end: a folder of that name is always complete.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from configs.errors import CheckpointError, problem
from configs.schema import ModelConfig
from models.checksums import CHECKSUMS, checksums_text
from models.hf_config import hf_config
from models.hf_weights import INDEX, SINGLE, hf_name, parameter_shapes

MAX_SHARD_BYTES = 5 * 10**9

_TORCH_NAMES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def write_hf(
    folder: str | Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    bos_id: int | None = None,
    eos_id: int | None = None,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a folder that transformers' AutoModelForCausalLM loads; raise CheckpointError where it exists or fails.

    `tensors` yields (our name, whole tensor) for each parameter of the resolved config, in any order; `extra_files`
    maps plain file names, such as those of a tokenizer, to contents.
    """
    with new_folder(folder) as unfinished:
        _write_tensors(unfinished, _named(tensors, config, Path(folder)), dtype, max_shard_bytes)
        write_json(unfinished / "config.json", hf_config(config, _TORCH_NAMES[dtype], bos_id, eos_id))
        write_json(unfinished / "generation_config.json", {"bos_token_id": bos_id, "eos_token_id": eos_id})
        for name, content in (extra_files or {}).items():
            (unfinished / name).write_bytes(content)


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Give a hidden folder to write files into; it is hashed, synced and bears the name `folder` when all went well.

    Raises CheckpointError where the folder exists or can't be written, and then leaves nothing behind.
    """
    folder = Path(folder)
    if folder.exists() or folder.is_symlink():
        raise CheckpointError(
            problem(str(folder), "", "exists already", "nothing is ever overwritten", "Remove it or give another name.")
        )
    unfinished = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        (unfinished / CHECKSUMS).write_text(checksums_text(unfinished), encoding="utf-8")
        mode = unfinished.stat().st_mode & 0o666
        for path in unfinished.iterdir():
            path.chmod(mode)  # safetensors makes private files, whatever the umask says
            _sync(path)
        _sync(unfinished)
        unfinished.rename(folder)
        _sync(folder.parent)
    except (OSError, SafetensorError) as error:
        reason = f"can't be written: {error}"
        raise CheckpointError(problem(str(folder), "", reason, do="Nothing was left behind.")) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _named(
    tensors: Iterable[tuple[str, torch.Tensor]], config: ModelConfig, folder: Path
) -> Iterable[tuple[str, torch.Tensor]]:
    """Pass the tensors on under their stored names, and make sure that they are the model's."""
    missing = parameter_shapes(config)
    for name, tensor in tensors:
        if missing.pop(name, None) != tuple(tensor.shape):
            raise CheckpointError(
                problem(str(folder), "", f"{name} {tuple(tensor.shape)} is no parameter of the model that is exported")
            )
        yield hf_name(name), tensor
    if missing:
        raise CheckpointError(problem(str(folder), "", f"parameters without a value: {', '.join(sorted(missing))}"))


def _write_tensors(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, max_shard_bytes: int
) -> None:
    shard: dict[str, torch.Tensor] = {}
    shards: list[list[str]] = []
    shard_bytes = total_bytes = 0

    def flush() -> None:
        save_file(shard, folder / _part(len(shards)), metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        stored = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
        if shard and shard_bytes + stored.nbytes > max_shard_bytes:
            flush()
            shard_bytes = 0
        shard[name] = stored
        shard_bytes += stored.nbytes
        total_bytes += stored.nbytes
    flush()
    _name_shards(folder, shards, total_bytes)


def _name_shards(folder: Path, shards: list[list[str]], total_bytes: int) -> None:
    """Give the shards their final names, which hold the count that is known only now."""
    if len(shards) == 1:
        (folder / _part(0)).rename(folder / SINGLE)
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / _part(number)).rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def _part(number: int) -> str:
    return f"part-{number}.safetensors"


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write an object as JSON text that a person can read."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
