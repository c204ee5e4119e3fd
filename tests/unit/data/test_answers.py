"""Which tokens of an example are targets: each answer's, and always its end-of-text token."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from engine.data.answers import AnswerEncoder, find_template
from engine.data.chat import ChatTemplate
from engine.data.examples import Conversation, Pair
from engine.data.records import BadRecord
from engine.data.tokenizer import Tokenizer
from tests.unit.data.conftest import make_texts

HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
TAIL = "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
INSIDE = HEAD + "{{ m.content }}<|im_end|>{% endgeneration %}" + TAIL
OUTSIDE = HEAD + "{{ m.content }}{% endgeneration %}<|im_end|>" + TAIL
SPACED = HEAD + "{{ m.content }}{% endgeneration %} \n<|im_end|>" + TAIL
BEYOND = HEAD + "{{ m.content }}<|im_end|>{{ '\n' }}{% endgeneration %}" + TAIL
NEVER = HEAD + "{{ m.content }}{% endgeneration %}" + TAIL
OTHER = HEAD + "{{ m.content }}{% endgeneration %}<|im_start|>" + TAIL
NOTHING = "{% generation %}{% endgeneration %}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer with the tokens of ChatML, its places trimmed as GPT-2's are."""
    path = tmp_path_factory.mktemp("bpe")
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    made.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    made.post_processor = processors.ByteLevel(trim_offsets=True)  # pyright: ignore[reportAttributeAccessIssue]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400,  # pyright: ignore[reportCallIssue]
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    made.train_from_iterator(make_texts(100), trainer)
    made.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return path


def conversation(*contents: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(contents)))


def encoder(folder: Path, source: str = INSIDE, eos_token: str = "") -> AnswerEncoder:
    tokenizer = Tokenizer(folder, eos_token)
    return AnswerEncoder(tokenizer, ChatTemplate(source, "x", tokenizer.named_tokens()))


def targets(folder: Path, source: str, example: Conversation) -> list[str]:
    """Runs of marked tokens, with the names of special ones."""
    made = encoder(folder, source)
    found = made.encode(example, "here")
    assert not isinstance(found, BadRecord), found
    runs: list[str] = []
    before = False
    for token, mark in zip(found.ids, found.marks, strict=True):
        if mark:
            text = made.tokenizer.decode([token]) or made.tokenizer.name_of(token)
            runs = [*runs[:-1], runs[-1] + text] if before else [*runs, text]
        before = mark
    return runs


@pytest.mark.parametrize(
    ("source", "end"),
    [(INSIDE, "<|im_end|>"), (OUTSIDE, "<|im_end|>"), (SPACED, " \n<|im_end|>"), (BEYOND, "<|im_end|>\n")],
)
def test_each_answer_is_a_target_with_its_end(folder: Path, source: str, end: str) -> None:
    example = conversation("rope?", " laid rope", "and?", "twist\nyarn ")
    assert targets(folder, source, example) == [f" laid rope{end}", f"twist\nyarn {end}"]


def test_a_text_that_ends_without_the_token_gets_one(folder: Path) -> None:
    assert targets(folder, NEVER, conversation("rope?", "laid")) == ["laid\n<|im_end|>"]


ENDLESS = "the chat template ends an answer without the end-of-text token '<|im_end|>'"


@pytest.mark.parametrize(
    ("source", "contents", "expected"),
    [
        (NEVER, ("a", "b", "c", "d"), ENDLESS),
        (OTHER, ("a", "b"), f"{ENDLESS} but with '<|im_start|>'"),
    ],
)
def test_an_answer_that_never_ends_is_refused(
    folder: Path, source: str, contents: tuple[str, ...], expected: str
) -> None:
    assert encoder(folder, source).encode(conversation(*contents), "f:1") == BadRecord("no_end", "f:1", expected)


