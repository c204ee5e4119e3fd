"""What holds for all tests: few and repeatable examples for property tests, and no GPU test without a GPU.

Fixtures live beside the tests that use them; here is only what pytest itself must know.
"""

from collections import Counter
from pathlib import PurePath

import hypothesis
import pytest
import torch

# No deadline: the first example of a property often pays for an import. Derandomised: a red test stays red.
hypothesis.settings.register_profile("ropewalk", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("ropewalk")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` on a machine without one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests of each folder passed, by file: a folder that is left out shows in the log."""
    passed = [report for report in terminalreporter.stats.get("passed", []) if report.when == "call"]
    files = Counter(PurePath(report.nodeid.split("::")[0]) for report in passed)
    folders = sorted({file.parent for file in files})
    for folder in folders:
        counts = {
            file.stem.removeprefix("test_"): count for file, count in sorted(files.items()) if file.parent == folder
        }
        of_files = ", ".join(f"{name} {count}" for name, count in counts.items())
        terminalreporter.write_line(f"{folder}: {sum(counts.values())} passed ({of_files})")
