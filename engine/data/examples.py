"""Records -> examples: what is asked, and what is to be answered.

completion   {prompt, completion}, under any names
instruction  {instruction, input, output}: laid out as Stanford Alpaca does
messages     {messages: [{role, content}, ..]}, or ShareGPT's {conversations: [{from, value}, ..]}
text         {text}: all of it is an answer

Here are the names of fields, and what a record must hold to be an example. Its tokens, and which of them are targets,
are in answers.py.
"""

import json
from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

from engine.data.chat import ASSISTANT
from engine.data.records import BadRecord, RawRecord, read_records, text_of, to_fields, to_text
from engine.data.sources import Corpus, Format, SourceFile

_TEXT = "text"
_MESSAGE_FIELDS = ("messages", "conversations")
_SYSTEM = "system"
"""A role, and the field beside the messages that some data sets have instead."""
_ROLES = {"human": "user", "gpt": "assistant"}
_PEEKED = 20
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclass(frozen=True, slots=True)
class Fields:
    """Which fields of a record hold what; an empty name stands for the usual one."""

    text: str = _TEXT
    prompt: str = ""
    completion: str = ""
    messages: str = ""
    format: Format | Literal["auto"] = "auto"
    """Of every file of records; auto looks at each file's first records."""

    @property
    def pair(self) -> tuple[str, str]:
        """Names of the fields of {prompt, completion}."""
        return self.prompt or "prompt", self.completion or "completion"

    @property
    def lists(self) -> tuple[str, ...]:
        """Names of the field of messages, the first of which counts."""
        return (self.messages,) if self.messages else _MESSAGE_FIELDS

    def columns_of(self, format: Format) -> tuple[str, ...]:
        """Every name that a format may ask for."""
        asked: dict[Format, tuple[str, ...]] = {
            "text": (self.text,),
            "completion": self.pair,
            "instruction": ("instruction", "input", "output"),
            "messages": (*self.lists, _SYSTEM, "tools"),
        }
        return asked[format]


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and what shall follow it."""

    prompt: str
    completion: str
    instruction: str = ""
    """The question alone, where the prompt frames it."""

    @property
    def identity(self) -> str:
        """What the held-out split is decided by."""
        return json.dumps([self.prompt, self.completion])

    @property
    def texts(self) -> tuple[str, ...]:
        """What a tokenizer may be trained on."""
        return self.prompt, self.completion


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages of which those of the assistant shall be learned."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[Any, ...] = ()

    @property
    def identity(self) -> str:
        """What the held-out split is decided by: the words, whatever the template makes of them."""
        return json.dumps([self.messages, self.tools])

    @property
    def texts(self) -> tuple[str, ...]:
        """What a tokenizer may be trained on."""
        return tuple(text for message in self.messages if isinstance(text := message.get("content"), str))


Example = str | Pair | Conversation


def to_example(record: RawRecord, fields: Fields) -> Example | BadRecord | None:
    """Return the example of a record, what is wrong with it, or None for what is no record at all."""
    kind = record.file.format
    if kind == "text":
        return to_text(record, fields.text)
    values = to_fields(record)
    if values is None or isinstance(values, BadRecord):
        return values
    where = f"{record.file.path}:{record.line}"
    if kind == "messages":
        return _conversation(values, fields, where)
    return _instruction(values, where) if kind == "instruction" else _pair(values, fields, where)


def find_formats(corpus: Corpus, fields: Fields) -> Corpus:
    """Say of every file of records which format it holds."""
    return Corpus(tuple(replace(file, format=_format_of(file, fields)) for file in corpus.files), corpus.left_out)


def sample_text(record: RawRecord, fields: Fields) -> tuple[str, str]:
    """Return what a tokenizer may learn from a record, and what the held-out split is decided by; else two empty."""
    found = to_example(record, fields)
    if isinstance(found, (Pair, Conversation)):
        return "\n".join(found.texts), found.identity
    return (found, found) if isinstance(found, str) else ("", "")


def _format_of(file: SourceFile, fields: Fields) -> Format:
    if file.kind in ("text", "docstrings"):
        return file.format
    return _guess(_names(file, fields), fields) if fields.format == "auto" else fields.format


def _guess(names: Collection[str], fields: Fields) -> Format:
    """The first format that has all its fields; those whose fields were named come before the others.

    A text beside an example is most often the same, laid out for another model: it comes last.
    """
    asked_pair, asked_messages = bool(fields.prompt or fields.completion), bool(fields.messages)
    pair = all(name in names for name in fields.pair)
    messages = any(name in names for name in fields.lists)
    candidates: list[tuple[bool, Format]] = [
        (asked_pair and pair, "completion"),
        (asked_messages and messages, "messages"),
        (fields.text != _TEXT and fields.text in names, "text"),
        (messages, "messages"),
        (pair, "completion"),
        ("instruction" in names and "output" in names, "instruction"),
        (fields.text in names, "text"),
        # So that a wrong name is called one.
        (asked_pair, "completion"),
        (asked_messages, "messages"),
        (True, "text"),
    ]
    return next(format for fits, format in candidates if fits)


def _names(file: SourceFile, fields: Fields) -> Collection[str]:
    """Field names of a file: its columns, or those of its first good record."""
    if file.kind == "parquet":
        return _column_names(file)
    with closing(read_records(file, fields.text)) as records:
        for record in islice(records, _PEEKED):
            values = to_fields(record)
            if isinstance(values, dict):
                return values.keys()
    return ()


def _column_names(file: SourceFile) -> Collection[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(file.path).names
    except (OSError, pa.ArrowException):
        return ()  # reading it says what is wrong


def _pair(values: dict[str, Any], fields: Fields, where: str) -> Pair | BadRecord:
    prompt, completion = (text_of(values, name, where) for name in fields.pair)
    if isinstance(prompt, BadRecord) or isinstance(completion, BadRecord):
        return prompt if isinstance(prompt, BadRecord) else completion  # pyright: ignore[reportReturnType]
    if not completion.strip():
        return BadRecord("no_target", where, f"field {fields.pair[1]!r} is empty: there is nothing to answer")
    return Pair(prompt, completion)


def _instruction(values: dict[str, Any], where: str) -> Pair | BadRecord:
    given = values if values.get("input") is not None else values | {"input": ""}
    instruction, more, output = (text_of(given, name, where) for name in ("instruction", "input", "output"))
    for text in (instruction, more, output):
        if isinstance(text, BadRecord):
            return text
    assert isinstance(instruction, str) and isinstance(more, str) and isinstance(output, str), "bad ones are returned"
    if not output.strip():
        return BadRecord("no_target", where, "field 'output' is empty: there is nothing to answer")
    frame = _ALPACA_INPUT if more.strip() else _ALPACA
    asked = f"{instruction}\n\n{more}" if more.strip() else instruction
    return Pair(frame.format(instruction=instruction, input=more), output, asked)


def _conversation(values: dict[str, Any], fields: Fields, where: str) -> Conversation | BadRecord:
    name = next((name for name in fields.lists if name in values), fields.lists[0])
    if name not in values:
        return text_of({key: "" for key in values}, name, where)  # pyright: ignore[reportReturnType] - it is missing
    listed = values[name]
    if not isinstance(listed, list) or not listed or not all(isinstance(message, dict) for message in listed):
        return BadRecord("not_text", where, f"field {name!r} is not a list of messages but {json.dumps(listed)[:40]}")
    messages = tuple(_message(message) for message in listed)
    for number, message in enumerate(messages, 1):
        if not isinstance(message.get("role"), str):
            return BadRecord("not_text", where, f"message {number} has no role")
    if not any(message["role"] == ASSISTANT and _says_something(message) for message in messages):
        return BadRecord("no_target", where, f"no message of the role {ASSISTANT!r} says anything")
    if _has_half(listed):
        return BadRecord("not_utf8", where, f"field {name!r} holds half of a surrogate pair")
    tools = _tools(values, where)
    if isinstance(tools, BadRecord):
        return tools
    begun = _with_system(messages, values, where)
    return begun if isinstance(begun, BadRecord) else Conversation(begun, tools)


def _tools(values: dict[str, Any], where: str) -> tuple[Any, ...] | BadRecord:
    """The tools beside the messages; a string of JSON stands for the list in it."""
    tools = values.get("tools")
    if tools is None:
        return ()
    try:
        listed = json.loads(tools) if isinstance(tools, str) else tools
    except (ValueError, RecursionError):
        listed = None
    if not isinstance(listed, list):
        return BadRecord("not_text", where, f"field 'tools' is not a list but {json.dumps(tools)[:40]}")
    if _has_half(listed):
        return BadRecord("not_utf8", where, "field 'tools' holds half of a surrogate pair")
    return tuple(listed)


def _with_system(
    messages: tuple[dict[str, Any], ...], values: dict[str, Any], where: str
) -> tuple[dict[str, Any], ...] | BadRecord:
    """The messages after the turn that a field beside them holds; an empty one holds none."""
    if values.get(_SYSTEM) is None:
        return messages
    system = text_of(values, _SYSTEM, where)
    if isinstance(system, BadRecord) or not system.strip():
        return system if isinstance(system, BadRecord) else messages
    said = [message.get("content") for message in messages if message["role"] == _SYSTEM]
    if said and said != [system]:
        return BadRecord("not_text", where, f"field {_SYSTEM!r} and a message of that role say different things")
    return messages if said else ({"role": _SYSTEM, "content": system}, *messages)


def _has_half(value: Any) -> bool:
    """Tell whether half of a surrogate pair stands in it, which no tokenizer takes."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _says_something(message: dict[str, Any]) -> bool:
    content = message.get("content")
    return bool(content.strip() if isinstance(content, str) else content or message.get("tool_calls"))


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """A message under the names that templates read; ShareGPT's are others."""
    if "role" in message or "from" not in message:
        return message
    role = message["from"]
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {"role": _ROLES.get(role, role) if isinstance(role, str) else role, "content": message.get("value")} | rest