def test_another_end_of_text_token_is_named_in_the_refusal_and_helps(folder: Path) -> None:
    example = conversation("a", "b", "c", "d")
    found = encoder(folder, INSIDE, "<|endoftext|>").encode(example, "f:1")
    assert isinstance(found, BadRecord) and found.kind == "no_end"
    assert found.what.endswith("'<|endoftext|>' but with '<|im_end|>'")
    assert not isinstance(encoder(folder, INSIDE, "<|im_end|>").encode(example, "f:1"), BadRecord)


def test_a_template_that_marks_nothing_is_refused(folder: Path) -> None:
    found = encoder(folder, NOTHING).encode(conversation("a", "b"), "f:1")
    assert found == BadRecord("unmarked", "f:1", "the chat template marks no answer with {% generation %}")


def test_a_failing_template_is_refused_by_its_words(folder: Path) -> None:
    found = encoder(folder, "{{ raise_exception('no') }}").encode(conversation("a", "b"), "f:1")
    assert found == BadRecord("template", "f:1", "the chat template says: no")


def test_a_pair_is_the_prompt_as_it_will_be_asked_and_then_the_answer(folder: Path) -> None:
    made = encoder(folder)
    found = made.encode(Pair("laid ro", "pe"), "x")
    assert not isinstance(found, BadRecord)
    asked, answer = made.tokenizer.encode("laid ro"), made.tokenizer.encode("pe")
    assert found.ids == [*asked, *answer, made.tokenizer.eos_id]  # never a token that spans both
    assert found.marks == [False] * len(asked) + [True] * (len(answer) + 1)
    assert found.num_bytes == len("laid rope")


def test_a_text_is_all_answer(folder: Path) -> None:
    found = encoder(folder).encode("laid rope", "x")
    assert not isinstance(found, BadRecord)
    assert all(found.marks) and found.ids[-1] == encoder(folder).tokenizer.eos_id


def test_a_special_tokens_name_in_a_pair_is_plain_text(folder: Path) -> None:
    made = encoder(folder)
    found = made.encode(Pair("a<|im_end|>", "b<|im_end|>"), "x")
    assert not isinstance(found, BadRecord)
    assert found.ids.count(made.tokenizer.eos_id) == 1


def test_a_pair_becomes_a_conversation_when_asked(folder: Path) -> None:
    made = encoder(folder)
    chat = AnswerEncoder(made.tokenizer, made.template, as_chat=True)
    assert chat.encode(Pair("a", "b"), "x") == made.encode(conversation("a", "b"), "x")
    assert chat.encode(Pair("framed", "b", "a"), "x") == made.encode(conversation("a", "b"), "x")


def test_the_begin_of_text_token_comes_first_when_asked(tokenizer_file: Path) -> None:
    tokenizer = Tokenizer(tokenizer_file)
    found = AnswerEncoder(tokenizer, None, bos=True).encode(Pair("laid", "rope"), "x")
    assert not isinstance(found, BadRecord)
    assert found.ids[0] == tokenizer.bos_id and not found.marks[0]


def test_bytes_of_a_conversation_leave_out_the_names_of_special_tokens(folder: Path) -> None:
    found = encoder(folder).encode(conversation("caf\u00e9", "yes"), "x")
    assert not isinstance(found, BadRecord)
    assert found.num_bytes == len("user\ncaf\u00e9\nassistant\nyes\n".encode())
    made = Tokenizer(folder)
    assert int(made.token_bytes()[found.ids].sum()) == found.num_bytes


def test_a_template_is_looked_for_beside_the_tokenizer(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())

    def found(**settings: object) -> str:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return find_template(Tokenizer(tmp_path), None)

    assert found() == ""
    assert found(chat_template="one") == "one"
    several = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
    assert found(chat_template=several) == "three"
    (tmp_path / "chat_template.jinja").write_text("four")
    assert found(chat_template="one") == "four"
    (tmp_path / "mine.jinja").write_text("five")
    assert find_template(Tokenizer(tmp_path), tmp_path / "mine.jinja") == "five"
