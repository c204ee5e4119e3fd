"""A model's weights wherever they were saved: a run, one of its checkpoints, a Hugging Face folder, or one of PEFT's.

For the tools that use a model in one process. What is opened has been proved: a checkpoint by its checksums, a folder
by its headers and the hashes that it may bring along, the base of an adapter by its identity. Tensors are read one at a
time, by our names; the optimizer's are never touched. An adapter stays beside its base: the base is never changed, a
merge is another stream of tensors.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from configs.adapters import AdapterConfig
from configs.errors import CheckpointError, ConfigError, problem
from configs.load import config_from_dict
from configs.schema import Config, ModelConfig
from configs.targets import projections
from engine.base_identity import base_identity, check_base
from engine.checkpoint.reader import CheckpointReader, open_checkpoint
from engine.proof import check_weights
from models.adapters import attach, trained_shapes
from models.hf_weights import HfWeights, Reader, parameter_shapes
from models.init import fill_local
from models.llama import Llama
from models.merge import merged_config, merged_tensors
from models.peft_config import CONFIG, adapter_of, read_raw
from models.peft_format import WEIGHTS, AdapterWeights, split_member
from models.quantized import can_quantize, dequantize, quantize
from parallel.fsdp import DTYPES

PREFIX = "model."  # of the model's tensors in a checkpoint
MEMBER_NAME = re.compile(r"[A-Za-z0-9_-]+")
LISTED_CHARACTERS = 200
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class SavedAdapter:
    """What was trained beside or inside a base, alone or one of several."""

    where: str
    model: ModelConfig
    """The base's."""
    config: AdapterConfig
    reader: Reader
    """Of the trained parameters; several adapters are read one by one, see `of`."""
    names: tuple[str, ...]
    base: str
    """The folder that the base lies in; empty where it is drawn or unknown."""
    quantization: str = "none"
    """Format that its base was held in while it was trained."""
    notes: tuple[str, ...] = ()
    """What the user should hear, such as newer checkpoints that could not be proved."""

    def of(self, member: str) -> "SavedAdapter":
        """Choose one of several; empty for a lone one. Raises ConfigError for a name that is none of theirs."""
        members = {each.name: each for each in self.config.members}
        if not members and not member:
            return self
        if member not in members:
            held = f"holds {', '.join(members)}" if members else "holds one adapter, which has no name"
            raise ConfigError(problem("--member", member, f"{self.where} {held}", do="Choose one." if members else ""))
        parts = {name: split_member(name, members) for name in self.names}
        stored = {plain: name for name, (plain, owner) in parts.items() if owner in ("", member)}
        return replace(
            self,
            config=adapter_of(self.config, members[member]),
            reader=_Renamed(self.reader, stored),
            names=tuple(stored),
        )

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Read each trained parameter once."""
        for name in self.names:
            yield name, self.reader.read(name)


@dataclass(frozen=True)
class SavedModel:
    """An opened model: `tokenizer` is the file to read text with, if one lies with the weights."""

    where: str
    config: ModelConfig
    reader: Reader
    """Of the model; of its base where there is an adapter."""
    dtype: torch.dtype
    """The format it was computed in, if a checkpoint; the stored one, if a Hugging Face folder."""
    tokenizer: Path | None
    notes: tuple[str, ...] = ()
    """What the user should hear, such as newer checkpoints that could not be proved."""
    adapter: SavedAdapter | None = None

    @property
    def merged_config(self) -> ModelConfig:
        """The config of the model that `tensors` gives."""
        return self.config if self.adapter is None else merged_config(self.config, self.adapter.config)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Read each parameter once, in the model's order, the adapter merged into it; what it adds to is fp32 then."""
        if self.adapter is not None:
            yield from merged_tensors(self.config, self.adapter.config, self.reader, self.adapter.reader)
            return
        for name in parameter_shapes(self.config):
            yield name, self.reader.read(name)


class _Renamed:
    """Tensors of another reader under other names."""

    def __init__(self, reader: Reader, stored: dict[str, str]) -> None:
        self._reader, self._stored = reader, stored

    def shape(self, name: str) -> tuple[int, ...]:
        return self._reader.shape(self._stored[name])

    def read(self, name: str, slices: Sequence[slice] | None = None) -> torch.Tensor:
        return self._reader.read(self._stored[name], slices)


class _CheckpointWeights:
    """A checkpoint's model tensors, by the names that the model gives them."""

    def __init__(self, checkpoint: CheckpointReader) -> None:
        self.checkpoint = checkpoint

    def shape(self, name: str) -> tuple[int, ...]:
        return self.checkpoint.shape(PREFIX + name)

    def read(self, name: str, slices: Sequence[slice] | None = None) -> torch.Tensor:
        return self.checkpoint.read(PREFIX + name, tuple(slices) if slices else None)


