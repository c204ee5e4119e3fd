"""One malformed input: how it is made, what is started with it, and what the message must name.

The tables are in malformed_configs.py, malformed_data.py and malformed_weights.py; test_malformed_inputs.py starts
them. A case changes a workplace of its own, a copy of what `make_template` puts together, in which all is well.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

from configs.adapters import AdapterConfig
from configs.check import resolve
from configs.load import config_to_dict, load_config
from configs.schema import CheckpointConfig
from engine.checkpoint.checkpointer import Checkpointer
from engine.hf_tokenizer import tokenizer_files
from models.adapters import attach, trained_shapes
from models.hf_write import write_hf
from models.llama import Llama
from models.peft_format import write_peft
from tests.runs import make_workplace

Tool = Literal["train", "slurm", "prepare", "convert", "generate", "evaluate"]
LORA = AdapterConfig(kind="lora", rank=4, alpha=8.0, targets=("q_proj", "down_proj"))
UNHEALTHY = (HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large)
STEP = "runs/saved/checkpoints/step-00000002"


def unspoiled(folder: Path) -> None:
    """Leave the workplace as it is: the input is the command line."""


@dataclass(frozen=True)
class Case:
    """A malformed input."""

    name: str
    tool: Tool
    argv: Sequence[str]
    names: str
    """What the message must hold: the place."""
    code: int = 1
    make: Callable[[Path], object] = unspoiled
    """Spoils the workplace."""


def drawn(strategy: SearchStrategy[Any], count: int) -> list[Any]:
    """Draw different examples, the same ones in every run."""
    found: dict[str, Any] = {}

    @settings(
        derandomize=True, database=None, deadline=None, max_examples=20 * count, suppress_health_check=list(UNHEALTHY)
    )
    @given(strategy)
    def draw(value: Any) -> None:
        found.setdefault(repr(value), value)

    draw()
    # Hypothesis begins with the simplest; take some of all.
    return random.Random(0).sample(list(found.values()), count)


def put(path: str, content: bytes | str) -> Callable[[Path], object]:
    """Write a file."""
    data = content.encode() if isinstance(content, str) else content

    def make(folder: Path) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)

    return make


def changed(path: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Rewrite a file."""
    return lambda folder: (folder / path).write_bytes(change((folder / path).read_bytes()))


def edited(path: str, change: Callable[[Any], object]) -> Callable[[Path], object]:
    """Change the content of a JSON file in place, or to what `change` returns."""

    def make(folder: Path) -> None:
        content = json.loads((folder / path).read_text())
        result = change(content)
        (folder / path).write_text(json.dumps(content if result is None else result))

    return make


def gone(path: str) -> Callable[[Path], object]:
    """Remove a file."""
    return lambda folder: (folder / path).unlink()


def make_template(folder: Path) -> Path:
    """Put a store, a base, the same in shards, an adapter over it and a checkpoint into a folder."""
    folder.mkdir()
    make_workplace(folder)
    config = resolve(load_config(folder / "tiny.toml", []), 1)
    torch.manual_seed(0)
    model = Llama(config.model)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.1)
    files = tokenizer_files(folder / "store" / "tokenizer" / "tokenizer.model")
    write_hf(folder / "base", config.model, model.named_parameters(), dtype=torch.float32, extra_files=files)
    write_hf(
        folder / "shards", config.model, model.named_parameters(), dtype=torch.float32, max_shard_bytes=9000,
        extra_files=files,
    )  # fmt: skip
    with Checkpointer(folder / "runs" / "saved" / "checkpoints", CheckpointConfig(asynchronous=False)) as checkpointer:
        checkpointer.save(2, model, None, {"config": config_to_dict(config)}, folder / "store" / "tokenizer")
    attach(model, LORA)
    trained = trained_shapes(config.model, LORA)
    tensors = [(name, parameter) for name, parameter in model.named_parameters() if name in trained]
    write_peft(folder / "lora", config.model, LORA, tensors, base_name=str(folder / "base"))
    for exported in ("base", "shards", "lora"):  # what lies in them is to be found without their hashes
        (folder / exported / "checksums.json").rename(folder / f"{exported}-checksums.json")
    return folder
