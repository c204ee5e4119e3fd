"""An example -> its tokens, and a mark on each token that is an answer's: the targets of objective `sft`.

The ids are what the model will see when it is asked: of a conversation exactly those of transformers'
apply_chat_template, of a pair the prompt's own ids and then the completion's. Marked are the tokens that hold a
character of an answer, and the end-of-text token behind it: a model that never learns that one never stops. Where a
chat template leaves the token outside of the marked part, it is marked too, with the white space before it; where the
text ends without one, it is added; where other text follows instead, the example is refused.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from configs.errors import DataError, problem
from engine.data.chat import ASSISTANT, GIVE, ChatTemplate, RenderError, Spans
from engine.data.examples import Conversation, Example, Pair
from engine.data.records import BadRecord
from engine.data.tokenizer import Tokenizer
from engine.data.tokenizer_backends import Places

TEMPLATE = "chat_template.jinja"


class Answered(NamedTuple):
    """The tokens of an example."""

    ids: list[int]
    marks: list[bool]
    """Token by token, whether it is an answer's."""
    num_bytes: int
    """UTF-8 bytes of the text, the names of special tokens left out."""


@dataclass(frozen=True, slots=True)
class AnswerEncoder:
    """Encodes examples with one tokenizer and, for conversations, its chat template."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    bos: bool = False
    """Begin pairs and texts with the begin-of-text token; a chat template writes it itself."""
    as_chat: bool = False
    """Lay pairs out as conversations of two messages."""

    def encode(self, example: Example, where: str) -> Answered | BadRecord:
        """Return the tokens of an example, or what keeps it from being trained on."""
        if isinstance(example, str):
            return self._pair("", example)
        if isinstance(example, Pair) and not self.as_chat:
            return self._pair(example.prompt, example.completion)
        if isinstance(example, Pair):
            asked = {"role": "user", "content": example.instruction or example.prompt}
            example = Conversation((asked, {"role": ASSISTANT, "content": example.completion}))
        assert self.template is not None, "who has conversations has a template"
        try:
            text, spans = self.template.render(list(example.messages), list(example.tools) or None)
        except RenderError as error:
            return BadRecord(error.kind, where, error.what)
        return self._conversation(text, spans, _num_answers(example), where)

    def _pair(self, prompt: str, completion: str) -> Answered:
        tokenizer = self.tokenizer
        begin = [tokenizer.bos_id] if self.bos and tokenizer.bos_id is not None else []
        asked = begin + (tokenizer.encode(prompt) if prompt else [])
        answer = tokenizer.encode_more(completion) if prompt else tokenizer.encode(completion)
        ids = [*asked, *answer, tokenizer.eos_id]
        marks = [False] * len(asked) + [True] * (len(answer) + 1)
        return Answered(ids, marks, len(prompt.encode()) + len(completion.encode()))

    def _conversation(self, text: str, spans: Spans, num_answers: int, where: str) -> Answered | BadRecord:
        ids, places = self.tokenizer.encode_special(text)
        if places is None:
            return BadRecord("unmarked", where, "the tokenizer changes the text, so that its answers can't be found")
        runs = _runs(places, spans)
        if not runs:
            return BadRecord("unmarked", where, "the chat template marks no answer with {% generation %}")
        special = self.tokenizer.special_ids
        names = sum(len(text[a:b].encode()) for token, (a, b) in zip(ids, places, strict=True) if token in special)
        blank = [not text[a:b].strip() for a, b in places]
        marks = [False] * len(ids)
        ended = 0
        for start, stop in runs:
            stop, has_end = self._end(ids, blank, stop)
            if stop > len(marks):  # the text ended without an end-of-text token
                ids, marks = [*ids, self.tokenizer.eos_id], [*marks, True]
            marks[start:stop] = [True] * (stop - start)
            ended += has_end
        if ended < min(len(runs), num_answers):
            return BadRecord("no_end", where, self._endless(ids, runs))
        return Answered(ids, marks, len(text.encode()) - names)

    def _end(self, ids: list[int], blank: list[bool], stop: int) -> tuple[int, bool]:
        """Return where an answer of tokens .. stop - 1 ends, and whether by the end-of-text token.

        One place behind the text says that the token must be added there.
        """
        last, after = stop - 1, stop
        while last > 0 and blank[last]:
            last -= 1
        if ids[last] == self.tokenizer.eos_id:
            return stop, True
        while after < len(ids) and blank[after]:
            after += 1
        if after == len(ids) or ids[after] == self.tokenizer.eos_id:
            return after + 1, True
        return stop, False

    def _endless(self, ids: list[int], runs: Spans) -> str:
        """Say that an answer has no end, and which token may be meant to be one."""
        what = f"the chat template ends an answer without the end-of-text token {self.tokenizer.eos_token!r}"
        near = (token for _, stop in runs for token in ids[stop - 1 : stop + 1] if token in self.tokenizer.special_ids)
        instead = next((token for token in near if token != self.tokenizer.eos_id), None)
        return what if instead is None else f"{what} but with {self.tokenizer.name_of(instead)!r}"


def find_template(tokenizer: Tokenizer, given: Path | None) -> str:
    """Return the source of the chat template: the given file, else what is beside the tokenizer; empty if none is."""
    path = given or tokenizer.path.with_name(TEMPLATE)
    if given is not None or path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(problem(str(path), "", "can't be read as a chat template", str(error), GIVE)) from None
    return _template_of(tokenizer.setting("chat_template"))


def _template_of(setting: Any) -> str:
    """The template in tokenizer_config.json: one, or the default one of several."""
    if isinstance(setting, list):
        setting = {item.get("name"): item.get("template") for item in setting if isinstance(item, dict)}
    if isinstance(setting, dict):
        setting = setting.get("default")
    return setting if isinstance(setting, str) else ""


def _runs(places: Places, spans: Spans) -> Spans:
    """First token and the one behind the last of each answer: all tokens that hold a character of it."""
    runs: Spans = []
    token = 0
    for start, stop in spans:
        while token < len(places) and places[token][1] <= start:
            token += 1
        first = token
        while token < len(places) and places[token][0] < stop:
            token += 1
        if token > first:
            runs.append((first, token))
    return runs


def _num_answers(conversation: Conversation) -> int:
    """Count the answers that another speaker, or the end, follows: each needs an end of its own."""
    roles = [str(message["role"]) for message in conversation.messages]
    return sum(role == ASSISTANT != after for role, after in zip(roles, [*roles[1:], ""], strict=True))
