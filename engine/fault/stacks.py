"""What a thread is doing, by the place in the code where it stands: at work, or waiting for other ranks.

Reads the text that faulthandler writes, which needs neither the GIL nor the good will of the process. Imports no torch.
"""

import linecache
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_ROOT = f"{Path(__file__).parents[2]}/"
_OF_TORCH = re.compile(r"/torch/distributed/(distributed_c10d|_functional_collectives|fsdp/.*/_fsdp_collectives)\.py$")
"""Everything in these files is on its way into or out of a collective."""
_WAITS = re.compile(
    r"wait\w*(\.default)?\(|\b(all_reduce|all_gather\w*|reduce_scatter\w*|all_to_all\w*|broadcast|barrier|send|recv|"
    r"batch_isend_irecv)\("
)
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.+)$', re.M)
_FATAL = re.compile(r"^Fatal Python error: (.+)$", re.M)


@dataclass(frozen=True, slots=True)
class Place:
    """A line of code that a thread stands at."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        """Write it as an editor finds it, ours from the checkout's root on."""
        return f"{self.file.removeprefix(_ROOT)}:{self.line} in {self.function}"

    @property
    def is_ours(self) -> bool:
        """Tell the project's own code from what it uses."""
        return self.file.startswith(_ROOT) and "/site-packages/" not in self.file


def describe(places: Sequence[Place]) -> str:
    """Write where a thread stands, innermost first: in which line of ours, and in what that called."""
    if not places:
        return ""
    ours = next((place for place in places if place.is_ours), places[0])
    inner = places[0]
    return str(ours) + (f" ({Path(inner.file).name}:{inner.line} in {inner.function})" if inner is not ours else "")


@cache
def passes_on(file: str) -> bool:
    """Tell whether a line in this file only carries out what a line further out asks for, as torch.ops does."""
    return "/torch/" in file and "/torch/distributed/" not in file


@cache
def waits_for_ranks(file: str, line: int) -> bool:
    """Tell whether a thread whose innermost line this is, but for those that pass on, waits for other ranks.

    Compiled code stands in a file of its own, whose lines name what they call. What C++ waits for under a line that
    names no collective is counted as work.
    """
    if _OF_TORCH.search(file):
        return True
    return not file.endswith("/threading.py") and _WAITS.search(linecache.getline(file, line)) is not None


def main_thread(text: str) -> list[Place]:
    """Return the main thread's places in faulthandler's text, innermost first; it comes last of all threads."""
    last = re.split(r"^(?:Thread|Current thread) .*$", text.rstrip(), flags=re.M)[-1]
    return _places(last)


def fatal_error(text: str) -> tuple[str, str]:
    """Return what faulthandler says a process died of and where that was; empty where it says nothing."""
    found = _FATAL.search(text)
    # The thread at fault is marked; where Python does not know which it was, there is no place.
    marked = re.search(r"^Current thread .*\n((?:  .*\n)*)", text, re.M)
    return found[1] if found else "", describe(_places(marked[1])) if found and marked else ""


def _places(text: str) -> list[Place]:
    return [Place(file, int(line), function) for file, line, function in _FRAME.findall(text)]
