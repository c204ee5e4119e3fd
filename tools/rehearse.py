"""A chaos run: the same training undisturbed, under injected faults, and under kills; all three must end alike.

    python tools/rehearse.py [CONFIG] [--ranks 2] [--faults 30] [--kills 50] [--seed 0] [--out FOLDER] [--json]
                             [--section.field VALUE ...]

faults: `[fault.inject] kind = "random"` under torchrun, which starts the ranks again after each; what exits 0 (a stop)
is started again by this tool, and counted. kills: torchrun and all below it by SIGKILL, at drawn moments of steps and
saves, saves in the background and blocking ones in turns. Exits 1 unless every tensor of the last checkpoints and every
line of metrics.jsonl are bit for bit those of the undisturbed run. Without CONFIG a tiny model is trained on Python's
own library.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from configs.errors import INTERRUPTED, RunError
from engine.fault.plan import plan_faults
from engine.fault.record import read_lines
from tools import torchrun
from tools.restarted import POLL_S, Rehearsal, Training, differences

CONFIG = """
[run]
steps = 500
threads = 1
[model]
vocab_size = 512
dim = 32
num_layers = 2
num_heads = 4
num_kv_heads = 2
ffn_dim = 64
[data]
seq_len = 64
global_batch_size = 8
[[data.stores]]
path = "STORE"
sources = ["python-stdlib"]
train_tokenizer = 512
max_bytes = 500_000
[optim]
lr = 3e-3
[lr]
warmup_steps = 10
[checkpoint]
every_steps = 5
[metrics]
every_steps = 1
tensorboard = false
gemm_seconds = 0.05
[eval]
every_steps = 100
max_sequences = 8
[fault]
hang_min_s = 8.0
"""
STEP_S, SAVE_S = 0.1, 0.02
"""A moment within a step or a save is drawn from so many seconds; finding all processes takes about as long again."""
HARMLESS = ("straggle", "slow_disk", "disk_full", "read_only_disk")
"""Faults that end no start of the run."""


def main(argv: Sequence[str]) -> int:
    """Rehearse; return 0 when all ends are the same."""
    parser = argparse.ArgumentParser(
        prog="tools/rehearse.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ranks", type=int, default=2, choices=range(1, 65), metavar="N", help="processes (2)")
    parser.add_argument("--faults", type=int, default=30, help="injected faults; 0 leaves that training out")
    parser.add_argument("--kinds", default="", help="of these, as kill,sigterm; default: all that change no weights")
    parser.add_argument("--kills", type=int, default=50, help="kills of the whole process tree; 0 leaves them out")
    parser.add_argument("--seed", type=int, default=0, help="draws faults, moments and places (0)")
    parser.add_argument("--out", type=Path, help="a new folder for runs and store; default: a temporary one, removed")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object, all else to stderr")
    # What has no dash can only be the config, and only in front: a field's value has none either.
    named = argv[0] if argv and not argv[0].startswith("-") else ""
    given, overrides = parser.parse_known_args(argv[1:] if named else argv)
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as temporary:
        out = given.out or Path(temporary)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--out {out}: {error.strerror}")
        config = Path(named) if named else out / "rehearsal.toml"
        if not named:
            config.write_text(CONFIG.replace("STORE", str(out / "store")))
        shown = sys.stderr if given.json else sys.stdout
        try:
            rehearsal = Rehearsal(config=config, overrides=overrides, ranks=given.ranks, seed=given.seed, out=out)
            chaos = inject_options(given.faults, given.kinds, given.seed) if given.faults else []
            with torchrun.interrupted_by_signals():
                result = rehearse(rehearsal, chaos, given.kills, lambda text: print(text, file=shown, flush=True))
        except RunError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            return INTERRUPTED
    if given.json:
        print(json.dumps(result))
    return 0 if result["identical"] else 1


def inject_options(faults: int, kinds: str, seed: int) -> list[str]:
    """Return the command line that has so many faults injected."""
    options = ["--fault.inject.kind", "random", "--fault.inject.count", str(faults), "--fault.inject.seed", str(seed)]
    options += ["--fault.inject.seconds", "0.2"]
    return [*options, "--fault.inject.kinds", json.dumps(kinds.split(","))] if kinds else options


def rehearse(rehearsal: Rehearsal, chaos: list[str], kills: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Train three times and compare; return what happened as JSON. `chaos` are options that inject faults, or none."""
    config = rehearsal.resolved(*chaos)
    rehearsal.steps = config.run.steps
    say(f"{rehearsal.steps} steps on {rehearsal.ranks} ranks, undisturbed")
    with Training(rehearsal, "whole") as whole:
        whole.to_end()
    say(f"done in {whole.wall_s:.1f} s, goodput {whole.goodput():.3f}")
    result: dict[str, Any] = {"ranks": rehearsal.ranks, "steps": rehearsal.steps, "seed": rehearsal.seed}
    result["undisturbed"] = {"wall_s": whole.wall_s, "goodput": whole.goodput()}
    identical = True
    if chaos:
        planned = len(plan_faults(config.fault.inject, rehearsal.steps, rehearsal.ranks))
        say(f"\n{planned} injected faults, seed {rehearsal.seed}")
        with Training(rehearsal, "faults") as training:
            training.to_end(*chaos, max_restarts=2 * planned)
            events = struck(training)
        result["faults"] = report(training, events, whole, say)
        if len(events) < planned:
            say(f"only {len(events)} of {planned} faults struck")
        identical &= result["faults"]["identical"] and len(events) == planned
    if kills:
        say(f"\n{kills} kills of torchrun and all below it, seed {rehearsal.seed}")
        with Training(rehearsal, "kills") as training:
            events = kill(training, kills, say)
        result["kills"] = report(training, events, whole, say)
        identical &= result["kills"]["identical"] and len(events) == kills
    return result | {"identical": identical}


