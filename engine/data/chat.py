"""A conversation -> the text that a tokenizer's own chat template makes of it, and which characters are answers.

Templates are jinja2 in a sandbox with what transformers' apply_chat_template gives them (its chat_template_utils.py is
the reference): the same text comes out. A template that has {% generation %} blocks says itself which characters are an
answer. Of any other, an answer is what the text gains when the message is added to those before it; where the text
changes elsewhere too, nobody can say, and the conversation is refused. Templates are code of strangers: nothing but
plain data goes in.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Literal, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from configs.errors import DataError, problem

Message = dict[str, Any]
Spans = list[tuple[int, int]]

GIVE = "Give a jinja template, as transformers takes it."
ASSISTANT = "assistant"
_REASONING = ("reasoning_content", "thinking", "reasoning")
# What compiling a template and its own arithmetic on a message can raise, as the Python that jinja makes of it: a name
# that isn't there is an infinite constant. A template's raise_exception is a TemplateError.
_FAILURES = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, NameError, RuntimeError,
    SyntaxError, TypeError, ValueError,
)  # fmt: skip


class RenderError(Exception):
    """A conversation of which the template makes nothing that could be trained on."""

    def __init__(self, kind: Literal["template", "unmarked"], what: str) -> None:
        """Take a kind of bad record, and what is wrong with it."""
        super().__init__(what)
        self.kind: Literal["template", "unmarked"] = kind
        self.what = what


class ChatTemplate:
    """A compiled template and the names of special tokens that it may write."""

    def __init__(self, source: str, where: str, tokens: dict[str, str]) -> None:
        """Compile; raises DataError for what is no template."""
        if _encoded(source) != source:
            raise DataError(problem(where, "", "is not a chat template", "it holds half of a surrogate pair", GIVE))
        self._environment = _environment()
        try:
            self._template = self._environment.from_string(source)
        except _FAILURES as error:
            raise DataError(problem(where, "", "is not a chat template", _said(error), GIVE)) from None
        self._tokens = tokens

    def render(self, messages: list[Message], tools: list[Any] | None = None) -> tuple[str, Spans]:
        """Return the text of a conversation and the characters of its answers; raises RenderError."""
        messages = [_as_templates_read(message) for message in messages]
        try:
            marked = _Answers.of(self._environment).known
            text, spans = self._marked(messages, tools) if marked else self._by_growth(messages, tools)
        except _FAILURES as error:
            raise RenderError("template", f"the chat template says: {_said(error)}") from None
        if _encoded(text) != text:
            raise RenderError("template", "the chat template makes half of a surrogate pair")
        return text, spans

    def _text(self, messages: list[Message], tools: list[Any] | None, prompt: bool = False) -> str:
        return self._template.render(
            messages=messages, tools=tools, documents=None, add_generation_prompt=prompt, **self._tokens
        )

    def _marked(self, messages: list[Message], tools: list[Any] | None) -> tuple[str, Spans]:
        blocks: list[str] = []
        with _Answers.of(self._environment).recording(blocks) as found:
            for block in self._template.generate(
                messages=messages, tools=tools, documents=None, add_generation_prompt=False, **self._tokens
            ):
                blocks.append(block)  # noqa: PERF402 - the extension reads the list while it grows
        text = "".join(blocks)
        if any(text[start : start + len(answer)] != answer for start, answer in found):
            raise RenderError("unmarked", "the chat template moves its {% generation %} blocks about")
        return text, [(start, start + len(answer)) for start, answer in found if answer]

    def _by_growth(self, messages: list[Message], tools: list[Any] | None) -> tuple[str, Spans]:
        text = self._text(messages, tools)
        spans = []
        for index, message in enumerate(messages):
            if message.get("role") != ASSISTANT:
                continue
            before = self._text(messages[:index], tools, prompt=True)
            after = self._text(messages[: index + 1], tools)
            answer = after[len(before) :]
            content = message.get("content")
            said = content.strip() in answer if isinstance(content, str) else True
            if not (after.startswith(before) and text.startswith(after) and said):
                what = f"the chat template doesn't mark answers, and message {index + 1} changes the text around it"
                raise RenderError("unmarked", what)
            # What follows the end-of-text token belongs to the next turn, if it isn't the answer that names the token.
            eos = self._tokens["eos_token"]
            if _holds_inside(message, eos):
                what = f"the chat template doesn't mark answers, and message {index + 1} holds {eos!r}"
                raise RenderError("unmarked", what)
            end = answer.find(eos)
            size = end + len(eos) if end >= 0 else len(answer)
            spans.append((len(before), len(before) + size))
        return text, spans


def _holds_inside(message: Message, eos: str) -> bool:
    """Tell whether the name of the end-of-text token stands anywhere but at the end of what a message says."""
    content = message.get("content")
    if isinstance(content, str):
        message = message | {"content": content.rstrip().removesuffix(eos)}
    return eos in json.dumps(message, ensure_ascii=False)


def _said(error: BaseException) -> str:
    return _encoded(str(error)) or type(error).__name__


def _encoded(text: str) -> str:
    """A text that can be written: half of a surrogate pair becomes its number."""
    return text.encode(errors="backslashreplace").decode()


class _Answers(Extension):
    """The {% generation %} .. {% endgeneration %} block."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.known = False
        """The template has the block."""
        self._blocks: list[str] | None = None
        self._found: list[tuple[int, str]] = []

    @classmethod
    def of(cls, environment: jinja2.Environment) -> "_Answers":
        found = environment.extensions[cls.identifier]
        assert isinstance(found, cls)
        return found

    def parse(self, parser: Parser) -> nodes.Node:
        self.known = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    @contextmanager
    def recording(self, blocks: list[str]) -> Iterator[list[tuple[int, str]]]:
        """Note (first character, text) of each block while `blocks` grows into the whole text."""
        self._blocks, self._found = blocks, []
        try:
            yield self._found
        finally:
            self._blocks = None

    def _note(self, caller: Macro) -> str:
        answer = caller()
        if self._blocks is not None:
            self._found.append((sum(map(len, self._blocks)), str(answer)))
        return answer


class _PlainNamespace(Namespace):
    """jinja's namespace without a way to Python's internals."""

    def __init__(self, *pairs: Any, **attributes: Any) -> None:
        held = dict(*pairs, **attributes)
        for name in held:
            _check_name(name)
        super().__init__(held)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.TemplateError(f"a namespace may not hold {name!r}")


def _environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Answers, loopcontrols])
    made.filters["tojson"] = _to_json
    made.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda text: datetime.now().strftime(text),
        "dict": lambda *pairs, **named: dict(*pairs, **named),
        "namespace": _PlainNamespace,
    }
    return made


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as it is: jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _as_templates_read(message: Message) -> Message:
    """A message without its nulls, its reasoning under the names that templates know."""
    said = {key: value for key, value in message.items() if value is not None}
    reasoning = next((said[key] for key in _REASONING if key in said), None)
    if reasoning is None:
        return said
    return {"thinking": reasoning, **said, "reasoning_content": reasoning}
