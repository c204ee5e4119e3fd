"""The weights that a run starts from: drawn from the seed, or read from a Hugging Face folder, shard by shard."""

from pathlib import Path

import torch

from configs.errors import CheckpointError, problem
from configs.schema import Config
from models.hf_weights import HfWeights, parameter_shapes
from models.init import fill_local
from parallel.materialise import Fill


def starting_weights(config: Config) -> Fill:
    """Return what fills the parameters of a resolved config at step 0; refuses a folder that doesn't fit at once."""
    if config.model.init_from:
        return _from_folder(config)

    def draw(local: torch.Tensor, name: str, shape: tuple[int, ...], offset: tuple[int, ...]) -> None:
        fill_local(local, config.model, config.run.seed, name, shape, offset)

    return draw


def _from_folder(config: Config) -> Fill:
    weights = HfWeights(Path(config.model.init_from))
    for field in ("rope_theta", "rope_scaling", "norm_eps"):
        ours, theirs = getattr(config.model, field), getattr(weights.config, field)
        if ours != theirs:
            # Shapes would fit, and every number would be a little wrong.
            why = f"{config.model.init_from} was trained with {theirs!r}"
            raise CheckpointError(problem(f"model.{field}", ours, "differs from the model it starts from", why))
    weights.check(parameter_shapes(config.model))

    def read(local: torch.Tensor, name: str, shape: tuple[int, ...], offset: tuple[int, ...]) -> None:
        if local.numel():
            part = tuple(slice(begin, begin + size) for begin, size in zip(offset, local.shape, strict=True))
            local.copy_(weights.read(name, part))

    return read