def struck(training: Training) -> list[dict[str, Any]]:
    """Return the injected faults of a finished training, in the order of time, with what each cost."""
    events = []
    for entry in sorted(read_lines(training.folder / "injected.jsonl"), key=lambda entry: entry["time"]):
        lost, back_s = (0, None) if entry["kind"] in HARMLESS else training.after(entry["time"])
        where = f"rank {entry['rank']}"
        events.append({"kind": entry["kind"], "where": where, "step": entry["step"], "lost": lost, "back_s": back_s})
    return events


def kill(training: Training, kills: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Kill all processes at drawn moments, every other time in a save; then let the training come to its end."""
    draw, steps, moments = random.Random(training.rehearsal.seed), training.rehearsal.steps, []
    began = time.monotonic()
    for number in range(kills):
        known = len(training.began())
        process = training.start("--checkpoint.asynchronous", str(number % 4 < 2).lower())
        while process.poll() is None and len(training.began()) == known:
            time.sleep(POLL_S)
        # As far that the kills to come have steps left: about as many each.
        first = training.began()[-1]["from_step"]
        target = first + draw.randint(1, max(1, 3 * (steps - first) // (2 * (kills - number + 1))))
        saving = number % 2 == 0
        while process.poll() is None and not (training.look() >= target and (not saving or _saving(training))):
            time.sleep(POLL_S)
        time.sleep(draw.uniform(0, SAVE_S if saving else STEP_S))
        training.look()
        if process.poll() is not None:
            say(f"kill {number + 1}: too late, the training has ended")
            break
        moments.append((time.time(), training.look()))
        torchrun.end(process)
        moments[-1] += ("in a save" if _saving(training) else "in a step",)
    training.wall_s = time.monotonic() - began
    training.to_end()
    costs = [training.after(moment) for moment, _, _ in moments]
    return [
        {"kind": "SIGKILL", "where": where, "step": step, "lost": lost, "back_s": back_s}
        for (_, step, where), (lost, back_s) in zip(moments, costs, strict=True)
    ]


def _saving(training: Training) -> bool:
    return any((training.folder / "checkpoints").glob(".tmp-step-*"))


def report(
    training: Training, events: list[dict[str, Any]], whole: Training, say: Callable[[str], None]
) -> dict[str, Any]:
    """Print what happened and compare the end with the undisturbed run's."""
    say("   #  fault                   where       step  steps lost  back after")
    for number, event in enumerate(events, start=1):
        back = "-" if event["back_s"] is None else f"{event['back_s']:.1f} s"
        say(f"{number:4d}  {event['kind']:22s}  {event['where']:9s} {event['step']:6d} {event['lost']:11d} {back:>11s}")
    found = differences(training.folder, whole.folder)
    lost, restarts = training.lost_steps(), len(training.began())
    say(
        f"{len(events)} faults; {restarts} starts, of which this tool made {training.starts} and torchrun the others; "
        f"{lost} steps lost of {training.rehearsal.steps}; {training.wall_s:.1f} s, goodput {training.goodput():.3f}"
    )
    for text in found[:10]:
        say(f"differs: {text}")
    if not found:
        say(
            "every tensor of the last checkpoint and every line of metrics.jsonl as in the undisturbed run, bit for bit"
        )
    return {
        "count": len(events),
        "events": events,
        "starts": restarts,
        "starts_by_tool": training.starts,
        "lost_steps": lost,
        "wall_s": training.wall_s,
        "goodput": training.goodput(),
        "identical": not found,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
