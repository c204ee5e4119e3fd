"""Host memory of a rank that computes on CPUs: freed blocks are kept for the next step, in huge pages.

glibc hands every large block that is freed back to the kernel, which then has to find and clear new pages for the next
one: page faults are a visible part of a small step (docs/performance.md). The price is that memory once used stays with
the process, which a training does anyway at its peak.
"""

import ctypes
import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_NEVER = 2**31 - 1
_AT_ONCE = 64 << 20


def use_huge_pages(environment: MutableMapping[str, str]) -> None:
    """Ask torch for huge pages under large CPU tensors; must come before torch is imported. A user's choice stays."""
    environment.setdefault("THP_MEM_ALLOC_ENABLE", "1")


@contextmanager
def huge_pages_for_children() -> Iterator[None]:
    """Start processes in this block, and they get huge pages as a run does."""
    before = dict(os.environ)
    use_huge_pages(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def keep_freed_memory() -> bool:
    """Tell malloc to keep what is freed; False where malloc is not glibc's and has no such switch."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_TOP_PAD, _AT_ONCE))
    return all([mallopt(name, value) for name, value in settings])
