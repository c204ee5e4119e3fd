"""Questions and answers that every machine has: the public functions of Python's own standard library.

The question is a function's or method's signature, the answer the first line of its documentation. They are read from
the sources without importing anything, in the order of the files, each answer about one signature once: classes repeat
their parents, and the same text on both sides of the held-out split would flatter a model.
"""

import ast
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from engine.data.sources import SourceFile

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_SENTENCE = re.compile(r"[A-Za-z].*[a-z].* .*[a-z)\]'\"`.:;!?]$")


def read_docstrings(files: Iterator[SourceFile], root: Path) -> Iterator[tuple[SourceFile, int, bytes]]:
    """Yield (file, line, JSON of {prompt, completion}) of each public function; files that don't parse are left out."""
    seen: set[tuple[str, str]] = set()
    for file in files:
        module = _module(file.path.relative_to(root))
        if module is None:
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # of escapes that Python deprecates: not ours to mend
                tree = ast.parse(file.path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for name, function in _functions(tree):
            answer = _first_line(function)
            arguments = ast.unparse(function.args)
            key = (f"{function.name}({arguments})", answer)
            if answer and key not in seen:
                seen.add(key)
                pair = {"prompt": f"What does {module}.{name}({arguments}) do?\n", "completion": answer}
                yield file, function.lineno, json.dumps(pair).encode()


def _module(path: Path) -> str | None:
    """The dotted name of a public module."""
    parts = [*path.parts[:-1], path.stem]
    if parts[-1] == "__init__":
        parts.pop()
    is_public = parts and not any(part.startswith("_") or not part.isidentifier() for part in parts)
    return ".".join(parts) if is_public else None


def _functions(tree: ast.Module) -> Iterator[tuple[str, _Function]]:
    """Public functions and methods of public classes, one level deep."""
    for node in tree.body:
        if isinstance(node, _Function):
            found = [(node.name, node)]
        elif isinstance(node, ast.ClassDef):
            found = [(f"{node.name}.{part.name}", part) for part in node.body if isinstance(part, _Function)]
        else:
            continue
        yield from ((name, function) for name, function in found if not re.search(r"(^|\.)_", name))


def _first_line(function: _Function) -> str:
    """The first line of the documentation, if it is a sentence of some words; else nothing."""
    lines = (ast.get_docstring(function) or "").strip().splitlines()
    line = lines[0].strip() if lines else ""
    return line if _SENTENCE.search(line) else ""
