"""The command line of a run: `CONFIG [--section.field VALUE ...]`, and --help for every field.

Written here and not by tyro. Tried with 1.0.17: it turns an optional section into a subcommand, shows the fields of a
list of tables only when the list has entries, spells booleans as flags (--no-x) where TOML spells them true and false,
stops at the first kind of mistake, and can't say which fields a resumed run must keep. One grammar for the file and
the command line, load.py's, is worth more.
"""

import dataclasses
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

from configs.errors import ConfigError, problem
from configs.fields import INDEX, Leaf, default_of, docstrings, plain, section_of, type_name, walk
from configs.load import load_config, preset_names, toml_value
from configs.schema import Config


def parse_command_line(argv: list[str], prog: str) -> tuple[Path, Config]:
    """Read `CONFIG [--section.field VALUE ...]`; give the path as typed and the config, overrides applied.

    --help anywhere prints help and raises SystemExit(0). Raises ConfigError for everything else that is wrong.
    """
    given = [word for word in argv if word not in ("-h", "--help")]
    if len(given) < len(argv):
        sys.stdout.write(_help_of(given, prog))
        raise SystemExit(0)
    if not given or given[0].startswith("-"):
        usage = f"{prog} CONFIG [--section.field VALUE ...]"
        text = problem(prog, "", "the first argument must be a TOML file or the name of a preset", do=f"Write {usage}.")
        raise ConfigError(f"{text} Presets: {', '.join(preset_names())}.")
    return Path(given[0]), load_config(Path(given[0]), given[1:])


def help_text(prog: str, config: Config | None, width: int) -> str:
    """Describe every field by section: type, value in `config` or else the default, resume, docstring."""
    parts = [
        f"usage: {prog} CONFIG [--section.field VALUE ...]",
        _wrapped(f"CONFIG is a TOML file or the name of a preset: {', '.join(preset_names())}.", "", width),
        _wrapped(
            "Each option overrides one field of the file. VALUE is written as in TOML; text needs no quotes. "
            "A field marked 'fixed' must keep its value when a run is resumed; the others may change.",
            "",
            width,
        ),
    ]
    values = None if config is None else plain(config)
    for part in dataclasses.fields(Config):
        section = get_type_hints(Config)[part.name]
        title = _wrapped(f"[{part.name}] {section.__doc__}", "", width)
        parts.append("\n".join([title, *_options(section, part.name, values, width)]))
    return "\n\n".join(parts) + "\n"


def _help_of(given: list[str], prog: str) -> str:
    """Build the help that --help prints: with a config's values if one is given and sound."""
    width = min(max(shutil.get_terminal_size(fallback=(100, 24)).columns, 60), 120)
    if not given or given[0].startswith("-"):
        return help_text(prog, None, width)
    try:
        config = load_config(Path(given[0]), given[1:])
    except ConfigError as error:
        return f"{help_text(prog, None, width)}\nThe values above are the defaults, because of\n{error}\n"
    return f"{help_text(prog, config, width)}\nThe values above are those of {' '.join(given)}\n"


def _options(section: type, name: str, values: dict[str, Any] | None, width: int) -> Iterator[str]:
    for leaf in walk(section, f"{name}."):
        marks = [type_name(leaf.kind), _value_of(leaf, values), "fixed" if leaf.fixed else "may change"]
        yield _wrapped(f"--{leaf.key}  ({'; '.join(mark for mark in marks if mark)})", "  ", width)
        doc = docstrings(leaf.owner)[leaf.field.name]
        table, is_list = section_of(leaf.kind)
        if table is not None:
            below = f"--{leaf.key}.{INDEX}.*, counted from 0" if is_list else f"--{leaf.key}.*, or none"
            doc = f"{doc} As a whole a TOML value, or field by field: {below}."
        yield _wrapped(doc, "      ", width)


def _value_of(leaf: Leaf, values: dict[str, Any] | None) -> str:
    """Say what the field is without an override; empty where the table around it says so."""
    if values is None or INDEX in leaf.key.split("."):
        default = default_of(leaf.field)
        return "required" if default is dataclasses.MISSING else f"default {_written(default)}"
    node: Any = values
    for name in leaf.key.split("."):
        if node is None:  # inside a table that this config doesn't have
            return f"default {_written(default_of(leaf.field))}"
        node = node[name]
    return f"here {_written(node)}"


def _written(value: Any) -> str:
    return "none" if value is None else toml_value(value)


def _wrapped(text: str, indent: str, width: int) -> str:
    return textwrap.fill(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent + ("    " if indent == "  " else ""),
        break_long_words=False,
        break_on_hyphens=False,
    )
