"""What most tests of faults start from: a workplace of their module's own, and the run that nobody disturbed."""

from pathlib import Path

import pytest

from tests.runs import make_workplace, run_to_end


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store and tiny.toml; runs are told apart by their names."""
    return make_workplace(tmp_path_factory.mktemp("workplace"))


@pytest.fixture(scope="module")
def whole(workplace: Path) -> Path:
    """The folder of the run that nobody disturbed, on two ranks."""
    code, output = run_to_end(workplace, 2, "--run.name", "whole")
    assert code == 0, output
    return workplace / "runs" / "whole"
