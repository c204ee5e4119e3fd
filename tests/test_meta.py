"""The house's laws, held by reading the sources: where a line may live, how large it may grow, what it may be called.

What a linter, the type checker or import-linter can see is left to them (`make check`); here is the rest.
"""

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from configs.fields import INDEX, walk
from configs.schema import Config

ROOT = Path(__file__).parents[1]
# Highest first: a room may import itself and what stands after it.
ROOMS = ("tools", "launchers", "engine", "parallel", "models", "configs")
MAY_NOT_IMPORT = {room: set(ROOMS[: ROOMS.index(room)]) for room in ROOMS}
MAX_FILE_LINES, MAX_TEST_LINES, MAX_FUNCTION_LINES = 400, 600, 60
EMPTY_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "base", "core"}
# One word per concept; these are others for step, seq_len, checkpoint, microbatch, dim, num_layers, store and preset.
FORBIDDEN_WORDS = {
    "iteration",
    "iterations",
    "iters",
    "seqlen",
    "ckpt",
    "ckpts",
    "minibatch",
    "bsz",
    "nlayers",
    "dmodel",
}
FORBIDDEN_ENDINGS = ("Manager", "Handler", "Processor", "Helper", "Utils")
# tensorboard is loaded by torch.utils.tensorboard, protobuf by sentencepiece's model format; neither declares it.
IMPORTED_BY_OTHERS = {"tensorboard", "protobuf"}


def _files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


SOURCES = _files(*ROOMS)
TESTS = _files("tests")


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=_name(path))


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, whole names, wherever in the file; relative imports are not used here."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_name(path)}:{node.lineno}: relative import; write the room's name"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def _lines(found: Iterator[str]) -> str:
    return "\n".join(found)


# ---- rooms


def test_imports_run_one_way() -> None:
    wrong = (
        f"{_name(path)}:{line}: {room} may not import {module}"
        for room in ROOMS
        for path in _files(room)
        for module, line in _imports(path)
        if module.split(".")[0] in MAY_NOT_IMPORT[room] | {"tests"}
    )
    assert not _lines(wrong)


def test_siblings_in_parallel_meet_only_in_apply() -> None:
    wrong = (
        f"{_name(path)}:{line}: imports {module}"
        for path in _files("parallel")
        if path.name != "apply.py"
        for module, line in _imports(path)
        if module.startswith("parallel.")
    )
    assert not _lines(wrong)


def test_data_is_a_leaf_of_the_engine() -> None:
    """It may share the hashing of files, which knows nothing of a run."""
    wrong = (
        f"{_name(path)}:{line}: imports {module}"
        for path in _files("engine/data")
        for module, line in _imports(path)
        if module.startswith("engine.") and not module.startswith(("engine.data", "engine.files"))
    )
    assert not _lines(wrong)


def test_the_model_is_single_device_mathematics() -> None:
    wrong = [
        f"{_name(path)}:{line}: imports {module}"
        for path in _files("models", "configs")
        for module, line in _imports(path)
        if module.startswith("torch.distributed")
    ]
    wrong += [
        f"{_name(path)}:{node.lineno}: torch.distributed"
        for path in _files("models", "configs")
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.Attribute) and node.attr == "distributed"
    ]
    assert not _lines(iter(wrong))


def test_only_launchers_read_the_environment() -> None:
    wrong = (
        f"{_name(path)}:{node.lineno}: reads the environment"
        for path in SOURCES
        if path.parts[len(ROOT.parts)] != "launchers"
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.Attribute | ast.alias)
        and (node.attr if isinstance(node, ast.Attribute) else node.name) in ("environ", "getenv", "putenv")
    )
    assert not _lines(wrong)


