"""Examples out of every format, told apart by their fields; what is no example, by name."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import DataError
from engine.data.docstrings import read_docstrings
from engine.data.examples import Conversation, Fields, Pair, find_formats, sample_text, to_example
from engine.data.records import BadRecord, read_records
from engine.data.sources import STDLIB_DOCS, SourceFile, find_files

ASKED = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SYSTEM = {"role": "system", "content": "Be brief."}
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Input:\n1 {x}\n\n### Response:\n"
)


def read(path: Path, fields: Fields | None = None) -> list[Any]:
    fields = fields or Fields()
    (file,) = find_formats(find_files([str(path)]), fields).files
    found = [to_example(record, fields) for record in read_records(file, fields.text, fields.columns_of(file.format))]
    return [example for example in found if example is not None]


def write(path: Path, *records: dict[str, Any] | str) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "a", "completion": "b", "id": 1}, Pair("a", "b")),
        ({"instruction": "Add.", "output": "2"}, Pair(ALPACA, "2", "Add.")),
        ({"instruction": "Add.", "input": "", "output": "2"}, Pair(ALPACA, "2", "Add.")),
        ({"instruction": "Add.", "input": "1 {x}", "output": "2"}, Pair(ALPACA_INPUT, "2", "Add.\n\n1 {x}")),
        ({"messages": ASKED}, Conversation(tuple(ASKED))),
        ({"messages": ASKED, "tools": [{"a": 1}]}, Conversation(tuple(ASKED), ({"a": 1},))),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            Conversation(tuple(ASKED)),
        ),
        ({"messages": ASKED, "tools": "[1]"}, Conversation(tuple(ASKED), (1,))),
        ({"messages": ASKED, "tools": None, "system": None}, Conversation(tuple(ASKED))),
        ({"messages": ASKED, "system": " "}, Conversation(tuple(ASKED))),
        ({"messages": ASKED, "system": "Be brief."}, Conversation((SYSTEM, *ASKED))),
        ({"messages": [SYSTEM, *ASKED], "system": "Be brief."}, Conversation((SYSTEM, *ASKED))),
        ({"text": "a", "messages": ASKED}, Conversation(tuple(ASKED))),
        ({"text": "a", "prompt": "b", "completion": "c"}, Pair("b", "c")),
        ({"text": "a", "instruction": "Add.", "output": "2"}, Pair(ALPACA, "2", "Add.")),
        ({"text": "a", "prompt": "b"}, "a"),
    ],
)
def test_the_fields_say_the_format(tmp_path: Path, record: dict[str, Any], expected: Any) -> None:
    assert read(write(tmp_path / "a.jsonl", "", record)) == [expected]
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [expected]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (Fields(prompt="question", completion="answer"), Pair("q", "w")),
        (Fields(messages="turns"), Conversation(tuple(ASKED))),
        (Fields(format="messages"), Conversation(tuple(ASKED))),
        (Fields(text="body"), "t"),
        (Fields(format="text"), "t"),
        (Fields(), Conversation(tuple(ASKED))),
    ],
)
def test_a_format_or_fields_that_are_asked_for_come_first(tmp_path: Path, fields: Fields, expected: Any) -> None:
    record = {"text": "t", "body": "t", "question": "q", "answer": "w", "turns": ASKED, "messages": ASKED}
    assert read(write(tmp_path / "a.jsonl", record), fields) == [expected]


def test_text_files_are_texts_beside_examples(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"})
    (tmp_path / "b.txt").write_text("laid")
    files = find_formats(find_files([str(tmp_path)]), Fields()).files
    assert [file.format for file in files] == ["completion", "text"]


EMPTY = "is empty: there is nothing to answer"
SILENT = "no message of the role 'assistant' says anything"
NO_JSON = "not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"
BAD: dict[str, list[tuple[Any, str, str]]] = {
    "completion": [
        ({"prompt": "a", "x": "b"}, "missing_field", "field 'completion' is missing (fields: 'prompt', 'x')"),
        ({"prompt": 1, "completion": "b"}, "not_text", "field 'prompt' is not a string but 1"),
        ({"prompt": "a", "completion": " \n"}, "no_target", f"field 'completion' {EMPTY}"),
        ("[1]", "missing_field", "not an object"),
        ("{", "broken_json", NO_JSON),
    ],
    "instruction": [
        ({"instruction": "a", "output": ""}, "no_target", f"field 'output' {EMPTY}"),
        ({"instruction": "a"}, "missing_field", "field 'output' is missing (fields: 'instruction', 'input')"),
    ],
    "messages": [
        ({"a": 1}, "missing_field", "field 'messages' is missing (fields: 'a')"),
        ({"messages": []}, "not_text", "field 'messages' is not a list of messages but []"),
        ({"messages": [{"content": "a"}]}, "not_text", "message 1 has no role"),
        ({"messages": ASKED[:1]}, "no_target", SILENT),
        ({"messages": [{"role": "assistant", "content": " "}]}, "no_target", SILENT),
        (
            '{"messages": [{"role": "assistant", "content": "\\ud800"}]}',
            "not_utf8",
            "field 'messages' holds half of a surrogate pair",
        ),
        ({"messages": ASKED, "tools": {"a": 1}}, "not_text", "field 'tools' is not a list but {\"a\": 1}"),
        ({"messages": ASKED, "tools": "{}"}, "not_text", "field 'tools' is not a list but \"{}\""),
        ({"messages": ASKED, "tools": "[1"}, "not_text", "field 'tools' is not a list but \"[1\""),
        ({"messages": ASKED, "tools": ["\ud800"]}, "not_utf8", "field 'tools' holds half of a surrogate pair"),
        ({"messages": ASKED, "tools": '["\\ud800"]'}, "not_utf8", "field 'tools' holds half of a surrogate pair"),
        ({"messages": ASKED, "system": 1}, "not_text", "field 'system' is not a string but 1"),
        (
            {"messages": [SYSTEM, *ASKED], "system": "Be long."},
            "not_text",
            "field 'system' and a message of that role say different things",
        ),
    ],
}


@pytest.mark.parametrize("format", BAD)
def test_what_is_no_example_is_named(tmp_path: Path, format: Any) -> None:
    path = write(tmp_path / "a.jsonl", *(record for record, _, _ in BAD[format]))
    expected = [BadRecord(kind, f"{path}:{line}", what) for line, (_, kind, what) in enumerate(BAD[format], 1)]  # pyright: ignore[reportArgumentType]
    assert read(path, Fields(format=format)) == expected


def test_wrong_names_of_fields_are_called_so(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "a", "answer": "b"})
    what = "field 'reply' is missing (fields: 'question', 'answer')"
    assert read(path, Fields(prompt="question", completion="reply")) == [BadRecord("missing_field", f"{path}:1", what)]


def test_a_tokenizer_learns_from_all_words_of_an_example(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": ASKED})
    (file,) = find_formats(find_files([str(path)]), Fields()).files
    (record,) = read_records(file, "text")
    assert sample_text(record, Fields()) == ("a\nb", Conversation(tuple(ASKED)).identity)


def test_a_damaged_parquet_file_of_examples_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 no, it is not")
    with pytest.raises(DataError, match=r"a\.parquet: can't be read as parquet \(.+\)\."):
        read(path, Fields(format="completion"))


def write_columns(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_binary_columns_of_parquet_are_text(tmp_path: Path) -> None:
    path = write_columns(tmp_path / "a.parquet", prompt=[b"\xc3\xa9", b"\xff"], completion=["b", "b"])
    what = "field 'prompt' holds byte 0xff, which is not UTF-8"
    assert read(path) == [Pair("\u00e9", "b"), BadRecord("not_utf8", f"{path}:2", what)]
    binary = [{"role": message["role"], "content": message["content"].encode()} for message in ASKED]
    assert read(write_columns(tmp_path / "b.parquet", messages=[binary])) == [Conversation(tuple(ASKED))]


def test_what_json_has_no_type_for_is_refused_where_it_is_asked_for(tmp_path: Path) -> None:
    noon = datetime(2020, 1, 1, 12)
    path = write_columns(tmp_path / "a.parquet", prompt=[noon], completion=["b"])
    what = "field 'prompt' holds a datetime, which JSON has no type for"
    assert read(path) == [BadRecord("not_text", f"{path}:1", what)]
    path = write_columns(tmp_path / "b.parquet", prompt=["a"], completion=["b"], text=[noon], input=[b"\xff"])
    assert read(path) == [Pair("a", "b")]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    names = ["prompt", "completion", "prompt"]
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 3, names=names), path)
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value) == f"{path}: has 2 columns 'prompt'. Rename or remove all but one."
    twice = pa.StructArray.from_arrays([pa.array(["a"])] * 2, names=["role", "role"])
    with pytest.raises(DataError, match=r"b\.parquet: can't be read as parquet \(.*duplicate field names"):
        read(write_columns(tmp_path / "b.parquet", messages=twice))


SOURCE = '''
def lay(strands, *, twist: int = 3) -> str:
    """Lay strands into a rope.

    More of it.
    """

async def coil(rope):
    """Coil a rope."""

class Walk:
    def lay(self):
        """Say something else."""

    def length(self):
        """Return the length in m."""

    def _hidden(self):
        """Hide it away."""

class Other:
    def length(self):
        """Return the length in m."""

def silent():
    pass

def terse():
    """Word."""
'''


def test_questions_are_signatures_and_answers_first_lines(tmp_path: Path) -> None:
    for name in ("rope/__init__.py", "rope/hall.py", "_private.py", "broken.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(SOURCE if "rope" in name else "def x(:" if name == "broken.py" else SOURCE)
    files = [SourceFile(path, "text", 0) for path in sorted(tmp_path.rglob("*.py"))]
    found = [(line, json.loads(data)) for _, line, data in read_docstrings(iter(files), tmp_path)]
    # Once each, although two modules and two classes say the same.
    assert found == [
        (2, {"prompt": "What does rope.lay(strands, *, twist: int=3) do?\n", "completion": "Lay strands into a rope."}),
        (8, {"prompt": "What does rope.coil(rope) do?\n", "completion": "Coil a rope."}),
        (12, {"prompt": "What does rope.Walk.lay(self) do?\n", "completion": "Say something else."}),
        (15, {"prompt": "What does rope.Walk.length(self) do?\n", "completion": "Return the length in m."}),
    ]


def test_the_standard_library_answers_questions() -> None:
    (file,) = find_files([STDLIB_DOCS]).files
    pairs: list[Any] = []
    for record in read_records(file, "text"):
        pairs.append(to_example(record, Fields()))
        if len(pairs) == 200:
            break
    assert all(isinstance(pair, Pair) for pair in pairs)
    asked = {pair.prompt: pair.completion for pair in pairs}
    assert asked["What does abc.abstractmethod(funcobj) do?\n"] == "A decorator indicating abstract methods."
    assert len(asked) == 200
