"""TOML and dicts to a Config and back: strict, typed by the dataclasses of schema.py, every problem in one error.

Strict means: "2" is not 2, true is not 1, an unknown key is refused with the nearest valid one, nan and inf are no
numbers. Only an integer may stand where a float is expected. Overrides from the command line pass the same rules.
Whether the values make sense together is not asked here but in check.py. No pydantic: its coercions would have to be
turned off one by one, and its messages have no `why` and no `do`.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import re
import tomllib
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from configs.errors import ConfigError, problem
from configs.fields import INDEX, as_list, as_table, default_of, has_none, listed, plain, section_of, type_name, walk
from configs.schema import Config


def load_config(path: Path, overrides: Sequence[str]) -> Config:
    """Read the TOML file or preset `path`, apply overrides (`["--run.steps", "20", ...]`) and type-check the whole.

    Raises ConfigError with every problem of the file and of the overrides.
    """
    file = find_config(path)
    tree = _read_toml(file)
    reading = _Reading(str(file), set(), [])
    _apply_overrides(tree, overrides, reading)
    return _config(tree, reading)


def config_from_dict(values: dict[str, Any], where: str) -> Config:
    """Type-check nested dicts, as `config_to_dict` wrote them; `where` names their origin in errors."""
    return _config(values, _Reading(where, set(), []))


def config_to_dict(config: Config) -> dict[str, Any]:
    """Nest every field in dicts and lists that JSON can hold."""
    return plain(config)


def config_hash(config: Config) -> str:
    """Hash every value (sha256, hex); the order of fields and sections does not matter."""
    text = json.dumps(plain(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def to_toml(config: Config) -> str:
    """Write the fields that differ from their defaults, and those that have none, as a TOML file."""
    blocks = [block for part in dataclasses.fields(config) for block in _toml(getattr(config, part.name), part.name)]
    return "\n".join(blocks)


def toml_value(value: Any) -> str:
    """Write one value as TOML does; a dict becomes an inline table."""
    items, table = as_list(value), as_table(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if table is not None:
        return f"{{{', '.join(f'{name} = {toml_value(table[name])}' for name in table)}}}"
    return repr(value) if items is None else f"[{', '.join(toml_value(item) for item in items)}]"


def preset_names() -> list[str]:
    """List the presets beside this file, by name."""
    return sorted(file.stem for file in Path(__file__).parent.glob("*.toml"))


def find_config(path: Path) -> Path:
    """Resolve a path or the bare name of a preset to an existing file."""
    try:
        if path.is_file():
            return path
    except OSError as error:
        raise ConfigError(problem(str(path), "", f"can't be read: {error.strerror}")) from None
    name = path.name.removesuffix(".toml")
    if len(path.parts) == 1 and name in preset_names():
        return Path(__file__).parent / f"{name}.toml"
    if (path / "config.toml").is_file():
        raise ConfigError(problem(str(path), "", "is a folder", do=f"Use {path / 'config.toml'}."))
    if path.is_dir():
        raise ConfigError(problem(str(path), "", "is a folder; a TOML file is expected"))
    close = difflib.get_close_matches(name, preset_names(), n=1)
    hint = f"Did you mean configs/{close[0]}.toml?" if close else f"Presets: {', '.join(preset_names())}."
    raise ConfigError(problem(str(path), "", "no such file or preset", do=hint))


# ---- values, strictly


@dataclasses.dataclass(frozen=True, slots=True)
class _Reading:
    """Where values come from, which keys the command line gave, and what is wrong so far."""

    source: str
    overridden: set[str]
    problems: list[str]

    def is_option(self, key: str) -> bool:
        return any(key == given or key.startswith(f"{given}.") for given in self.overridden)

    def place(self, key: str) -> str:
        return f"--{key}" if self.is_option(key) else f"{self.source}: {key}"

    def wrong(self, key: str, value: object, expected: str, why: str = "", do: str = "") -> None:
        self.problems.append(problem(f"{self.place(key)} = {_shown(value)}", "", expected, why, do))


def _config(values: Any, reading: _Reading) -> Config:
    config = _section(Config, values, "", reading)
    if reading.problems:
        raise ConfigError(reading.problems)
    return config


def _section(cls: type, values: Any, key: str, reading: _Reading) -> Any:
    """Build one dataclass; returns None if anything in it is wrong."""
    table = as_table(values)
    if table is None:
        return reading.wrong(key, values, "must be a table", do=f"Its keys: {listed(_names(cls), 'and')}.")
    known, before = get_type_hints(cls), len(reading.problems)
    found: dict[str, Any] = {}
    prefix = f"{key}." if key else ""
    for name in table:
        if name not in known:
            reading.problems.extend(_unknown(cls, name, prefix, reading))
    for part in dataclasses.fields(cls):
        if part.name in table:
            found[part.name] = _value(known[part.name], table[part.name], prefix + part.name, reading)
        elif default_of(part) is dataclasses.MISSING:
            _missing(known[part.name], prefix + part.name, reading)
    return cls(**found) if len(reading.problems) == before else None


def _missing(kind: Any, key: str, reading: _Reading) -> None:
    table, _ = section_of(kind)
    if table is not None:  # a whole section is absent: name the fields that it needs
        _section(table, {}, key, reading)
        return
    text = problem(reading.place(key), "", f"is required: {type_name(kind)}", do=f"Set it in the file or with --{key}.")
    reading.problems.append(text)


def _value(kind: Any, value: Any, key: str, reading: _Reading) -> Any:
    table, _ = section_of(kind)
    if has_none(kind) and value is None:
        return None
    if get_origin(kind) is tuple:
        return _tuple(kind, value, key, reading)
    if table is not None:
        return _section(table, value, key, reading)
    if get_origin(kind) is Literal:
        return _choice(get_args(kind), value, key, reading)
    return _SCALARS[kind](value, key, reading)


def _tuple(kind: Any, value: Any, key: str, reading: _Reading) -> Any:
    items = as_list(value)
    if items is None:
        if as_table(value) is not None:
            hint = f"Write [[{key}]] above its keys."
        else:
            hint = f"Write [{toml_value(value)}]." if isinstance(value, (str, int, float)) else ""
        return reading.wrong(key, value, f"must be {type_name(kind)}", do=hint)
    return tuple(_value(get_args(kind)[0], item, f"{key}.{index}", reading) for index, item in enumerate(items))


def _choice(choices: tuple[str, ...], value: Any, key: str, reading: _Reading) -> Any:
    if isinstance(value, str) and value in choices:
        return value
    close = difflib.get_close_matches(value, choices, n=1, cutoff=0.7) if isinstance(value, str) else []
    hint = f"Did you mean {close[0]!r}?" if close else ""
    return reading.wrong(key, value, f"must be {listed([repr(choice) for choice in choices], 'or')}", do=hint)


def _bool(value: Any, key: str, reading: _Reading) -> Any:
    if isinstance(value, bool):
        return value
    return reading.wrong(key, value, "must be true or false")


def _int(value: Any, key: str, reading: _Reading) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return value if value.bit_length() < 64 else reading.wrong(key, value, "must fit in 64 bits")
    hint = ""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value):
        hint = f"Write {value}, without quotes."
    if isinstance(value, float) and value.is_integer():
        hint = f"Write {value:.0f}."
    return reading.wrong(key, value, "must be an integer", do=hint)


def _float(value: Any, key: str, reading: _Reading) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if abs(value) < 1e300:  # also false for nan; a larger integer would not even convert
            return float(value)
        return reading.wrong(key, value, "must be a finite number")
    hint = ""
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value):
        hint = f"Write {float(value)!r}, without quotes." if math.isfinite(float(value)) else ""
    return reading.wrong(key, value, "must be a number", do=hint)


def _str(value: Any, key: str, reading: _Reading) -> Any:
    if not isinstance(value, str):
        hint = f'Write "{value}".' if isinstance(value, (int, float)) and not isinstance(value, bool) else ""
        return reading.wrong(key, value, "must be a string", do=hint)
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in value):
        return reading.wrong(key, value, "must be text without control characters")
    return value


_SCALARS = {bool: _bool, int: _int, float: _float, str: _str}


def _names(cls: type) -> list[str]:
    return [part.name for part in dataclasses.fields(cls)]


def _shown(value: object) -> str:
    if isinstance(value, int) and value.bit_length() >= 64:  # Python refuses to write out the longest ones
        return f"{value:#x}"[:20] + "..."
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _unknown(cls: type, name: str, prefix: str, reading: _Reading) -> Iterator[str]:
    """Say that a key is unknown, with the nearest one: here, of the same name elsewhere, or by whole path."""
    key, keys = prefix + name, [leaf.key for leaf in walk(Config)]
    below = [given.removeprefix(key) for given in sorted(reading.overridden) if given.startswith(f"{key}.")]
    for rest in below or [""]:  # --optimizer.lr makes `optimizer` an unknown key, yet the option is what was typed
        near = [prefix + close + rest for close in difflib.get_close_matches(name, _names(cls), n=1)]
        if rest:
            near = [one for one in near if one in keys]
        elif not near:
            same = [leaf.key for leaf in walk(Config) if leaf.field.name == name and leaf.owner is not cls]
            near = [one for one in same if INDEX not in one.split(".")] or same
            near = [one for one in near if one.count(".") == min(key.count(".") for key in near)]
        near = near or difflib.get_close_matches(key + rest, keys, n=1, cutoff=0.75)
        is_option = bool(rest) or reading.is_option(key)
        noun, dashes, place = ("option", "--", f"--{key}{rest}") if is_option else ("key", "", reading.place(key))
        if near:
            yield f"{place}: unknown {noun}; did you mean {listed([dashes + one for one in near], 'or')}?"
        else:
            known = f"The keys of {prefix[:-1]}" if prefix else "The sections"
            yield f"{place}: unknown {noun}. {known} are {listed(_names(cls), 'and')}."


# ---- files and the command line


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(problem(str(file), "", f"can't be read: {error.strerror}", do="Give a TOML file.")) from None
    except UnicodeDecodeError as error:
        text = f"is not UTF-8 text (byte {error.start})"
        raise ConfigError(problem(str(file), "", text, do="Save it as UTF-8.")) from None
    try:
        return tomllib.loads(text)
    except ValueError as error:  # a number of 5,000 digits is none of tomllib's own errors
        _refuse_toml(file, text, str(error))
    except RecursionError:
        _refuse_toml(file, text, "brackets within brackets without end")


def _refuse_toml(file: Path, text: str, message: str) -> NoReturn:
    found = re.search(r"^(.*) \(at (?:line (\d+), column \d+|end of document)\)$", message)
    reason, line = (found[1], found[2]) if found else (message, None)
    line = line or len(text.rstrip().splitlines())
    twice = "twice" in reason or "overwrite" in reason
    expected = "a key or section is given twice" if twice else f"not valid TOML: {reason[:1].lower()}{reason[1:]}"
    raise ConfigError(problem(f"{file}:{line}", "", expected, do="Keep one." if twice else "Correct that."))


def _apply_overrides(tree: dict[str, Any], overrides: Sequence[str], reading: _Reading) -> None:
    """Write each override into the tree as TOML would have had it; what is wrong with its value is found later."""
    kinds = {leaf.key: leaf.kind for leaf in walk(Config)}
    for option, text in _options(overrides, reading.problems):
        key = option.removeprefix("--")
        refusal = "given twice" if key in reading.overridden else ""
        refusal = refusal or _put(tree, key, _parsed(text, kinds.get(_general(key))), kinds)
        if refusal:
            reading.problems.append(problem(option, "", refusal, do="Keep one." if refusal == "given twice" else ""))
        reading.overridden.add(key)


def _general(key: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", f".{INDEX}", key)


def _options(words: Sequence[str], problems: list[str]) -> Iterator[tuple[str, str]]:
    queue = list(words)
    while queue:
        option = queue.pop(0)
        if not option.startswith("--"):
            problems.append(problem(option, "", "unexpected argument", do="Options are --section.field VALUE."))
        elif "=" in option:
            option, _, text = option.partition("=")
            yield option, text
        elif queue and not queue[0].startswith("--"):
            yield option, queue.pop(0)
        else:
            problems.append(problem(option, "", "needs a value", do=f"Write {option} VALUE."))


def _parsed(text: str, kind: Any) -> Any:
    """Read VALUE as TOML where it is TOML, else as a bare word; a field of text takes digits as text."""
    try:
        document = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return None if text == "none" and has_none(kind) else text
    value = document["value"] if len(document) == 1 else text
    return text if kind is str and not isinstance(value, str) else value


def _put(tree: dict[str, Any], key: str, value: Any, kinds: dict[str, Any]) -> str:
    """Set one value below the tree, making tables on the way; says why if there is no such place."""
    node: Any = tree
    *path, last = key.split(".")
    for depth, name in enumerate(path):
        above, here = ".".join(path[:depth]), ".".join(path[: depth + 1])
        kind = kinds.get(_general(here))
        items, table = as_list(node), as_table(node)
        if kind is not None and section_of(kind)[0] is None:
            return f"unknown option: {here} is {type_name(kind)}"
        if items is not None and name.isdecimal() and int(name) <= len(items):
            items.extend([{}] if int(name) == len(items) else [])
            node = items[int(name)]
        elif items is not None:
            return f"unknown option: the next entry of {above} would be {len(items)}"
        elif table is not None:
            node = table.setdefault(name, [] if get_origin(kind) is tuple else {})
        else:
            break  # the file has no table there, and the type check says so
    table = as_table(node)
    if table is not None:
        table[last] = value
    return ""


def _toml(section: Any, key: str) -> Iterator[str]:
    """Write a section as blocks of text: its own keys, then the tables below it. Defaults are left out."""
    lines: list[str] = []
    below: list[tuple[str, bool, Any]] = []
    for part in dataclasses.fields(section):
        value = getattr(section, part.name)
        if value == default_of(part):
            continue
        items = as_list(value)
        if dataclasses.is_dataclass(value):
            below.append((f"{key}.{part.name}", False, value))
        elif items and dataclasses.is_dataclass(items[0]):
            below += [(f"{key}.{part.name}", True, item) for item in items]
        else:
            lines.append(f"{part.name} = {toml_value(value)}\n")
    if lines:
        yield f"[{key}]\n" + "".join(lines)
    for name, is_list, table in below:
        header = f"[[{name}]]\n" if is_list else f"[{name}]\n"
        yield header + "".join(_toml(table, name)).removeprefix(f"[{name}]\n")