def _words_of_code(path: Path) -> Iterator[tuple[str, int]]:
    """Every name that a file's code uses, with what it is taken from where that is written out."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node), node.lineno
        elif isinstance(node, ast.Name):
            yield node.id, node.lineno
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg, node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield f"{node.func.id}()", node.lineno
    yield from _imports(path)


PICKLES = re.compile(
    # Modules that are pickles or run what they read.
    r"^(pickle|cloudpickle|dill|joblib|shelve|marshal|torch\.package|torch\.hub)\b"
    # What reads or writes one: torch's files, numpy's of objects, torch's dumps of memory and of DCP.
    r"|\btorch\.(load|save)$|\b(np|numpy)\.(load|save|savez)$|\ballow_pickle$|\b_?dump_snapshot$"
    r"|\b(dcp_to_torch_save|torch_save_to_dcp|FileSystemReader|FileSystemWriter)$"
    # Between ranks: JSON goes there (engine/ranks.py).
    r"|_object_list$|\b(all_)?gather_object$|\bscatter_object"
    # What runs code of others.
    r"|\btrust_remote_code$|^(eval|exec|compile|__import__)\(\)$"
)


def test_nothing_of_ours_loads_a_pickle_or_runs_what_it_reads() -> None:
    wrong = (
        f"{_name(path)}:{line}: {word}"
        for path in SOURCES
        for word, line in _words_of_code(path)
        if PICKLES.search(word)
    )
    assert not _lines(wrong)
    for word in ("pickle.loads", "torch.load", "np.load", "dist.all_gather_object", "trust_remote_code", "eval()"):
        assert PICKLES.search(word), f"{word} would not be found"


def test_every_room_says_what_it_is() -> None:
    for room in (*ROOMS, "engine/data"):
        path = ROOT / room / "__init__.py"
        assert path.is_file(), f"{room} has no __init__.py"
        chapter = ast.get_docstring(_tree(path)) or ""
        assert len(chapter.splitlines()) >= 3, f"{_name(path)}: its docstring is a chapter of the architecture"
        assert len(_tree(path).body) == 1, f"{_name(path)}: only the docstring; no work at import"


# ---- sizes


def test_files_stay_small() -> None:
    limits = [(path, MAX_FILE_LINES) for path in SOURCES] + [(path, MAX_TEST_LINES) for path in TESTS]
    sizes = ((path, limit, len(path.read_text().splitlines())) for path, limit in limits)
    assert not _lines(f"{_name(path)}: {size} lines of {limit}" for path, limit, size in sizes if size > limit)


def test_functions_stay_small() -> None:
    sizes = (
        (path, node, (node.end_lineno or node.lineno) - node.lineno + 1)
        for path in SOURCES
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    wrong = (f"{_name(p)}:{node.lineno} {node.name}: {n} lines" for p, node, n in sizes if n > MAX_FUNCTION_LINES)
    assert not _lines(wrong)


# ---- words


def _defined_names(path: Path) -> Iterator[tuple[str, int]]:
    """Names that a file gives: functions, classes, arguments, variables and attributes it assigns."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno


def _is_forbidden(name: str) -> bool:
    return bool(FORBIDDEN_WORDS & set(name.lower().split("_"))) or name.endswith(FORBIDDEN_ENDINGS)


def test_one_word_per_concept() -> None:
    wrong = (
        f"{_name(path)}:{line}: {name}"
        for path in SOURCES + TESTS
        for name, line in _defined_names(path)
        if _is_forbidden(name)
    )
    assert not _lines(wrong)


def test_file_names_say_something() -> None:
    for path in SOURCES + TESTS:
        stem = path.stem.removeprefix("test_")
        assert stem not in EMPTY_NAMES, f"{_name(path)}: a name that says nothing"
        assert not _is_forbidden(stem), f"{_name(path)}: not our word"


def test_no_script_bears_the_name_of_a_standard_module() -> None:
    """A script's folder comes first on sys.path: tools/profile.py would break `import torch`."""
    for path in _files("tools", "launchers"):
        assert path.stem not in sys.stdlib_module_names, f"{_name(path)} hides the standard module"


def test_every_file_has_a_docstring_and_is_ascii() -> None:
    for path in SOURCES + TESTS:
        assert ast.get_docstring(_tree(path)), f"{_name(path)}: what lives here, and why?"
        assert path.read_text().isascii(), f"{_name(path)}: ASCII only"


def test_nothing_is_left_to_do() -> None:
    mark = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
    wrong = (
        f"{_name(path)}:{number}: {line.strip()}"
        for path in SOURCES + TESTS
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if mark.search(line)
    )
    assert not _lines(wrong)


# ---- config


def test_every_field_of_the_schema_is_documented() -> None:
    for node in _tree(ROOT / "configs" / "schema.py").body:
        if isinstance(node, ast.ClassDef) and node.name != "Config":
            assert ast.get_docstring(node), f"{node.name} has no docstring"
            body = node.body[1:]
            for index, field in enumerate(body):
                if isinstance(field, ast.AnnAssign):
                    after = body[index + 1] if index + 1 < len(body) else None
                    documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                    assert documented, f"{node.name}.{ast.unparse(field.target)} has no docstring"


def test_every_preset_begins_with_the_command_that_runs_it() -> None:
    presets = sorted((ROOT / "configs").glob("*.toml"))
    assert presets
    for path in presets:
        first = path.read_text().splitlines()[0]
        command = (
            rf"# (torchrun .*launchers/train\.py|python (launchers|tools)/\w+\.py) configs/{re.escape(path.name)}\b"
        )
        assert re.match(command, first), f"{_name(path)}: {first}"


# ---- what is declared


def _pyproject() -> dict[str, dict]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def _declared(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=~! ]", requirement)[0].lower().replace("-", "_") for requirement in requirements}


