"""The command line of a run: what it returns, what --help says, and what it refuses."""

import re
from pathlib import Path

import pytest

from configs.cli import help_text, parse_command_line
from configs.errors import ConfigError
from configs.fields import docstrings, walk
from configs.load import load_config
from configs.schema import Config

DEBUG = Path(__file__).parents[3] / "configs" / "debug.toml"


def entries(text: str) -> dict[str, tuple[str, str]]:
    """Split help into option -> (what stands in parentheses, the docstring), unwrapped."""
    joined = re.sub(r"\n {6}", " ", text)
    found = re.findall(r"^  (--\S+) +\((.*?; (?:fixed|may change))\) (.*)$", joined, re.M)
    return {option: (marks, doc) for option, marks, doc in found}


def help_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parse_command_line([*argv], "launchers/train.py")
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_a_command_line_is_a_config_and_overrides() -> None:
    path, config = parse_command_line(["debug", "--run.steps", "7", "--compile.blocks=true"], "train.py")
    assert path == Path("debug")
    assert config == load_config(DEBUG, ["--run.steps", "7", "--compile.blocks", "true"])
    assert config.run.steps == 7


@pytest.mark.parametrize("argv", [[], ["--run.steps", "3", "debug"]])
def test_a_config_must_come_first(argv: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_command_line(argv, "launchers/train.py")
    assert str(caught.value).startswith(
        "launchers/train.py: the first argument must be a TOML file or the name of a preset. "
        "Write launchers/train.py CONFIG [--section.field VALUE ...]. Presets: bench, debug, "
    )


@pytest.mark.parametrize("width", [80, 100, 120])
def test_help_documents_every_field(width: int) -> None:
    text = help_text("launchers/train.py", None, width)
    assert max(len(line) for line in text.splitlines()) <= width
    found = entries(text)
    assert list(found) == [f"--{leaf.key}" for leaf in walk(Config)]
    for leaf in walk(Config):
        marks, doc = found[f"--{leaf.key}"]
        written = docstrings(leaf.owner)[leaf.field.name]
        assert len(written) > 10
        assert doc.startswith(written), leaf.key
        assert marks.endswith("; fixed" if leaf.fixed else "; may change"), leaf.key


def test_help_gives_type_and_default() -> None:
    found = entries(help_text("launchers/train.py", None, 100))
    assert found["--run.steps"][0] == "an integer; required; may change"
    assert found["--run.device"][0] == "'auto', 'cpu' or 'cuda'; default \"auto\"; may change"
    assert found["--optim.lr"][0] == "a number; default 0.0003; fixed"
    assert found["--compile.blocks"][0] == "true or false; default false; may change"
    assert found["--model.rope_scaling"][0] == "a table; default none; fixed"
    assert found["--model.rope_scaling.factor"][0] == "a number; default 8.0; fixed"
    assert found["--data.stores"][0] == "a list of tables; default []; fixed"
    assert found["--data.stores.N.path"][0] == "a string; required; may change"
    assert found["--data.stores.N.sources"][0] == "a list of strings; default []; may change"


def test_help_is_grouped_by_section(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, "--help")
    assert text.startswith("usage: launchers/train.py CONFIG [--section.field VALUE ...]\n")
    assert re.findall(r"^\[(\w+)\] ", text, re.M) == [
        "run", "model", "data", "adapter", "objective", "optim", "lr", "parallel", "recompute", "precision", "compile",
        "checkpoint", "metrics", "eval", "fault",
    ]  # fmt: skip


def test_help_with_a_config_shows_its_values(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, "debug", "--run.seed", "7", "-h")
    found = entries(text)
    assert found["--run.steps"][0] == "an integer; here 20; may change"
    assert found["--run.seed"][0] == "an integer; here 7; fixed"
    assert found["--model.rope_scaling"][0] == "a table; here none; fixed"
    assert text.endswith("The values above are those of debug --run.seed 7\n")


def test_help_works_beside_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, "debug", "--run.sed", "7", "--help")
    assert "--run.seed  (an integer; default 0; fixed)" in text
    assert text.endswith("--run.sed: unknown option; did you mean --run.seed?\n")