class _RunBase:
    """The base that a run of an adapter computes with: as it is stored, drawn, or as its codes say, in fp32."""

    def __init__(self, run: Config) -> None:
        self._run, self._shapes = run, parameter_shapes(run.model)
        self._dtype = DTYPES[run.precision.compute]  # in which a run holds what is frozen
        self._folder = HfWeights(run.model.init_from) if run.model.init_from else None
        self._projections = {f"{name}.weight" for name in projections(run.model)}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, slices: Sequence[slice] | None = None) -> torch.Tensor:
        kind, whole = self._run.adapter.quantization, self._stored(name)
        if name in self._projections and can_quantize(kind, *whole.shape):
            precise = torch.promote_types(self._dtype, torch.float32)
            whole = dequantize(kind, quantize(kind, whole.to(self._dtype), name), precise)
        return whole[tuple(slices)].clone() if slices else whole

    def _stored(self, name: str) -> torch.Tensor:
        if self._folder is not None:
            return self._folder.read(name)
        drawn = torch.empty(self._shapes[name], dtype=self._dtype)
        fill_local(drawn, self._run.model, self._run.run.seed, name, drawn.shape, [0] * drawn.dim())
        return drawn


# -------------------- opening


def open_model(
    path: str | Path,
    *,
    step: int | None = None,
    best: bool = False,
    base: Path | None = None,
    adapter: Path | None = None,
    member: str = "",
    use_adapter: bool = True,
) -> SavedModel:
    """Open a run folder (its newest good checkpoint, or `step`, or the best), a checkpoint, or a folder of a model.

    The folder may be Hugging Face's, or PEFT's: then its base is `base`, or the folder that it names. An `adapter` of
    PEFT's goes beside a model. A run of an adapter has its base in model.init_from, unless it has moved to `base`; of
    several adapters `member` is taken. Without use_adapter the base is opened alone, or with `adapter` beside it.
    Raises CheckpointError where a folder is none of these or can't be proved.
    """
    path = _existing(path)
    if (path / CONFIG).is_file():
        saved = _open_peft(path, step, best, base)
    elif (path / "config.json").is_file():
        saved = _open_hf(path, step, best)
    else:
        saved = _open_checkpoint(path, step, best, base)
    if adapter is not None and saved.adapter is not None and use_adapter:
        expected = f"{saved.where} has an adapter already"
        raise ConfigError(problem("--adapter", str(adapter), expected, do="Merge that first."))
    if saved.adapter is None:
        given = {"--base": base, "--member": member, "--no-adapter": not use_adapter}
        odd = [problem(name, "", f"{saved.where} has no adapter") for name, value in given.items() if value]
        if odd:
            raise ConfigError(odd)
    else:
        saved = replace(saved, adapter=saved.adapter.of(member) if use_adapter else None)
    return saved if adapter is None else replace(saved, adapter=_beside(saved, adapter))


def open_adapter(path: str | Path, *, step: int | None = None, best: bool = False) -> SavedAdapter | None:
    """Open what a run has trained beside or inside a frozen base, without the base; None where it trained everything.

    Raises CheckpointError as open_model does.
    """
    path = _existing(path)
    if (path / "config.json").is_file():
        return None
    return _adapter_of_checkpoint(*_read_checkpoint(path, step, best))


def load_model(saved: SavedModel, device: torch.device, dtype: torch.dtype, *, merged: bool = False) -> Llama:
    """Build the model and fill it tensor by tensor, so that nothing but the model itself takes memory.

    The adapter stays beside the base, or is `merged` into it.
    """
    adapter = None if merged else saved.adapter
    config = saved.merged_config if merged else saved.config
    with torch.device("meta"):
        model = Llama(config)
        if adapter is not None:
            attach(model, replace(adapter.config, dropout=0.0))
        model.to(dtype)
    model.to_empty(device=device)
    if config.tie_embeddings:  # to_empty gives each name memory of its own
        model.lm_head.weight = model.embed_tokens.weight
    parameters = dict(model.named_parameters())
    base = replace(saved, adapter=None) if adapter is not None else saved
    with torch.no_grad():
        for name, tensor in base.tensors():
            parameters[name].copy_(tensor)
        for name, tensor in adapter.tensors() if adapter is not None else ():
            parameters[name].copy_(tensor)
    return model.eval()


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not os.path.isdir(path):  # False for a name that no path can have, where pathlib raises
        expected = "no such folder"
        do = "Give a run (runs/NAME), a checkpoint or a Hugging Face folder."
        raise CheckpointError(problem(str(path), "", expected, do=do))
    return path


