"""What holds for all tests: few and repeatable examples for property tests, and no GPU test without a GPU.

Fixtures live beside the tests that use them; here is only what pytest itself must know.
"""

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
