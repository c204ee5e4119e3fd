"""From a base to its adapter and back: adapt the quickstart's model by LoRA, and show what that changed.

    python tools/lora_quickstart.py [--section.field VALUE ...]

The base is the run of `make quickstart`, trained first where it is missing, and exported as a Hugging Face folder.
LoRA learns questions and answers about Python's standard library on two processes; the adapter is exported as PEFT
writes it, and merged. Every command is printed as a person would type it. Again: it reuses what is there. Interrupted:
it continues.
"""

import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from configs.check import resolve
from configs.errors import INTERRUPTED, CheckpointError, RunError, problem
from configs.load import config_from_dict, load_config
from configs.schema import Config, RunConfig
from engine.folder import RunFolder
from engine.saved_model import open_model
from tools import convert, generate, quickstart
from tools.evaluate import heldout_losses

CONFIG = Path("configs/lora-quickstart.toml")
QUESTION = "What does shutil.copyfile(src, dst) do?\n"
ANSWER_TOKENS = 40
SEQUENCES = 64
"""Held-out sequences of each store that are read."""


def main(argv: list[str]) -> int:
    """Do what is left to do, then report; return the exit code."""
    if argv in (["--help"], ["-h"]):
        print(f"{__doc__}\nEvery field: python launchers/train.py lora-quickstart --help")
        return 0
    try:
        config = resolve(load_config(CONFIG, argv), quickstart.RANKS)
        return _go(RunFolder(config.run), config, argv)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues", file=sys.stderr)
        return INTERRUPTED


def _go(folder: RunFolder, config: Config, argv: list[str]) -> int:
    """Take the steps one after the other, until one fails; return its exit code."""
    base = RunFolder(replace(config.run, name=quickstart.CONFIG.stem))
    base_folder = Path(config.model.init_from)
    adapter = base_folder.with_name(config.run.name)
    code = _train_base(base) or _export("export", base, base_folder) or _adapt(folder, config, argv)
    if code == 0:
        _compare(folder, base, config)
        code = _export("export", folder, adapter) or _export(
            "merge", folder, adapter.with_name(f"{adapter.name}-merged")
        )
    return code or _sample(folder)


def _train_base(base: RunFolder) -> int:
    """Train the quickstart's model unless that is done."""
    if base.resolved.is_file() and quickstart.is_trained(base, _config_of(base)):
        return 0
    print("the quickstart's model is the base, and is not trained yet: make quickstart\n", flush=True)
    folder = str(base.path.parent)
    return quickstart.main([] if folder == RunConfig(name="", steps=1).dir else ["--run.dir", folder])


def _export(command: str, source: RunFolder, out: Path) -> int:
    """Make a folder from a run's last checkpoint, unless it is there and of that checkpoint."""
    last = max(source.checkpoints.glob("step-*"), key=lambda path: path.name)
    if not out.is_dir():
        return _run(convert.main, "tools/convert.py", command, str(source.path), str(out))
    if out.stat().st_mtime < last.stat().st_mtime:
        do = f"Remove {out} and what was made from it."
        raise CheckpointError(problem(str(out), "", f"is older than {last}", "it was made from another run", do))
    print(f"{out} is there already; reusing it")
    return 0


def _adapt(folder: RunFolder, config: Config, argv: list[str]) -> int:
    if quickstart.is_trained(folder, config):
        print(f"{folder.path} is trained already; reusing it (remove the folder to train again)")
        return 0
    return quickstart.train(CONFIG, argv)


def _compare(folder: RunFolder, base: RunFolder, config: Config) -> None:
    """Print the held-out loss of the task and of the old corpus, without and with the adapter."""
    task, old = config.data.stores[0].path, _config_of(base).data.stores[0].path
    length = str(config.data.seq_len)
    words = ["--store", task, "--store", old, "--seq-len", length, "--max-sequences", str(SEQUENCES)]
    found = []
    for use_adapter in (False, True):
        _say("tools/evaluate.py", str(folder.path), *words, *([] if use_adapter else ["--no-adapter"]))
        saved = open_model(folder.path, use_adapter=use_adapter)
        found.append(heldout_losses(saved, [task, old], config.data.seq_len, SEQUENCES))
    before, after = found
    print(f"\nheld-out loss, nats a token{'':17s}base  with the adapter")
    for store, what in ((task, "answers, the new task"), (old, "Python sources, the old corpus")):
        print(f"  {what:38s}{before[store][1].loss:8.4f}  {after[store][1].loss:16.4f}")


def _sample(folder: RunFolder) -> int:
    """Ask the model the same question with and without the adapter."""
    words = [str(folder.path), "--prompt", QUESTION, "--greedy", "--max-new-tokens", str(ANSWER_TOKENS)]
    code = _run(generate.main, "tools/generate.py", *words)
    return code or _run(generate.main, "tools/generate.py", *words, "--no-adapter")


def _config_of(run: RunFolder) -> Config:
    return config_from_dict(json.loads(run.resolved.read_text()), str(run.resolved))


def _say(*words: str) -> None:
    print(f"\n{shlex.join([os.path.relpath(sys.executable), *words])}", flush=True)


def _run(tool: Callable[[list[str]], int], *words: str) -> int:
    """Do what one of the tools does, without waiting for torch once more; return its exit code."""
    _say(*words)
    return tool(list(words[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