def test_dependencies_are_declared_as_they_are_imported() -> None:
    project = _pyproject()["project"]
    core, bench = _declared(project["dependencies"]), _declared(project["optional-dependencies"]["bench"])
    ours = set(ROOMS) | set(sys.stdlib_module_names)
    imported = {module.split(".")[0] for path in SOURCES for module, _ in _imports(path)} - ours
    accelerators = _declared(
        [text for extra in ("flash", "float8") for text in project["optional-dependencies"][extra]]
    )
    assert imported - core - bench - accelerators == set(), "imported but not declared"
    at_the_top = {
        name.split(".")[0]
        for path in SOURCES
        for node in _tree(path).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert at_the_top & accelerators == set(), "an accelerator is looked up when a config asks for it"
    assert core - imported == IMPORTED_BY_OTHERS, "declared but not imported"
    outside = {
        _name(path)
        for path in SOURCES
        for module, _ in _imports(path)
        if module.split(".")[0] in bench - core and path.parts[len(ROOT.parts)] != "tools"
    }
    assert outside == set(), "an extra may be imported in tools/ only"


def test_everything_that_is_installed_has_one_version() -> None:
    """Each declared range has a line in the lock, with a version that it admits."""
    locked = dict(re.findall(r"^([\w.-]+)==([\w.]+)$", (ROOT / ".ci" / "constraints.txt").read_text(), re.M))
    versions = {name.lower().replace("-", "_"): version for name, version in locked.items()}
    project = _pyproject()["project"]
    extras = project["optional-dependencies"]
    declared = project["dependencies"] + [text for name in ("float8", "qlora", "bench", "dev") for text in extras[name]]
    for text in declared:
        requirement = Requirement(text)
        if requirement.name != "ropewalk":
            version = versions[requirement.name.lower().replace("-", "_")]
            assert requirement.specifier.contains(version), f"{text}, but the lock has {version}"
    assert "torch>=2.11,<2.15" in project["dependencies"]


@pytest.mark.long
def test_ci_runs_every_test_file() -> None:
    """By the command that CI gives: a folder named dist is left out by pytest, and nothing says so."""
    (command,) = re.findall(r"^make (test-all)\b", (ROOT / ".ci" / "run").read_text(), re.M)
    # What an outer make was given is not for this one.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKEOVERRIDES", "ARGS")
    }
    options: dict[str, Any] = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    dry = subprocess.run(["make", "--dry-run", command], check=True, **options).stdout
    (arguments,) = re.findall(r"^\S+/python -m pytest(.*)$", dry, re.M)
    collect = [sys.executable, "-m", "pytest", *shlex.split(arguments), "--collect-only", "-qq"]
    done = subprocess.run(collect, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    collected = set(re.findall(r"^(tests/\S+\.py)\b", done.stdout, re.M))
    assert {_name(path) for path in TESTS if path.stem.startswith("test_")} - collected == set()


def test_every_package_is_installed() -> None:
    packages = {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in SOURCES}
    assert set(_pyproject()["tool"]["setuptools"]["packages"]) == packages


# ---- what the documents promise

DOCUMENTS = [
    path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
    if path.is_file()
]
OUR_FOLDERS = {*ROOMS, "tests", "docs", ".ci"}
PLACEHOLDER = re.compile(r"[A-Z]{3,}/|/[A-Z]{3,}|/my[-_]|[*<>{}$]|\.{3}")  # configs/NAME.toml, configs/my-1b.toml


def _code_blocks(text: str) -> list[str]:
    """Fenced blocks, and paragraphs indented by four spaces."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    indented = re.findall(r"(?:^ {4}.*\n?)+", re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S), re.M)
    return [block for part in fenced + indented for block in part.split("\n\n")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_paths_in_documents_exist(document: Path) -> None:
    text = document.read_text()
    # A path is ours if it begins with one of our folders; others are a run's, or the reader's.
    words = re.findall(r"`([\w.-]+/[\w./-]*|\w+\.md|Makefile|pyproject\.toml)`", text)
    words += re.findall(r"(?<![\w./-])((?:tools|launchers|configs)/[\w./-]+\.(?:py|toml))\b", text)
    ours = {word for word in words if word.split("/")[0] in OUR_FOLDERS or "/" not in word}
    missing = {word for word in ours if not PLACEHOLDER.search(word) and not _exists(word, document)}
    links = {link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)} - {""}
    missing |= {link for link in links if not link.startswith("http") and not (document.parent / link).exists()}
    assert missing == set()


def _exists(word: str, document: Path) -> bool:
    return (ROOT / word).exists() or (document.parent / word).exists()


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_make_targets_in_documents_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    text = document.read_text()
    named = set(re.findall(r"`make ([a-z-]+)", text))
    named |= set(re.findall(r"^ *(?:\$ )?make ([a-z-]+)", "\n".join(_code_blocks(text)), re.M))
    assert named - targets == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_config_options_in_documents_exist(document: Path) -> None:
    keys = {leaf.key for leaf in walk(Config)}
    # A block that shows an error shows the mistake too.
    blocks = (block for block in _code_blocks(document.read_text()) if not re.search(r"error:|unknown|: must", block))
    text = "\n".join(blocks)
    options = set(re.findall(r"--((?!section\.)[a-z_]+(?:\.[a-z_0-9]+)+)", text))
    assert {re.sub(r"\.\d+\.", f".{INDEX}.", option) for option in options} - keys == set()
