"""What a chat template may do, what it is kept from, and which characters it says are answers."""

from datetime import datetime

import pytest

from configs.errors import DataError
from engine.data.chat import GIVE, ChatTemplate, RenderError

EOS = "<|end|>"
TURNS = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "2"},
]
PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}\n{% endfor %}"
)


def template(source: str, **tokens: str) -> ChatTemplate:
    return ChatTemplate(source, "a.jinja", {"eos_token": EOS} | tokens)


def answers(source: str, messages: list[dict] = TURNS) -> list[str]:
    text, spans = template(source).render(messages)
    return [text[start:stop] for start, stop in spans]


def text_of(source: str, messages: list[dict] = TURNS, **tokens: str) -> str:
    return template(source, **tokens).render(messages)[0]


def marked(expression: str) -> str:
    """A template that says one thing, so that it needs no message."""
    return "{% generation %}{% endgeneration %}" + expression


@pytest.mark.parametrize("source", [PLAIN, MARKED])
def test_every_answer_is_found_with_its_end(source: str) -> None:
    assert answers(source) == ["1<|end|>", "2<|end|>"]


def test_answers_that_repeat_the_question_are_told_apart() -> None:
    text, spans = template(PLAIN).render([{"role": "user", "content": "1"}, {"role": "assistant", "content": "1"}])
    assert spans == [(text.index("<assistant>") + len("<assistant>"), len(text) - 1)]


def test_blocks_and_lines_are_trimmed() -> None:
    source = "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\n"
    assert text_of(marked(source)) == "one?\n1\ntwo?\n2\n"


def test_what_templates_are_given() -> None:
    today = datetime.now().strftime("%Y")
    assert text_of(marked("{{ strftime_now('%Y') }}")) == today
    assert text_of(marked("{{ bos_token }}{{ eos_token }}"), bos_token="<s>") == f"<s>{EOS}"
    assert text_of(marked("{{ {'b': '<\u00e9>', 'a': 1} | tojson }}")) == '{"b": "<\u00e9>", "a": 1}'
    assert text_of(marked("{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}x{% endfor %}")) == "x"
    count = "{% set n = namespace(i=0) %}{% for m in messages %}{% set n.i = n.i + 1 %}{% endfor %}{{ n.i }}"
    assert text_of(marked(count)) == "4"
    assert text_of(marked("{{ dict(a=1).a }}{{ tools is none }}")) == "1True"


def test_nulls_are_absent_and_reasoning_has_one_name() -> None:
    source = marked("{% for m in messages %}{{ m.content is defined }} {{ m.reasoning_content }};{% endfor %}")
    assert text_of(source, [{"role": "assistant", "content": None, "thinking": "hm"}]) == "False hm;"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{% set n = namespace(_x=1) %}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ none + 'x' }}",
        "{{ messages[9].role.x }}",
    ],
)
def test_what_a_template_may_not_do_refuses_the_conversation(source: str) -> None:
    with pytest.raises(RenderError) as caught:
        template(marked(source)).render(TURNS)
    assert caught.value.kind == "template"
    assert caught.value.what.startswith("the chat template says: ")


def test_a_templates_own_refusal_is_passed_on() -> None:
    with pytest.raises(RenderError) as caught:
        template("{{ raise_exception('roles must alternate') }}").render(TURNS)
    assert caught.value.what == "the chat template says: roles must alternate"


def test_what_is_no_template_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        template("{% for %}")
    why = "Expected an expression, got 'end of statement block'"
    assert str(caught.value) == f"a.jinja: is not a chat template ({why}). {GIVE}"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{% for m in messages %}" * 30 + "{% endfor %}" * 30, "too many statically nested blocks"),
        (f"{{{{ {'(' * 900}1{')' * 900} }}}}", "maximum recursion depth exceeded"),
        (f"{{{{ {'1' * 5000} }}}}", "Exceeds the limit"),
        ("a\ud800", "it holds half of a surrogate pair"),
    ],
)
def test_a_template_that_python_cannot_compile_is_refused(source: str, why: str) -> None:
    with pytest.raises(DataError) as caught:
        template(source)
    assert str(caught.value).startswith(f"a.jinja: is not a chat template ({why}")  # each Python words it differently


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("{{ 'a' * 10**17 }}", "the chat template says: MemoryError"),
        ("{{ 'a'.center(10**17) }}", "the chat template says: MemoryError"),
        ("{{ '%100000000000000000d' | format(1) }}", "the chat template says: MemoryError"),
        ("{{ (1e308 * 10) | int }}", "the chat template says: name 'inf' is not defined"),
        (r"{{ raise_exception('\ud800') }}", r"the chat template says: \ud800"),
        (r"{{ '\ud800' }}", "the chat template makes half of a surrogate pair"),
    ],
)
def test_what_a_template_cannot_make_refuses_the_conversation(expression: str, why: str) -> None:
    for source in (marked(expression), expression + PLAIN):
        with pytest.raises(RenderError) as caught:
            template(source).render(TURNS)
        assert (caught.value.kind, caught.value.what) == ("template", why)


def test_an_answer_that_names_its_end_is_refused_without_marks() -> None:
    turns = [TURNS[0], {"role": "assistant", "content": f"write {EOS} at the end"}]
    with pytest.raises(RenderError) as caught:
        template(PLAIN).render(turns)
    assert caught.value.kind == "unmarked"
    assert caught.value.what == "the chat template doesn't mark answers, and message 2 holds '<|end|>'"
    (span,) = template(MARKED).render(turns)[1]
    assert template(MARKED).render(turns)[0][slice(*span)] == f"write {EOS} at the end{EOS}"
    # One that brings its own end has just one.
    text, ((start, stop),) = template(PLAIN).render([TURNS[0], {"role": "assistant", "content": f"1{EOS}"}])
    assert text[start:stop] == f"1{EOS}"


@pytest.mark.parametrize(
    "source",
    [
        # It forgets the answers of earlier turns, writes them elsewhere, or ends the last one otherwise.
        "{% for m in messages %}<{{ m.role }}>{{ m.content if m.role == 'user' or loop.last }}{% endfor %}",
        "{{ messages[-1].content }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if loop.last %}<|end|>{% endif %}{% endfor %}",
        "{% for m in messages %}<{{ m.role }}>{% endfor %}",
    ],
)
def test_without_marks_a_text_that_changes_elsewhere_is_refused(source: str) -> None:
    with pytest.raises(RenderError) as caught:
        template(source).render(TURNS)
    assert caught.value.kind == "unmarked"
    assert caught.value.what.startswith("the chat template doesn't mark answers, and message ")


def test_marks_that_are_moved_about_are_refused() -> None:
    # The text of a {% set %} block stands where it is printed, not where the block is.
    source = "head{% set late %}{% generation %}answer{% endgeneration %}{% endset %}middle{{ late }}"
    with pytest.raises(RenderError) as caught:
        template(source).render(TURNS)
    assert caught.value.kind == "unmarked"
    assert caught.value.what == "the chat template moves its {% generation %} blocks about"
