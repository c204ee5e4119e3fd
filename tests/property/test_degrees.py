"""Any preset with any degrees either resolves or is told, problem by problem, what to do; and what it is told works."""

import re
from pathlib import Path
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs.check import resolve
from configs.errors import ConfigError
from configs.load import load_config

PRESETS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
PRESET = {path.stem: path for path in PRESETS}
DEGREE = st.sampled_from([1, 1, 1, 2, 3, 4, 6, 8, 16])
DEGREES = st.fixed_dictionaries({axis: DEGREE for axis in ("dp_replicate", "cp", "tp", "pp")})
REMEDY = re.compile(r"\. (Use|Set|Start|Raise|Remove|Leave) .+\.$")
ADVICE = re.compile(r"^(?P<key>parallel\.(?:tp|pp|cp|dp_replicate)) = \d+: .*\. Use (?P<works>[\d, or]+)\.$")


def problems(preset: Path, ranks: int, overrides: dict[str, Any]) -> list[str]:
    words = [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
    try:
        resolve(load_config(preset, words), ranks)
    except ConfigError as error:
        return error.problems
    return []


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(PRESETS), st.sampled_from([1, 2, 6, 8, 64, 512, 4096]), DEGREES, st.booleans())
@example(PRESET["llama-3.1-70b"], 64, dict(dp_replicate=1, cp=1, tp=16, pp=1), False)
@example(PRESET["debug"], 8, dict(dp_replicate=1, cp=1, tp=4, pp=1), True)
def test_degrees_are_taken_or_answered(preset: Path, ranks: int, degrees: dict[str, int], quantized: bool) -> None:
    overrides: dict[str, Any] = {f"parallel.{axis}": degree for axis, degree in degrees.items()}
    if quantized:
        overrides |= {"adapter.kind": "lora", "adapter.quantization": "nf4"}
    overrides["data.global_batch_size"] = 8 * ranks
    found = problems(preset, ranks, overrides)
    for text in found:
        assert REMEDY.search(text), text
        advice = ADVICE.match(text)
        if advice:
            for degree in re.findall(r"\d+", advice["works"]):
                again = problems(preset, ranks, overrides | {advice["key"]: int(degree)})
                told = [other for other in again if other.startswith(f"{advice['key']} = ")]
                # Each piece of advice answers one rule; another rule on the same field has its own.
                assert text.split(" = ")[1].split(": ")[1].split(".")[0] not in "".join(told), (text, told)
