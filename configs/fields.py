"""The schema, walked: every field with its key, type, default, docstring and what it may do on resume.

load.py needs it for names, cli.py for --help, check.py for ranges and for comparing a run with its checkpoint.
Python keeps no docstring of a field, so they are read from the source.
"""

import ast
import dataclasses
import inspect
import itertools
import math
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

INDEX = "N"  # stands in a key for the position in a list of tables: data.stores.N.path


def fixed(default: Any = ..., *, factory: Any = None) -> Any:
    """A field that a resumed run must not change; without a default it must be given."""
    metadata = {"resume": "fixed"}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    if default is ...:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, slots=True)
class Leaf:
    """One field as a user addresses it: `key` is dotted, `kind` its annotation, `owner` the section's class."""

    key: str
    kind: Any
    field: dataclasses.Field[Any]
    owner: Any

    @property
    def fixed(self) -> bool:
        """Say whether a resumed run must keep the value."""
        return self.field.metadata.get("resume") == "fixed"


def walk(section: type, prefix: str = "") -> Iterator[Leaf]:
    """Go through all fields of a section class in order, into sections and lists of sections."""
    hints = get_type_hints(section)
    for part in dataclasses.fields(section):
        key, kind = prefix + part.name, hints[part.name]
        table, is_list = section_of(kind)
        if table is None or is_list or has_none(kind):
            yield Leaf(key, kind, part, section)
        if table is not None:
            yield from walk(table, f"{key}.{INDEX}." if is_list else f"{key}.")


def section_of(kind: Any) -> tuple[type | None, bool]:
    """Find the dataclass in an annotation (itself, optional, or a tuple of them) and whether it is a list."""
    is_list = get_origin(kind) is tuple
    for candidate in (kind, *get_args(kind)):
        if dataclasses.is_dataclass(candidate) and isinstance(candidate, type):
            return candidate, is_list
    return None, is_list


def has_none(kind: Any) -> bool:
    """Say whether an annotation admits None."""
    return types.NoneType in get_args(kind)


def default_of(part: dataclasses.Field[Any]) -> Any:
    """Give a field's default; dataclasses.MISSING when it must be given."""
    return part.default if part.default_factory is dataclasses.MISSING else part.default_factory()


def default_value(section: Any, name: str) -> Any:
    """Give the default of a section's field."""
    return next(default_of(part) for part in dataclasses.fields(section) if part.name == name)


def plain(value: Any) -> Any:
    """Turn dataclasses into dicts and tuples into lists, at any depth."""
    if dataclasses.is_dataclass(value):
        return {part.name: plain(getattr(value, part.name)) for part in dataclasses.fields(value)}
    items = as_list(value)
    return value if items is None else [plain(item) for item in items]


def as_table(value: Any) -> dict[str, Any] | None:
    """Give a dict as one with text keys, anything else as None."""
    return cast(dict[str, Any], value) if isinstance(value, dict) else None


def as_list(value: Any) -> list[Any] | None:
    """Give a list or tuple as a list (the same one), anything else as None."""
    if isinstance(value, tuple):
        return list(cast(tuple[Any, ...], value))
    return cast(list[Any], value) if isinstance(value, list) else None


def type_name(kind: Any) -> str:
    """Name an annotation in a user's words."""
    table, is_list = section_of(kind)
    if table is not None:
        return "a list of tables" if is_list else "a table"
    if get_origin(kind) is tuple:
        return "a list of integers" if get_args(kind)[0] is int else "a list of strings"
    if get_origin(kind) is Literal:
        return listed([repr(choice) for choice in get_args(kind)], "or")
    return {bool: "true or false", int: "an integer", float: "a number", str: "a string"}[kind]


def docstrings(section: type) -> dict[str, str]:
    """Read the docstring under each field of a section class, as one line each."""
    tree = ast.parse(inspect.getsource(sys.modules[section.__module__]))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == section.__name__)
    found: dict[str, str] = {}
    for statement, after in itertools.pairwise(body):
        match statement, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split())
            case _:
                pass
    return found


def listed(words: Sequence[object], last: str) -> str:
    """Join words as prose does: `1, 2, 4 or 8`."""
    texts = [str(word) for word in words]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} {last} {texts[-1]}"


def divisors(number: int) -> list[int]:
    """List the divisors of a positive number in order; beyond 10**10, those up to 100,000 and their partners."""
    small = [one for one in range(1, min(math.isqrt(number), 100_000) + 1) if number % one == 0]
    return sorted({*small, *(number // one for one in small)})


def choices(works: Sequence[int], got: int) -> str:
    """Write the values that work as prose; of many, the six nearest to what was given."""
    nearest = sorted(sorted(works, key=lambda one: abs(one - got))[:6])
    return listed(nearest, "or")
