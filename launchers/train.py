"""Train: `torchrun --nproc-per-node N launchers/train.py CONFIG [--section.field VALUE ...]`, or plain python for one
process. The same command again continues the run from its last checkpoint.

Reads the command line and the environment, hands over to launchers/rank.py, and turns errors that a user can cause into
one message and an exit code: 2 for a configuration, 1 for a failure, 130 for Ctrl-C. Nothing heavy is imported before
the config is known to be sound, so that a wrong one is refused at once.
"""

import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace

from configs.check import missing_files, resolve
from configs.cli import parse_command_line
from configs.errors import INTERRUPTED, ConfigError, RunError
from configs.load import find_config
from configs.schema import Config
from engine.fault.stop import INTERRUPT, StopRequests
from engine.folder import RunFolder
from launchers.allocator import use_huge_pages
from launchers.env import Launch, read_launch
from launchers.redaction import redactor

TURN_S = 5.0
"""How long a rank leaves the word to those before it."""


def main(argv: Sequence[str]) -> int:
    """Run the command line; return the exit code."""
    began = time.monotonic()
    launch: Launch | None = None
    requests = StopRequests()
    failed: RunError | None = None
    stopped_by = 0
    with requests.installed():
        try:
            launch = read_launch(os.environ)
            path, config = parse_command_line(list(argv), "launchers/train.py")
            config = resolve(config, launch.world_size)
            problems = missing_files(_as_needed_now(config))
            if problems:
                raise ConfigError(problems)
            use_huge_pages(os.environ)
            os.umask(0o077 if config.run.private else 0o027)
            from launchers.rank import run_rank  # imports torch

            stopped_by = run_rank(config, find_config(path).read_text(), launch, requests, began)
        except RunError as error:
            failed = error
        except BaseException:
            if not requests.interrupted:
                raise
    if requests.interrupted:
        return INTERRUPTED
    if failed is not None:
        # A rank that torchrun has told to end leaves the word to the one that failed first.
        return failed.exit_code if requests.code and launch and launch.rank else _report(failed, launch)
    # A person who presses Ctrl-C wants what comes after the command to be left out; a scheduler wants to hear success.
    return INTERRUPTED if stopped_by == INTERRUPT else 0


def _as_needed_now(config: Config) -> Config:
    """Leave out what only the first start of a run reads."""
    if not RunFolder(config.run).has_checkpoints():
        return config
    if config.adapter.kind == "none":
        return replace(config, model=replace(config.model, init_from=""))
    # A checkpoint holds what was trained; its base is read at every start.
    return replace(config, adapter=replace(config.adapter, init_from=""))


def _report(error: RunError, launch: Launch | None) -> int:
    """Say once what all ranks found, and by name what one found.

    Rank 0 speaks at once, and torchrun ends the others when it has left; who is still there after its turn has found
    something of its own.
    """
    prefix = ""
    if launch is not None and launch.rank > 0:
        time.sleep(TURN_S if launch.local_rank == 0 else 2 * TURN_S)
        prefix = f"rank {launch.rank}: "
    sys.stderr.write(redactor(os.environ)(f"{prefix}error: {error}\n"))
    return error.exit_code


def _leave(code: int) -> None:
    """End the process now: all state is on disk, and the threads of torch's libraries have no order of ending."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    try:
        _leave(main(sys.argv[1:]))
    except KeyboardInterrupt:
        _leave(INTERRUPTED)
    except Exception as error:
        sys.stderr.write(redactor(os.environ)("".join(traceback.format_exception(error))))
        _leave(1)
