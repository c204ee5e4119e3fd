"""Freed host memory is kept: the kernel has no new pages to find for the next block."""

import os
import subprocess
import sys

import pytest

from launchers.allocator import huge_pages_for_children, use_huge_pages

# Faults of allocating and freeing 64 MiB twenty times, in a process of its own: the setting is for good.
COUNT_FAULTS = """
import resource, sys, torch
from launchers.allocator import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
for _ in range(10):  # the heap grows to its size
    torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(1 << 24)
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> tuple[bool, int]:
    done = subprocess.run([sys.executable, "-c", COUNT_FAULTS, mode], capture_output=True, text=True, check=True)
    kept, count = done.stdout.split()
    return kept == "1", int(count)


@pytest.mark.long
def test_freed_blocks_cost_no_page_faults_when_they_are_kept() -> None:
    kept, with_keeping = faults("keep")
    if not kept:
        pytest.skip("malloc here is not glibc's")
    _, without = faults("return")
    assert with_keeping < without / 4


def test_the_users_choice_of_pages_stays() -> None:
    chosen, unset = {"THP_MEM_ALLOC_ENABLE": "0"}, dict[str, str]()
    use_huge_pages(chosen)
    use_huge_pages(unset)
    assert (chosen, unset) == ({"THP_MEM_ALLOC_ENABLE": "0"}, {"THP_MEM_ALLOC_ENABLE": "1"})


def test_children_get_huge_pages_and_this_process_stays_as_it_was() -> None:
    before = dict(os.environ)
    with huge_pages_for_children():
        child = [sys.executable, "-c", "import os; print(os.environ['THP_MEM_ALLOC_ENABLE'])"]
        assert subprocess.run(child, capture_output=True, text=True, check=True).stdout == "1\n"
    assert dict(os.environ) == before
