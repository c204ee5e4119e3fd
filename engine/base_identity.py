"""Which base an adapter belongs to: a hash that its checkpoints carry, since they leave the base out.

Of a base in a folder it covers the model's config and every number, tensor by tensor, so that the way a folder is cut
into files or how its config.json is laid out makes no difference; of a drawn base, the seed and the config. An adapter
over another base would load without a complaint and compute nonsense.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from configs.errors import CheckpointError, problem
from configs.schema import Config, ModelConfig
from engine.ranks import Ranks, describe
from models.hf_weights import HfWeights, Reader, parameter_shapes

META = "base"
HASHED_AT_ONCE = 1 << 24  # elements of whole rows that are in memory at once


def base_identity(config: Config, ranks: Ranks | None = None) -> str:
    """Return the identity of a resolved config's base; empty where all is trained and so nothing is left out.

    With `ranks` it is collective: each rank reads its share of the tensors, so that each is read once. Raises
    CheckpointError on all ranks where a folder can't be read.
    """
    if config.adapter.kind == "none":
        return ""
    model = dataclasses.replace(config.model, init_from="")
    if not config.model.init_from:
        return _digest({"seed": config.run.seed, "model": dataclasses.asdict(model)})
    return folder_identity(Path(config.model.init_from), model, ranks)


def folder_identity(folder: Path, model: ModelConfig, ranks: Ranks | None = None) -> str:
    """Return the identity of a base in a Hugging Face folder, as base_identity does."""
    shapes = parameter_shapes(dataclasses.replace(model, init_from=""))
    index, size = (ranks.index, ranks.size) if ranks is not None else (0, 1)
    mine: dict[str, Any] = {"error": "", "hashes": {}}
    try:
        weights = HfWeights(folder)
        weights.check(shapes)
        names = _share(shapes, index, size)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing leaves the interpreter to others
            mine["hashes"] = dict(zip(names, pool.map(lambda n: _hash(weights, n, shapes[n]), names), strict=True))
    except (CheckpointError, OSError) as error:
        mine["error"] = describe(error)
    found = ranks.exchange(mine) if ranks is not None else [mine]
    for of_rank in found:
        if of_rank["error"]:
            raise CheckpointError(of_rank["error"])
    hashes = {name: text for of_rank in found for name, text in of_rank["hashes"].items()}
    return _digest({"tensors": hashes, "model": dataclasses.asdict(dataclasses.replace(model, init_from=""))})


def check_base(meta: Mapping[str, Any], identity: str, where: str) -> None:
    """Raise CheckpointError unless a checkpoint's meta names this base."""
    saved = meta.get(META, "")
    if saved != identity:
        got, now = f"{str(saved)[:12]}..", f"the base is now {identity[:12]}.."
        why = "the checkpoint holds an adapter, which belongs to the base that it was trained on"
        do = "Point model.init_from at that base again, unchanged, or start a new run under another --run.name."
        raise CheckpointError(problem(f"{where}: base", got, now, why, do))


def _share(shapes: Mapping[str, Sequence[int]], index: int, size: int) -> list[str]:
    """Name the tensors that this rank reads: each on one rank, about as many elements on each."""
    loads, mine = [0] * size, []
    for name in sorted(shapes, key=lambda name: (-math.prod(shapes[name]), name)):
        lightest = loads.index(min(loads))
        loads[lightest] += math.prod(shapes[name])
        if lightest == index:
            mine.append(name)
    return mine


def _hash(weights: Reader, name: str, shape: Sequence[int]) -> str:
    """Return the sha256 of a tensor's format and bytes."""
    digest = hashlib.sha256()
    rows = max(1, HASHED_AT_ONCE // max(1, math.prod(shape[1:])))
    for first in range(0, shape[0], rows):
        part = weights.read(name, (slice(first, min(first + rows, shape[0])),))
        if first == 0:
            digest.update(f"{part.dtype} {list(shape)}\n".encode())
        digest.update(memoryview(part.contiguous().flatten().view(torch.uint8).numpy()))  # pyright: ignore[reportArgumentType]
    return digest.hexdigest()


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
