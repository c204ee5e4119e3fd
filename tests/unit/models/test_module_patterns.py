"""Patterns of PEFT's: what people write is matched, what might never end is refused before it is tried."""

import pytest

from models.module_patterns import compile_patterns

NAMES = [f"model.layers.{layer}.{part}" for layer in range(32) for part in ("self_attn.q_proj", "mlp.up_proj")]


def fitting(pattern: str) -> int:
    problems: list[str] = []
    compiled = compile_patterns([pattern], "x", problems)
    assert problems == []
    return sum(compiled[pattern].fullmatch(name) is not None for name in NAMES)


def refusal(*patterns: str) -> str:
    problems: list[str] = []
    compile_patterns(patterns, "x", problems)
    assert len(problems) == 1
    return problems[0]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        (r".*\.(q_proj|v_proj)$", 32),
        (r"^model\.layers\.(0|1)\.self_attn.*", 2),
        (r"model\.layers\.(?:[0-9]|1[0-9])\.mlp\.(up|down)_proj", 20),
        (r".*\.layers\.(" + "|".join(map(str, range(32))) + r")\..*\.(q|k|v|o|gate|up|down)_proj", 64),
        (r"^(?!.*vision).*(?:q|v)_proj", 32),
        (r"[](|*+]*m.*[^)]{2}\w", 64),
    ],
)
def test_what_people_write_is_matched(pattern: str, count: int) -> None:
    assert fitting(pattern) == count


@pytest.mark.parametrize("pattern", ["(.*)*x", "(m|o)+x", r"(?:\w\w?){9}x"])
def test_a_repeated_group_is_refused(pattern: str) -> None:
    text = "could take for ever to match (a group is repeated). List the modules by name instead."
    assert refusal(pattern) == f"x = {pattern!r}: {text}"


@pytest.mark.parametrize(
    "pattern", [".*" * 8 + "x", "(.|.)" * 30 + "x", ".?" * 30 + "x", "a{1,9}" * 9, "(.*|.*.*)" * 3]
)
def test_too_many_ways_are_refused(pattern: str) -> None:
    text = "(there are more than 1,000,000 ways in which it may fit). List the modules by name instead."
    assert refusal(pattern) == f"x = {pattern!r}: could take for ever to match {text}"


def test_the_ways_of_all_patterns_count() -> None:
    patterns = [".*" * 3 + f"{number}" for number in range(30)]
    assert "there are more than 1,000,000 ways" in refusal(*patterns)


@pytest.mark.parametrize("pattern", ["(?x)#[\n(.*).*", "(?P<name>a)", "(?i)q_proj"])
def test_groups_that_can_not_be_counted_are_refused(pattern: str) -> None:
    assert "of groups that begin with (? only (?:, (?=, (?!, (?<=, (?<! are read" in refusal(pattern)


def test_long_and_many_patterns_are_refused_unread() -> None:
    text = "x: a pattern must have at most 1,000 characters, not 1,001. List the modules by name instead."
    assert refusal("a" * 1001) == text
    assert refusal(*map(str, range(10_001))) == "x: must have at most 10,000 patterns, not 10,001."


def test_what_is_no_pattern_is_quoted_as_it_was_written() -> None:
    problems: list[str] = []
    assert compile_patterns(["a)(b"], "x", problems, r"(.*\.)?({})") == {}
    assert problems == [
        "x = 'a)(b': not a regular expression: unbalanced parenthesis at position 1. List the modules by name instead."
    ]
