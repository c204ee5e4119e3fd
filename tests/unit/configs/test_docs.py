"""docs/configuration.md against the code: the fixed fields, and the errors that it shows."""

import re
import shlex
from pathlib import Path

import pytest

from configs.check import resolve
from configs.cli import parse_command_line
from configs.errors import ConfigError
from configs.fields import walk
from configs.schema import Config

PAGE = (Path(__file__).parents[3] / "docs" / "configuration.md").read_text()


def fixed_fields() -> str:
    """Write the list that the page must hold."""
    sections: dict[str, list[str]] = {}
    for leaf in walk(Config):
        if leaf.fixed:
            section, _, name = leaf.key.partition(".")
            sections.setdefault(section, []).append(f"`{name}`")
    return "".join(f"- `{section}`: {', '.join(names)}\n" for section, names in sections.items())


def shown_errors() -> list[tuple[str, list[str]]]:
    """Find each command of the page with the lines shown below it."""
    found = re.findall(r"^    \$ (.+)\n((?:    (?!\$).+\n)+)", PAGE, re.M)
    return [(command, [line.strip() for line in shown.splitlines()]) for command, shown in found]


def test_the_fixed_fields_are_the_schemas() -> None:
    held = re.search(r"<!-- fixed fields.*?-->\n(.*?)<!-- end -->", PAGE, re.S)
    assert held is not None
    assert held[1] == fixed_fields()


@pytest.mark.parametrize(("command", "shown"), shown_errors())
def test_the_errors_shown_are_those_printed(command: str, shown: list[str]) -> None:
    program, script, *argv = shlex.split(command)
    assert (program, script) == ("python", "launchers/train.py")
    with pytest.raises(ConfigError) as caught:
        resolve(parse_command_line(argv, script)[1], 1)
    assert caught.value.problems == shown


def test_the_page_shows_errors_of_types_of_values_and_of_names() -> None:
    assert len(shown_errors()) == 3
