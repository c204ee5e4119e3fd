"""Adapters as folders of PEFT's: adapter_config.json and adapter_model.safetensors, read and written.

Our names are PEFT's without its prefix, and without the copies of base weights that it may store beside an adapter:
`layers.0.self_attn.q_proj.lora_A.weight` is `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` there. No
tensor is permuted. A written folder is a function of names and numbers, so it is the same whatever layout trained it.
Read, everything is held against the model before a number is used: PEFT itself only warns of keys that match nothing.
The fields of the JSON are peft_config.py's. Pickles (.bin) are refused: loading one runs whatever code it carries.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from configs.adapters import AdapterConfig
from configs.errors import CheckpointError, problem
from configs.schema import ModelConfig
from configs.targets import adapted_modules
from models.adapters import trained_shapes
from models.hf_weights import FORMATS, LISTED_PROBLEMS, Reader, hf_name, open_safetensors, our_name
from models.hf_write import new_folder, write_json
from models.peft_config import CONFIG, PROMPT, peft_config, prefix_names, read_peft_config

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
VIRTUAL = "prompt_embeddings"  # the one key of prompt and prefix
COMPARED_AT_ONCE = 1 << 24  # elements of a repeated base weight

_PICKLE = "adapter_model.bin"
_PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


def split_member(name: str, members: Iterable[str]) -> tuple[str, str]:
    """Part an adapter's parameter from the member that it belongs to: the name of a lone adapter's, and the member's.

    `q_proj.lora_A.fast.weight` is `q_proj.lora_A.weight` of `fast`; what no member owns belongs to "".
    """
    parts = name.split(".")
    for at, part in enumerate(parts[:-1]):
        if part in _PARTS and parts[at + 1] in members:
            return ".".join([*parts[: at + 1], *parts[at + 2 :]]), parts[at + 1]
    return name, ""


# -------------------- reading


class AdapterWeights:
    """The tensors of a folder of PEFT's, by our names; `config` is what its adapter_config.json says."""

    def __init__(self, folder: str | Path, model: ModelConfig) -> None:
        """Read the JSON and the header; raise CheckpointError where the folder can't be used.

        `model` is the resolved config of the base.
        """
        self.folder, self.model = Path(folder), model
        if not self.folder.is_dir():
            do = "Give the folder that holds adapter_config.json."
            raise CheckpointError(problem(str(folder), "", "no such folder", do=do))
        self.config: AdapterConfig = read_peft_config(self.folder, model)
        self._file: Any = self._open()
        self._keys: dict[str, tuple[str, int]] = {}  # our name -> (key, first column)
        self._repeated: dict[str, str] = {}  # key -> our name of a weight of the base
        self._unknown: list[str] = []
        for key in list(self._file.keys()):
            self._place(key)

    def names(self) -> list[str]:
        """List the adapter's parameters."""
        return list(self._keys)

    def shape(self, name: str) -> tuple[int, ...]:
        """Give a parameter's whole shape, from the header."""
        key, _ = self._keys[name]
        shape = tuple(self._file.get_slice(key).get_shape())
        return (shape[0], self._width) if self._in_columns(shape) else shape

    def read(self, name: str, slices: Sequence[slice] | None = None) -> torch.Tensor:
        """Copy a parameter, or the rectangle that `slices` (one for each leading dim) cut out, in the stored format."""
        key, first = self._keys[name]
        view = self._file.get_slice(key)
        if self._in_columns(view.get_shape()):
            rows, columns = [*(slices or ()), slice(None), slice(None)][:2]
            begin, end, _ = columns.indices(self._width)
            part = view[rows, first + begin : first + end]
        else:
            part = view[tuple(slices)] if slices else view[:]
        return part.clone(memory_format=torch.contiguous_format)

    def check(self, adapter: AdapterConfig | None = None, base: Reader | None = None) -> None:
        """Compare the folder with the model and with the adapter that a run trains; CheckpointError lists everything.

        Without `adapter`, the one that adapter_config.json describes is meant. PEFT may store the weights of a targeted
        embedding or head once more: they must then be those of `base`, bit for bit.
        """
        problems = [] if adapter is None else self._other_settings(adapter)
        expected = trained_shapes(self.model, self.config)
        if not problems:
            problems += [
                f"missing: {self._key(name)} {shape}" for name, shape in expected.items() if name not in self._keys
            ]
            problems += [f"unexpected: {key} {self._stored(key)[0]}" for key in self._unknown]
            problems += dict.fromkeys(self._misfits(expected))
            problems += [*self._changed(base), *self._not_finite()] if not problems else []
        if problems:
            shown = problems[:LISTED_PROBLEMS]
            shown += [f"... and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
            head = f"{self.folder}: the adapter does not fit; use the base and the settings that it was trained with:"
            raise CheckpointError("\n  ".join([head, *shown]))

    def _misfits(self, expected: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
        for name, (key, _) in self._keys.items():
            shape, stored = self._stored(key)
            if name not in expected:
                yield f"unexpected: {key} {shape}"
            elif self.shape(name) != expected[name]:
                yield f"wrong shape: {key} {shape}, expected {self._whole(expected[name])}"
            if stored not in FORMATS:
                yield f"wrong format: {key} {stored}, expected one of {', '.join(FORMATS)}"

    def _other_settings(self, adapter: AdapterConfig) -> list[str]:
        """Every setting of the run's [adapter] that differs from the folder's and that its numbers depend on."""
        ours, theirs = _settings(self.model, adapter), _settings(self.model, self.config)
        return [
            f"{name}: {theirs.get(name, 'nothing')} in the folder, {ours.get(name, 'nothing')} in the run's adapter"
            for name in [*theirs, *(name for name in ours if name not in theirs)]
            if theirs.get(name) != ours.get(name)
        ]

    def _changed(self, base: Reader | None) -> Iterator[str]:
        """Base weights that are stored beside the adapter and differ from the base's."""
        for key, name in self._repeated.items():
            if self.model.tie_embeddings:
                name = "embed_tokens.weight"
            shape, _ = self._stored(key)
            if base is None:
                yield f"{key} {shape}: a weight of the base, which can't be compared here"
                continue
            equal = shape == base.shape(name)
            rows = max(1, COMPARED_AT_ONCE // max(1, shape[-1])) if shape else 1
            for first in range(0, shape[0] if equal else 0, rows):
                part = (slice(first, first + rows),)
                theirs, ours = self._file.get_slice(key)[part], base.read(name, part)
                equal = equal and torch.equal(theirs.to(ours.dtype), ours)
            if not equal:
                yield f"{key} {shape}: a weight of the base, and not what the base has"

    def _not_finite(self) -> Iterator[str]:
        """What would make every logit NaN; an adapter is small, so all of it is read."""
        for key in dict.fromkeys(key for key, _ in self._keys.values()):
            count = int((~torch.isfinite(self._file.get_slice(key)[:])).sum())
            if count:
                yield f"not finite: {key} {self._stored(key)[0]}, {count:,} of its values are NaN or infinite"

    def _open(self) -> Any:
        path = self.folder / WEIGHTS
        if not path.exists() and (self.folder / _PICKLE).exists():
            expected = "is a pickle, and weights are read from .safetensors only"
            why, do = "loading a pickle runs whatever code it carries", "Save it with safe_serialization=True."
            raise CheckpointError(problem(str(self.folder / _PICKLE), "", expected, why, do))
        return open_safetensors(path)

    def _place(self, key: str) -> None:
        """Find what a stored tensor is."""
        if key == VIRTUAL and self.config.kind == "prompt":
            self._keys[PROMPT] = (key, 0)
        elif key == VIRTUAL and self.config.kind == "prefix":
            names = [name for layer in range(self.model.num_layers) for name in prefix_names(layer)]
            self._keys |= {name: (key, number * self._width) for number, name in enumerate(names)}
        elif not key.startswith(PREFIX) or self.config.kind != "lora":
            self._unknown.append(key)
        elif key.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")):
            self._repeated[key] = our_name(key.removeprefix(PREFIX)).replace(".base_layer", "")
        else:
            self._keys[our_name(key.removeprefix(PREFIX)).replace(".base_layer.bias", ".bias")] = (key, 0)

    @property
    def _width(self) -> int:
        """Columns of one layer's keys or values."""
        return self.model.num_kv_heads * self.model.head_dim

    def _in_columns(self, shape: Sequence[int]) -> bool:
        """Say whether layers lie side by side in a tensor of this shape."""
        return self.config.kind == "prefix" and tuple(shape) == self._whole((self.config.num_virtual_tokens,))

    def _whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Give the stored shape of a parameter of this shape."""
        return (shape[0], 2 * self.model.num_layers * self._width) if self.config.kind == "prefix" else shape

    def _stored(self, key: str) -> tuple[tuple[int, ...], str]:
        view = self._file.get_slice(key)
        return tuple(view.get_shape()), view.get_dtype()

    def _key(self, name: str) -> str:
        return peft_key(name) if self.config.kind == "lora" else VIRTUAL


def peft_key(name: str) -> str:
    """Give PEFT's key of our parameter of a lora adapter."""
    return PREFIX + hf_name(name.removesuffix(".bias") + ".base_layer.bias" if name.endswith(".bias") else name)


def _settings(model: ModelConfig, adapter: AdapterConfig) -> dict[str, object]:
    """What an adapter's numbers depend on."""
    if adapter.kind != "lora":
        return {"kind": adapter.kind, "num_virtual_tokens": adapter.num_virtual_tokens}
    modules = adapted_modules(model, adapter)
    settings: dict[str, object] = {"kind": "lora", "rslora": adapter.rslora, "dora": adapter.dora, "bias": adapter.bias}
    return settings | {name: f"rank {rank}, alpha {alpha:g}" for name, (rank, alpha) in modules.items()}


# -------------------- writing


def write_peft(
    folder: str | Path,
    model: ModelConfig,
    adapter: AdapterConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    base_name: str | None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a folder that PEFT loads over the base; raise CheckpointError where it exists or fails.

    `tensors` yields (our name, whole tensor) for each trained parameter, in any order; `dtype` is the stored
    format, None keeps each tensor's. Of several members each is written alone, see adapter_of and split_member.
    """
    stored = _stored_tensors(Path(folder), model, adapter, tensors, dtype)
    with new_folder(folder) as unfinished:
        write_json(unfinished / CONFIG, peft_config(model, adapter, base_name))
        save_file(stored, unfinished / WEIGHTS, metadata={"format": "pt"})


def _stored_tensors(
    folder: Path,
    model: ModelConfig,
    adapter: AdapterConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype | None,
) -> dict[str, torch.Tensor]:
    """The tensors by PEFT's keys, sorted; they must be the adapter's, all of them and no more."""
    missing = trained_shapes(model, adapter)
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        if missing.pop(name, None) != tuple(tensor.shape):
            text = f"{name} {tuple(tensor.shape)} is no parameter of the adapter that is exported"
            raise CheckpointError(problem(str(folder), "", text))
        found[name] = tensor.detach().to(device="cpu", dtype=dtype or tensor.dtype).contiguous()
    if missing:
        raise CheckpointError(problem(str(folder), "", f"parameters without a value: {', '.join(sorted(missing))}"))
    if adapter.kind == "prompt":
        return {VIRTUAL: found[PROMPT]}
    if adapter.kind == "prefix":
        columns = [found[name] for layer in range(model.num_layers) for name in prefix_names(layer)]
        return {VIRTUAL: torch.cat(columns, dim=1)}
    return {peft_key(name): found[name] for name in sorted(found)}
