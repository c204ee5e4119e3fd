"""Every error that a user can cause, as one tree.

    RunError                     exit code 1
    +-- ConfigError              exit code 2: all problems of a configuration at once
    +-- LayoutError              ranks, mesh, groups
    +-- DataError                token stores, corpora, tokenizers
    +-- CheckpointError          saving, proving and loading state
    +-- NonFiniteError           the loss or a gradient is not a number
    +-- ReplicaError             ranks that hold copies of something hold different ones
    +-- RankFailure              another rank is gone or silent

It lives in the lowest room because every room raises. A message has five parts: where, got, expected, why, do.
`raise` one of these for what a user can cause; `assert` with a message for what only a programmer can.
"""

from collections.abc import Sequence

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""


class RunError(Exception):
    """A run can't start or go on; the text is complete and a traceback adds nothing."""

    exit_code = 1


class ConfigError(RunError):
    """A configuration is wrong; `problems` lists everything that is wrong with it."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        """Join the problems into one message, one a line."""
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class LayoutError(RunError):
    """The ranks can't be arranged as asked."""


class DataError(RunError):
    """A corpus, token store or tokenizer is missing, broken or not the one expected."""


class CheckpointError(RunError):
    """A checkpoint can't be written, proved or loaded."""


class NonFiniteError(RunError):
    """The loss or a gradient became infinite or not a number."""


class ReplicaError(RunError):
    """What several ranks hold copies of is not the same on all of them."""


class RankFailure(RunError):
    """Another rank stopped answering."""


def problem(where: str, got: object, expected: str, why: str = "", do: str = "") -> str:
    """One message: `where = got: expected (why). do`; a part that is empty is left out."""
    value = f" = {got!r}" if not isinstance(got, str) or got else ""
    reason = f" ({why})" if why else ""
    return f"{where}{value}: {expected}{reason}." + (f" {do}" if do else "")