def _open_hf(path: Path, step: int | None, best: bool) -> SavedModel:
    _refuse_steps(path, step, best, "Hugging Face")
    weights = HfWeights(path)
    weights.check()
    check_weights(path)
    dtype = weights.read("norm.weight").dtype
    return SavedModel(str(path), weights.config, weights, dtype, find_tokenizer(path))


def _open_peft(path: Path, step: int | None, best: bool, base: Path | None) -> SavedModel:
    _refuse_steps(path, step, best, "PEFT")
    named = read_raw(path).get("base_model_name_or_path")
    if base is None and not (isinstance(named, str) and os.path.isfile(os.path.join(named, "config.json"))):
        expected = f"its base {str(named)[:LISTED_CHARACTERS]!r} is no folder here" if named else "names no base"
        raise CheckpointError(problem(str(path), "", expected, do="Give --base HF_FOLDER."))
    saved = _open_hf(_existing(base or str(named)), None, best=False)
    tokenizer = find_tokenizer(path) or saved.tokenizer
    return replace(saved, where=str(path), tokenizer=tokenizer, adapter=_beside(saved, path))


def _beside(saved: SavedModel, folder: Path) -> SavedAdapter:
    """Open an adapter of PEFT's for a model."""
    weights = AdapterWeights(folder, saved.config)
    check_weights(folder)
    weights.check(base=saved.reader)
    return SavedAdapter(str(folder), saved.config, weights.config, weights, tuple(weights.names()), saved.where)


def _refuse_steps(path: Path, step: int | None, best: bool, whose: str) -> None:
    if step is not None or best:
        raise CheckpointError(
            problem(str(path), "", f"is a {whose} folder, which has no steps to choose from", do="Leave that out.")
        )


def _read_checkpoint(path: Path, step: int | None, best: bool) -> tuple[CheckpointReader, Config]:
    """Prove a checkpoint and hold its tensors against what its own config trains."""
    if (path / WEIGHTS).exists():  # a folder of PEFT's that has lost its JSON, or where a run is needed
        read_raw(path)
        do = "Give the run that it was exported from."
        raise CheckpointError(problem(str(path), "", "is a folder of PEFT's, and a run is needed here", do=do))
    checkpoint = open_checkpoint(path, step=step, best=best, weights_only=True)
    described = checkpoint.meta.get("config")
    if not isinstance(described, dict):
        do = "Take a checkpoint that a run has made."
        raise CheckpointError(problem(f"{checkpoint.path}: config", "", "is missing", do=do))
    run = config_from_dict(described, str(checkpoint.path))
    for member in run.adapter.members:
        if not MEMBER_NAME.fullmatch(member.name):  # a folder will bear it
            raise CheckpointError(problem(f"{checkpoint.path}: member", member.name, "must be a plain name"))
    stored = {name.removeprefix(PREFIX): checkpoint.shape(name) for name in checkpoint.names(PREFIX)}
    if run.model.tie_embeddings:
        stored.pop("lm_head.weight", None)
    if stored != trained_shapes(run.model, run.adapter):
        expected = "its tensors are not those of the model that its config describes"
        raise CheckpointError(problem(str(checkpoint.path), "", expected, do="Take another step."))
    return checkpoint, run


def _adapter_of_checkpoint(checkpoint: CheckpointReader, run: Config) -> SavedAdapter | None:
    if run.adapter.kind == "none":
        return None
    return SavedAdapter(
        where=str(checkpoint.path),
        model=replace(run.model, init_from=""),
        config=replace(run.adapter, init_from="", quantization="none"),
        reader=_CheckpointWeights(checkpoint),
        names=tuple(trained_shapes(run.model, run.adapter)),
        base=run.model.init_from,
        quantization=run.adapter.quantization,
        notes=tuple(checkpoint.refused),
    )


def _open_checkpoint(path: Path, step: int | None, best: bool, base: Path | None) -> SavedModel:
    checkpoint, run = _read_checkpoint(path, step, best)
    adapter = _adapter_of_checkpoint(checkpoint, run)
    reader: Reader = _CheckpointWeights(checkpoint)
    if adapter is not None:
        run = replace(run, model=replace(run.model, init_from=str(base))) if base is not None else run
        check_base(checkpoint.meta, base_identity(run), str(checkpoint.path))
        reader = _RunBase(run)
    folder = checkpoint.tokenizer_dir
    return SavedModel(
        where=str(checkpoint.path),
        config=replace(run.model, init_from=""),
        reader=reader,
        dtype=DTYPES[run.precision.compute],
        tokenizer=find_tokenizer(folder) if folder else None,
        notes=tuple(checkpoint.refused),
        adapter=adapter,
    )


def find_tokenizer(folder: Path) -> Path | None:
    """Give the folder's tokenizer file: tokenizer.json before tokenizer.model before any other .model."""
    named = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return next(iter([*named, *sorted(folder.glob("*.model"))]), None)
