"""A model's weights wherever they were saved: a run, one of its checkpoints, or a Hugging Face folder.

For the tools that use a model in one process. What is opened has been proved: a checkpoint by its checksums, a Hugging
Face folder by its headers. Tensors are read one at a time, by our names; the optimizer's are never touched.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from configs.errors import CheckpointError, problem
from configs.load import config_from_dict
from configs.schema import ModelConfig
from engine.checkpoint.reader import CheckpointReader, open_checkpoint
from models.hf_weights import HfWeights, parameter_shapes
from models.llama import Llama
from parallel.fsdp import DTYPES

PREFIX = "model."  # of the model's tensors in a checkpoint

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


class Reader(Protocol):
    """What both kinds of folder can do."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Give the whole shape of a parameter."""
        ...

    def read(self, name: str, slices: Sequence[slice] | None = None) -> torch.Tensor:
        """Copy a parameter or a part of it."""
        ...


@dataclass(frozen=True)
class SavedModel:
    """An opened model: `tokenizer` is the file to read text with, if one lies with the weights."""

    where: str
    config: ModelConfig
    reader: Reader
    dtype: torch.dtype
    """The format it was computed in, if a checkpoint; the stored one, if a Hugging Face folder."""
    tokenizer: Path | None
    notes: tuple[str, ...] = ()
    """What the user should hear, such as newer checkpoints that could not be proved."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Read each parameter once, in the model's order."""
        for name in parameter_shapes(self.config):
            yield name, self.reader.read(name)


class _CheckpointWeights:
    """A checkpoint's model tensors, by the names that the model gives them."""

    def __init__(self, checkpoint: CheckpointReader) -> None:
        self.checkpoint = checkpoint

    def shape(self, name: str) -> tuple[int, ...]:
        return self.checkpoint.shape(PREFIX + name)

    def read(self, name: str, slices: Sequence[slice] | None = None) -> torch.Tensor:
        return self.checkpoint.read(PREFIX + name, tuple(slices) if slices else None)


def open_model(path: str | Path, *, step: int | None = None, best: bool = False) -> SavedModel:
    """Open a run folder (its newest good checkpoint, or `step`, or the best), a checkpoint or a Hugging Face folder.

    Raises CheckpointError where the folder is none of them or can't be proved.
    """
    path = Path(path)
    if not path.is_dir():
        expected = "no such folder"
        do = "Give a run (runs/NAME), a checkpoint or a Hugging Face folder."
        raise CheckpointError(problem(str(path), "", expected, do=do))
    return _open_hf(path, step, best) if (path / "config.json").is_file() else _open_checkpoint(path, step, best)


def load_model(saved: SavedModel, device: torch.device, dtype: torch.dtype) -> Llama:
    """Build the model and fill it tensor by tensor, so that nothing but the model itself takes memory."""
    with torch.device("meta"):
        model = Llama(saved.config).to(dtype)
    model.to_empty(device=device)
    if saved.config.tie_embeddings:  # to_empty gives each name memory of its own
        model.lm_head.weight = model.embed_tokens.weight
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in saved.tensors():
            parameters[name].copy_(tensor)
    return model.eval()


def _open_hf(path: Path, step: int | None, best: bool) -> SavedModel:
    if step is not None or best:
        raise CheckpointError(
            problem(str(path), "", "is a Hugging Face folder, which has no steps to choose from", do="Leave that out.")
        )
    weights = HfWeights(path)
    weights.check()
    dtype = weights.read("norm.weight").dtype
    return SavedModel(str(path), weights.config, weights, dtype, find_tokenizer(path))


def _open_checkpoint(path: Path, step: int | None, best: bool) -> SavedModel:
    checkpoint = open_checkpoint(path, step=step, best=best, weights_only=True)
    run = config_from_dict(checkpoint.meta["config"], str(checkpoint.path))
    config = replace(run.model, init_from="")
    weights = _CheckpointWeights(checkpoint)
    stored = {name.removeprefix(PREFIX): checkpoint.shape(name) for name in checkpoint.names(PREFIX)}
    if config.tie_embeddings:
        stored.pop("lm_head.weight", None)
    if stored != parameter_shapes(config):
        expected = "its tensors are not those of the model that its config describes"
        raise CheckpointError(problem(str(checkpoint.path), "", expected))
    folder = checkpoint.tokenizer_dir
    tokenizer = find_tokenizer(folder) if folder else None
    dtype = DTYPES[run.precision.compute]
    return SavedModel(str(checkpoint.path), config, weights, dtype, tokenizer, tuple(checkpoint.refused))


def find_tokenizer(folder: Path) -> Path | None:
    """Give the folder's tokenizer file: tokenizer.json before tokenizer.model before any other .model."""
    named = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return next(iter([*named, *sorted(folder.glob("*.model"))]), None)
