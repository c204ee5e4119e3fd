"""Regular expressions over names of modules, as PEFT's files have them, bounded before one is ever tried.

A folder comes from anywhere, and Python's matcher tries every way in which a pattern can fit: `(.*)*x` would never end.
So the ways are counted first, from above, and a pattern with too many is refused. What people write has few.
"""

import re
from collections.abc import Collection
from itertools import pairwise
from math import prod

from configs.errors import problem

MAX_CHARACTERS = 1000
MAX_PATTERNS = 10_000
MAX_WAYS = 1_000_000  # of all patterns together, for one name
LONGEST_NAME = 33  # of a module's characters; a repetition may end at any of them

REPETITIONS = ("*", "+", "{")

_DO = "List the modules by name instead."
_GROUPS = ("(?:", "(?=", "(?!", "(?<=", "(?<!")
# What is escaped, a class, the beginning of a group, or one character.
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?<[=!]|\(\?[:=!]|.", re.DOTALL)


def compile_patterns(
    patterns: Collection[str], where: str, problems: list[str], form: str = "{}"
) -> dict[str, re.Pattern[str]]:
    """Compile each pattern set into `form`; one that is none, or may take long to match, is a problem and left out."""
    if len(patterns) > MAX_PATTERNS:
        problems.append(problem(where, "", f"must have at most {MAX_PATTERNS:,} patterns, not {len(patterns):,}"))
        return {}
    compiled: dict[str, re.Pattern[str]] = {}
    total = 0
    for pattern in patterns:
        if len(pattern) > MAX_CHARACTERS:
            expected = f"a pattern must have at most {MAX_CHARACTERS:,} characters, not {len(pattern):,}"
            problems.append(problem(where, "", expected, do=_DO))
            continue
        try:
            re.compile(pattern)  # alone first, so that it can't close a parenthesis of the form
            compiled[pattern] = re.compile(form.format(pattern))
        except (re.error, RecursionError, OverflowError) as error:
            problems.append(problem(where, pattern, f"not a regular expression: {error}", do=_DO))
            continue
        ways, reason = _count_ways(pattern)
        total += ways
        if reason or total > MAX_WAYS:
            reason = reason or f"there are more than {MAX_WAYS:,} ways in which it may fit"
            problems.append(problem(where, pattern, "could take for ever to match", reason, _DO))
            return {}
    return compiled


def _count_ways(pattern: str) -> tuple[int, str]:
    """Bound the ways in which a pattern can fit one name from above, or say why that can't be done."""
    tokens = _TOKEN.findall(pattern)
    for token, following in pairwise(tokens):
        if token == "(" and following == "?":
            return 0, f"of groups that begin with (? only {', '.join(_GROUPS)} are read"
        if token == ")" and following in REPETITIONS:
            return 0, "a group is repeated"
    # An alternative more is a way more; a group's ways multiply with those of what stands beside it.
    branches, open_groups = [], [1]
    for token in tokens:
        if token == "|":
            open_groups[-1] += 1
        elif token == ")":
            branches.append(open_groups.pop())
        elif token.startswith("("):
            open_groups.append(1)
    repetitions = sum(token in REPETITIONS for token in tokens)
    return prod([*branches, *open_groups]) * LONGEST_NAME**repetitions * 2 ** tokens.count("?"), ""
