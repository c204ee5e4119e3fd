"""The table of refused combinations: each row refuses its example and nothing else, and the docs hold the same rows."""

from pathlib import Path

import pytest

from configs.check import resolve
from configs.errors import ConfigError
from configs.load import load_config
from configs.refusals import REFUSALS, Refusal

DOCS = Path(__file__).parents[3] / "docs" / "layouts.md"
RANKS = 4


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: row.what)
def test_each_row_refuses_its_example_by_name(row: Refusal, file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(load_config(file, row.example.split()), RANKS)
    assert caught.value.problems == [f"{row.what}: is refused ({row.why}). {row.do}"]


def test_the_docs_hold_the_same_table() -> None:
    lines = [line for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    table = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    rows = [cells for cells in table if len(cells) == 3 and any(cells[0] == f"`{row.what}`" for row in REFUSALS)]
    assert rows == [[f"`{row.what}`", row.why, row.do] for row in REFUSALS]
