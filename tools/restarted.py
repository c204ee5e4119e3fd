"""A training that is started again and again, watched and killed from outside: what tools/rehearse.py is made of.

Steps are read from metrics.jsonl as they appear, so that lost steps and the time to be back are measured from outside
of the engine and not taken from its word.
"""

import json
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from configs.check import resolve
from configs.errors import RunError, problem
from configs.load import load_config
from configs.schema import Config
from engine.checkpoint.checkpointer import open_checkpoint
from engine.checkpoint.manifest import list_steps
from engine.fault.record import read_lines
from engine.metrics_log import read_metrics
from tools import torchrun

POLL_S = 0.005
MAX_STUCK = 5
"""Starts in a row that end well and get nowhere."""
COMPARED = ("kind", "step", "loss", "grad_norm", "lr", "num_tokens", "heldout_loss", "bits_per_byte", "members")
"""What metrics.jsonl says of a step that must not depend on how often the run was killed."""


@dataclass(kw_only=True)
class Rehearsal:
    """What is rehearsed."""

    config: Path
    overrides: list[str]
    ranks: int
    seed: int
    out: Path
    steps: int = 0

    def argv(self, name: str, *more: str) -> list[str]:
        """Return the arguments of launchers/train.py for one of the trainings."""
        # Many faults between two checkpoints are the point here, and no sign of a crash loop.
        own = ["--run.dir", str(self.out), "--run.name", name, "--fault.max_fruitless_starts", "0"]
        return [str(self.config), *self.overrides, *own, *more]

    def resolved(self, *more: str) -> Config:
        """Load the config as the ranks will."""
        return resolve(load_config(self.config, self.argv("whole", *more)[1:]), self.ranks)


@dataclass
class Training:
    """One training, started as often as it takes; a context manager, so that no process outlives it."""

    rehearsal: Rehearsal
    name: str
    starts: int = 0
    """Starts by this tool; torchrun's own come on top."""
    wall_s: float = 0.0
    seen: list[tuple[float, int]] = field(default_factory=list)
    """When each step was first seen in metrics.jsonl, again after each restart."""
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.rehearsal.out / self.name

    @property
    def done(self) -> bool:
        """Say whether the last step has been saved."""
        return (self.folder / "checkpoints" / f"step-{self.rehearsal.steps:08d}").is_dir()

    def __enter__(self) -> "Training":
        """Use as `with Training(...) as training:`."""
        return self

    def __exit__(self, *error: object) -> None:
        """Leave no process behind."""
        if self.process is not None and self.process.poll() is None:
            torchrun.end(self.process)

    def start(self, *more: str, max_restarts: int = 0) -> "subprocess.Popen[bytes]":
        """Start torchrun; what it prints goes into a file."""
        self.starts += 1
        options = ("--max-restarts", str(max_restarts))
        command = torchrun.command_of(self.rehearsal.ranks, self.rehearsal.argv(self.name, *more), *options)
        with (self.rehearsal.out / f"output-{self.name}.txt").open("ab") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        return self.process

    def to_end(self, *more: str, max_restarts: int = 0) -> None:
        """Start it again until it is done; raise RunError when torchrun gives up."""
        began, stuck = time.monotonic(), 0
        while not self.done:
            before = self.newest()
            process = self.start(*more, max_restarts=max_restarts)
            while process.poll() is None:
                self.look()
                time.sleep(POLL_S)
            if process.returncode:
                raise RunError(
                    f"{self.name}: exit code {process.returncode}; see {self.rehearsal.out}/output-{self.name}.txt"
                )
            stuck = stuck + 1 if self.newest() == before else 0
            if stuck == MAX_STUCK:
                why = f"the last {stuck} starts ended with 0 and saved nothing newer"
                raise RunError(problem(self.name, "", f"stays at step {before}", why, "See fault.time_limit_s."))
        self.wall_s += time.monotonic() - began

    def newest(self) -> int:
        """Return the newest saved step."""
        return max(list_steps(self.folder / "checkpoints"), default=0)

    def look(self) -> int:
        """Return the newest step in metrics.jsonl, and note when it was seen first."""
        path = self.folder / "metrics.jsonl"
        try:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - 8192))
                line = file.read().rpartition(b"\n")[0].rpartition(b"\n")[2]
            step = int(json.loads(line)["step"])
        except (OSError, ValueError, KeyError):
            return self.seen[-1][1] if self.seen else 0
        if not self.seen or self.seen[-1][1] != step:
            self.seen.append((time.time(), step))
        return step

    def began(self) -> list[dict[str, Any]]:
        """Return the starts that got as far as to know from which step they go on."""
        return [entry for entry in read_lines(self.folder / "attempts.jsonl") if entry.get("event") == "start"]

    def after(self, moment: float) -> tuple[int, float | None]:
        """Return the steps that the first start after `moment` lost, and the seconds from it to a new step."""
        later = next((entry for entry in self.began() if entry["time"] > moment), None)
        if later is None:
            return 0, None
        before = [step for seen, step in self.seen if seen <= later["time"]]
        back = (seen for seen, step in self.seen if seen > later["time"] and step > later["from_step"])
        lost = max(0, before[-1] - later["from_step"]) if before else 0
        return lost, next((seen - moment for seen in back), None)

    def lost_steps(self) -> int:
        """Return the steps that all restarts lost."""
        return sum(self.after(entry["time"] - 1e-6)[0] for entry in self.began())

    def goodput(self) -> float:
        """Return the productive time over all the time since this tool first started it."""
        manifest = json.loads(
            (self.folder / "checkpoints" / f"step-{self.rehearsal.steps:08d}/manifest.json").read_text()
        )
        return manifest["meta"]["productive_s"] / self.wall_s


def differences(run: Path, whole: Path) -> list[str]:
    """Compare two finished runs, bit for bit: every line of metrics.jsonl, every tensor of the last checkpoint."""
    lines = [
        [{name: entry.get(name) for name in COMPARED} for entry in read_metrics(folder / "metrics.jsonl")]
        for folder in (run, whole)
    ]
    found = [f"metrics.jsonl: {len(lines[0])} lines and not {len(lines[1])}"] if len(lines[0]) != len(lines[1]) else []
    found += [f"metrics.jsonl: {ours} and not {theirs}" for ours, theirs in zip(*lines, strict=False) if ours != theirs]
    ours, theirs = open_checkpoint(run / "checkpoints"), open_checkpoint(whole / "checkpoints")
    if ours.step != theirs.step or ours.names("") != theirs.names(""):
        return [*found, f"the checkpoints are of steps {ours.step} and {theirs.step}, or have other tensors"]
    return found + [name for name in theirs.names("") if not torch.equal(ours.read(name), theirs.read(name))]
