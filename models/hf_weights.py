"""Weights in a Hugging Face folder: a reader of tensor slices and a streaming writer of sharded safetensors.

The reader maps files and copies only the slice that is asked for, so no rank ever holds the whole model; the headers
alone are compared with the model before a weight is read. The writer holds one shard at a time and renames the folder
into place when it is complete. Pickles (.bin) are refused: loading one runs whatever code it carries.
Parameter names are ours, which are Hugging Face's without the leading `model.`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open

from configs.errors import CheckpointError, problem
from configs.schema import ModelConfig
from models.hf_config import read_hf_config
from models.llama import Llama

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LISTED_PROBLEMS = 40
MAX_HEADER_BYTES = 16 << 20  # a tensor takes about 100; the library itself would read 100 MB

FORMATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# A constant that old exports carry along.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")


def hf_name(name: str) -> str:
    """Give Hugging Face's name of our parameter."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def our_name(name: str) -> str:
    """Give our name of Hugging Face's parameter."""
    return name.removeprefix("model.")


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Give the whole shape of each parameter of a resolved config, by our names; a tied head is not listed."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Llama(config).named_parameters()}


def open_safetensors(path: Path) -> Any:
    """Map a safetensors file; raise CheckpointError where it is missing, no file, or not whole."""
    if not path.is_file():  # opening a pipe would wait for its writer
        text = "is not a file" if path.exists() else "no such file"
        raise CheckpointError(problem(str(path), "", text, "the tensors are read from it", "Fetch it again."))
    if not _is_of_its_folder(path):
        why, do = "a folder of weights must hold them itself", "Put a copy of the file there."
        raise CheckpointError(problem(str(path), "", f"leads out of its folder, to {path.resolve()}", why, do))
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise SafetensorError(f"a header of {header_bytes} bytes, at most {MAX_HEADER_BYTES} are read")
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        text = f"not a whole safetensors file: {error}"
        raise CheckpointError(problem(str(path), "", text, do="Fetch it again.")) from None


def _is_of_its_folder(path: Path) -> bool:
    """Say whether a file lies in its folder, or in the Hub's cache that the folder is a snapshot of."""
    real, folder = path.resolve(), path.parent.resolve()
    places = [folder, *([folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else [])]
    return any(real.is_relative_to(place) for place in places)


@runtime_checkable
class Reader(Protocol):
    """Whatever gives tensors by our names, whole or in part."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Give the whole shape of a parameter."""
        ...

    def read(self, name: str, slices: Sequence[slice] | None = None) -> torch.Tensor:
        """Copy a parameter or a part of it."""
        ...


class HfWeights:
    """The tensors of a Hugging Face Llama folder, by our names; `config` is what its config.json says."""

    def __init__(self, folder: str | Path) -> None:
        """Read config.json and the list of tensors; raise CheckpointError where the folder can't be used."""
        self.folder = Path(folder)
        self.config: ModelConfig = read_hf_config(self.folder)
        self._files: dict[str, Any] = {}  # opened when first needed, and kept open
        stored = {name: file for name, file in self._locate().items() if not _IGNORED.search(name)}
        if self.config.tie_embeddings:
            stored.pop("lm_head.weight", None)  # some writers repeat the embedding; transformers ignores it too
        # A name that isn't Hugging Face's of one of ours stays as it is, and is unexpected.
        self._stored = {our_name(name) if hf_name(our_name(name)) == name else name: name for name in stored}
        self._file_of = {ours: stored[name] for ours, name in self._stored.items()}

    def names(self) -> list[str]:
        """List the parameters that the folder holds."""
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Give a parameter's whole shape, from the header."""
        return tuple(self._view(name).get_shape())

    def read(self, name: str, slices: Sequence[slice] | None = None) -> torch.Tensor:
        """Copy a parameter, or the rectangle that `slices` (one for each leading dim) cut out, in the stored format.

        Raises CheckpointError where a number is NaN or infinite: a model that starts so computes nothing else.
        """
        view = self._view(name)
        part = view[tuple(slices)] if slices else view[:]
        # Of all ways to look at each number the quickest by far: NaN is both the least and the largest.
        if part.numel() and not all(torch.isfinite(bound) for bound in torch.aminmax(part)):
            where = f"{self.folder / self._file_of[name]}: {hf_name(name)}"
            do = "Fetch the folder again, or take an earlier state of the model."
            raise CheckpointError(problem(where, "", "holds NaN or infinity", do=do))
        return part.clone(memory_format=torch.contiguous_format)  # what was read may be a window on the file

    def check(self, expected: Mapping[str, Sequence[int]] | None = None) -> None:
        """Compare the headers with the model's parameters; raise CheckpointError listing everything that differs.

        `expected` maps our names to shapes; without it, the model that config.json describes is meant.
        """
        expected = parameter_shapes(self.config) if expected is None else expected
        problems = [
            f"missing: {hf_name(name)} {tuple(shape)}" for name, shape in expected.items() if name not in self._file_of
        ]
        for name in self._file_of:
            stored = self._view(name).get_dtype()
            if name not in expected:
                problems.append(f"unexpected: {self._stored[name]} {self.shape(name)}")
            elif self.shape(name) != tuple(expected[name]):
                problems.append(f"wrong shape: {hf_name(name)} {self.shape(name)}, expected {tuple(expected[name])}")
            if stored not in FORMATS:
                problems.append(f"wrong format: {hf_name(name)} {stored}, expected one of {', '.join(FORMATS)}")
        if problems:
            shown = problems[:LISTED_PROBLEMS]
            shown += [f"... and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
            do = "fetch them again, or the config.json that they were saved with"
            raise CheckpointError("\n  ".join([f"{self.folder}: the weights do not fit the model; {do}:", *shown]))

    def _view(self, name: str) -> Any:
        file = self._file_of[name]
        try:
            return self._open(file).get_slice(self._stored[name])
        except SafetensorError:
            raise CheckpointError(
                problem(
                    str(self.folder / file),
                    "",
                    f"does not hold {self._stored[name]}",
                    f"{INDEX} says that it does",
                    "Fetch the folder again.",
                )
            ) from None

    def _open(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = open_safetensors(self.folder / file)
        return self._files[file]

    def _locate(self) -> dict[str, str]:
        """Stored name of each tensor -> file that holds it."""
        if (self.folder / SINGLE).exists():
            return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        if (self.folder / INDEX).exists():
            return self._read_index(self.folder / INDEX)
        pickles = sorted(path.name for path in self.folder.iterdir() if path.suffix in _PICKLES)
        if pickles:
            raise CheckpointError(
                problem(
                    str(self.folder / pickles[0]),
                    "",
                    "is a pickle, and weights are read from .safetensors only",
                    "loading a pickle runs whatever code it carries",
                    "Fetch the model's safetensors files, or save it with safe_serialization=True.",
                )
            )
        what = f"holds neither {SINGLE} nor {INDEX}"
        raise CheckpointError(problem(str(self.folder), "", what, do="Fetch the folder again."))

    def _read_index(self, path: Path) -> dict[str, str]:
        if not path.is_file():
            raise CheckpointError(problem(str(path), "", "is not a file", do="Fetch it again."))
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            files = {str(name): str(file) for name, file in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            text = f"not a safetensors index: {error!r}"
            raise CheckpointError(problem(str(path), "", text, do="Fetch it again.")) from None
        for file in sorted(set(files.values())):
            if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
                expected = "must be the plain name of a .safetensors file in the same folder"
                raise CheckpointError(problem(f"{path}: weight_map", file, expected, "no other file is opened"))
        return files
