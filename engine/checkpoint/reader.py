"""Reading a checkpoint's tensors in one process: for tools/convert.py and tools/generate.py.

A folder is proved before anything is read from it, then single tensors or slices of them are assembled from the chunks
that overlap, wherever ranks have put them. No process group, no model, nothing written: a live run's folder is safe.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from configs.errors import CheckpointError, problem
from engine.checkpoint.manifest import (
    MANIFEST,
    TOKENIZER,
    Manifest,
    TensorEntry,
    best_step,
    check_files,
    list_steps,
    parse_manifest,
    read_manifest,
    step_folder,
)
from engine.checkpoint.storage import DTYPES

RESTORE = "Restore it from a copy, or take another step."


class CheckpointReader:
    """A proved checkpoint folder."""

    def __init__(self, path: Path, manifest: Manifest, refused: list[str]) -> None:
        """Take a folder whose files agree with the manifest; `refused` are the newer ones that didn't."""
        self.path, self.manifest, self.refused = path, manifest, refused

    @property
    def step(self) -> int:
        """The step after which the state was saved."""
        return self.manifest.step

    @property
    def meta(self) -> dict[str, Any]:
        """What the run said of itself: config, layout, tokens, fingerprints, versions."""
        return self.manifest.meta

    @property
    def tokenizer_dir(self) -> Path | None:
        """The checkpoint's copy of the tokenizer, if it has one."""
        has_one = any(name.startswith(f"{TOKENIZER}/") for name in self.manifest.files)
        return self.path / TOKENIZER if has_one else None

    def names(self, prefix: str = "model.") -> list[str]:
        """Return the tensors' names that begin with `prefix`; an empty prefix gives the optimizer's too."""
        return sorted(name for name in self.manifest.tensors if name.startswith(prefix))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the whole shape of a tensor."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        entry = self._entry(name)
        if entry.dtype not in DTYPES:
            raise CheckpointError(problem(f"{self.path}: dtype of {name}", entry.dtype, f"one of {sorted(DTYPES)}"))
        return DTYPES[entry.dtype]

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> torch.Tensor:
        """Return a tensor, or the box of it that `slices` (step 1, one for each of the first dims) cuts out.

        Only the bytes of the box are read.
        """
        entry = self._entry(name)
        box = [range(size)[cut] for size, cut in zip(entry.shape, slices or (), strict=False)]
        box += [range(size) for size in entry.shape[len(box) :]]
        assert len(slices or ()) <= len(entry.shape) and all(r.step == 1 for r in box), f"slices {slices} of {name}"
        result = torch.empty([len(r) for r in box], dtype=self.dtype(name))
        for chunk in entry.chunks:
            source, target = [], []
            for wanted, begin, length in zip(box, chunk.offset, chunk.shape, strict=True):
                low, high = max(wanted.start, begin), min(wanted.stop, begin + length)
                source.append(slice(low - begin, high - begin))
                target.append(slice(low - wanted.start, high - wanted.start))
            if all(cut.start < cut.stop for cut in source):
                with safe_open(self.path / chunk.file, framework="pt") as file:
                    result[tuple(target)] = file.get_slice(name)[tuple(source)]
        return result

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.manifest.tensors:
            raise CheckpointError(problem(f"{self.path}: tensor", name, "not in this checkpoint"))
        return self.manifest.tensors[name]


def open_checkpoint(
    path: Path | str, *, step: int | None = None, best: bool = False, weights_only: bool = False
) -> CheckpointReader:
    """Prove a checkpoint and return its reader.

    `path` is a checkpoint folder, a run folder or its checkpoints/: of these the newest good one is taken, or exactly
    `step`, or the one with the best held-out loss. With weights_only the optimizer's files are neither proved nor read.
    Raises CheckpointError when there is none, or none that can be proved.
    """
    path = Path(path)
    if (path / MANIFEST).exists():
        return _prove(path, weights_only, [])
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = list_steps(folder)
    if not steps:
        raise CheckpointError(
            problem(
                str(path),
                "",
                f"no checkpoint here (no {MANIFEST}, no step-* folder)",
                do="Give a run or one of its checkpoints.",
            )
        )
    if step is not None:
        if step not in steps:
            held = ", ".join(str(s) for s in sorted(steps))
            raise CheckpointError(problem(f"{folder}: step", step, f"this run has checkpoints of steps {held}"))
        return _prove(folder / step_folder(step), weights_only, [])
    if best:
        chosen = best_step({number: _loss_of(folder / step_folder(number)) for number in steps})
        if chosen is None:
            raise CheckpointError(problem(str(folder), "", "no checkpoint here has a held-out loss, so none is best"))
        return _prove(folder / step_folder(chosen), weights_only, [])
    refused: list[str] = []
    for number in steps:
        try:
            return _prove(folder / step_folder(number), weights_only, refused)
        except CheckpointError as error:
            refused.append(str(error).removesuffix(f". {RESTORE}"))
    raise CheckpointError(
        "\n".join([f"{folder}: no checkpoint can be loaded:", *(f"  {line}" for line in refused), RESTORE])
    )


def _loss_of(path: Path) -> float | None:
    try:
        return parse_manifest(read_manifest(path), MANIFEST).heldout_loss
    except CheckpointError:
        return None


def _prove(path: Path, weights_only: bool, refused: list[str]) -> CheckpointReader:
    """The reader of a folder, or CheckpointError with all that is wrong with it."""
    try:
        manifest = parse_manifest(read_manifest(path), MANIFEST)
    except CheckpointError as error:
        raise CheckpointError(f"{path.name}: {error}. {RESTORE}") from None
    if path.name.startswith("step-") and path.name != step_folder(manifest.step):
        raise CheckpointError(f"{path.name}: {MANIFEST} is of step {manifest.step}: the folder was renamed. {RESTORE}")
    skipped = {
        chunk.file for name, e in manifest.tensors.items() if not name.startswith("model.") for chunk in e.chunks
    }
    names = [name for name in manifest.files if not (weights_only and name in skipped)]
    problems = check_files(path, manifest, names)
    if problems:
        raise CheckpointError(f"{path.name}: {'; '.join(problems)}. {RESTORE}")
    return CheckpointReader(path, manifest, refused)
