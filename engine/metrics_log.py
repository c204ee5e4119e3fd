"""Where records are kept: metrics.jsonl, one strict JSON object a line, and TensorBoard event files.

metrics.jsonl is what tests, tools/report and people read: floats are written by repr, so a value read back has the
same bits, and a number that JSON has no word for (NaN, infinity) is null and named under "non_finite". A resumed run
cuts away what lies past its checkpoint, so a step stands in the file once, however often the run was killed.
"""

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.errors import DataError, RunError, problem
from engine.metrics import EvalRecord, Record

# TensorBoard groups charts by what stands before the slash. Fields that are not charts (step, time, kinds) are absent.
_CHARTS = {
    "loss": "train/loss",
    "perplexity": "train/perplexity",
    "grad_norm": "train/grad_norm",
    "lr": "train/lr",
    "num_tokens": "train/num_tokens",
    "tokens_per_s": "speed/tokens_per_s",
    "tflops_per_device": "speed/tflops_per_device",
    "mfu": "speed/mfu",
    "mfu_causal": "speed/mfu_causal",
    "gemm_share": "speed/gemm_share",
    "step_time_s": "time/step_time_s",
    "data_wait_s": "time/data_wait_s",
    "checkpoint_stall_s": "time/checkpoint_stall_s",
    "memory_gib": "memory/peak_gib",
    "goodput": "speed/goodput",
    "cp_imbalance": "speed/cp_imbalance",
    "heldout_loss": "heldout/loss",
    "heldout_perplexity": "heldout/perplexity",
    "bits_per_byte": "heldout/bits_per_byte",
}


def to_line(record: Record) -> str:
    """Write a record as one line of strict JSON, its line end included; non-finite numbers become null, named apart."""
    fields: dict[str, Any] = asdict(record)
    members: dict[str, dict[str, Any]] = fields.pop("members") or {}
    odd = _without_odd(fields)
    for name, of_member in members.items():
        odd |= {f"members.{name}.{key}": value for key, value in _without_odd(of_member).items()}
    if members:
        fields["members"] = members
    if odd:
        fields["non_finite"] = odd
    return json.dumps(fields, allow_nan=False) + "\n"


def _without_odd(fields: dict[str, Any]) -> dict[str, str]:
    """Replace non-finite numbers by None, in place, and return what they were."""
    odd = {name: repr(value) for name, value in fields.items() if isinstance(value, float) and not math.isfinite(value)}
    fields.update(dict.fromkeys(odd))
    return odd


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl, step and eval lines in file order; non-finite numbers come back as floats.

    A last line that a crash tore off is left out; a broken line before it raises DataError.
    """
    with path.open("rb") as file:
        lines = [line for line in file if line.endswith(b"\n")]
    entries = []
    for number, line in enumerate(lines, start=1):
        entry = _parse(line)
        if entry is None:
            raise DataError(
                problem(
                    f"{path}, line {number}",
                    line.decode(errors="replace")[:60],
                    "must be a JSON object with a step",
                    "only the last line can be torn by a crash",
                    "Remove the line, or the file.",
                )
            )
        for name, value in entry.pop("non_finite", {}).items():
            *of_member, key = name.split(".")  # no member's name has a dot
            (entry["members"][of_member[1]] if of_member else entry)[key] = float(value)
        entries.append(entry)
    return entries


def truncate_after(path: Path, step: int) -> int:
    """Remove the lines past `step` and any torn line, atomically; return how many were removed. No file is no error."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        lines = list(file)
    kept = []
    for line in lines:
        entry = _parse(line)
        if entry is not None and line.endswith(b"\n") and entry["step"] <= step:
            kept.append(line)
    if len(kept) == len(lines):
        return 0
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    return len(lines) - len(kept)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None


def _cannot_write(path: Path, error: OSError) -> RunError:
    return RunError(
        problem(f"{path}", error.strerror or str(error), "must be writable", do="Free space or set run.dir elsewhere.")
    )


class JsonLines:
    """Appends records to metrics.jsonl, each handed to the system when written."""

    def __init__(self, path: Path) -> None:
        """Open for appending; call truncate_after first when resuming."""
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise _cannot_write(path, error) from error

    def write(self, record: Record) -> None:
        """Append one line."""
        rest = to_line(record).encode("ascii")
        try:
            while (
                rest
            ):  # without a buffer a write may be partial, and a failed one leaves nothing to fail again at close
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise _cannot_write(self._path, error) from error

    def sync(self) -> None:
        """Wait until every line is on disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _cannot_write(self._path, error) from error

    def close(self) -> None:
        """Sync and close."""
        if not self._file.closed:
            with self._file:
                self.sync()


class TensorBoard:
    """Writes records as TensorBoard scalars (single precision; metrics.jsonl has every bit)."""

    def __init__(self, folder: Path, resumed_step: int | None = None) -> None:
        """Start an event file; after `resumed_step`, readers drop what earlier files hold past that step."""
        from torch.utils.tensorboard import SummaryWriter  # a second of imports that only this rank needs

        purge_step = None if resumed_step is None else resumed_step + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def write(self, record: Record) -> None:
        """Write each charted field at the record's step."""
        fields = asdict(record)
        for member, of_member in {"": fields, **(fields["members"] or {})}.items():
            for name, value in of_member.items():
                if name in _CHARTS and value is not None:
                    tag = f"{_CHARTS[name]}/{member}" if member else _CHARTS[name]
                    self._writer.add_scalar(tag, value, record.step, walltime=record.time)
        if isinstance(record, EvalRecord):
            self._writer.flush()

    def sync(self) -> None:
        """Flush the event file."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()
