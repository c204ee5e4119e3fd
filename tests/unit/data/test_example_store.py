"""Examples become a store whose answers are marked; what can't be learned from is counted, named, handled as asked."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import ConfigError, DataError
from configs.schema import StoreConfig
from engine.data.encoding import text_hash
from engine.data.examples import Pair
from engine.data.options import PrepareOptions
from engine.data.prepare import Prepared, prepare, prepare_from_config
from engine.data.sources import STDLIB_DOCS
from engine.data.store import TokenStore
from engine.data.tokenizer import Tokenizer
from tests.unit.data.conftest import make_texts
from tools import prepare as command

Make = Callable[..., Prepared]
PAIRS = [(f"{text[: 9 + n % 7 * 5]}?", text[9 + n % 7 * 5 :]) for n, text in enumerate(make_texts(80))]


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    return write(tmp_path / "pairs.jsonl", [{"prompt": prompt, "completion": answer} for prompt, answer in PAIRS])


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def make(tmp_path: Path, tokenizer_file: Path) -> Make:
    def made(*sources: Path, name: str = "store", **options: Any) -> Prepared:
        given = {"tokenizer": tokenizer_file, "workers": 1} | options
        return prepare(PrepareOptions(sources=tuple(map(str, sources)), out=tmp_path / name, **given))

    return made


def examples_of(path: Path, split: Any) -> list[tuple[list[int], list[bool]]]:
    store = TokenStore.open(path, verify="full").split(split)
    bounds = store.offsets.tolist()
    return [(store.read(a, b).tolist(), store.read_answers(a, b).tolist()) for a, b in itertools.pairwise(bounds)]


def test_a_store_of_examples_gives_back_tokens_and_marks(make: Make, pairs_file: Path, tokenizer_file: Path) -> None:
    path = make(pairs_file, heldout_fraction=0.2, shard_bytes=500).path
    assert TokenStore.open(path).has_answers
    tokenizer = Tokenizer(tokenizer_file)
    held = [text_hash(Pair(*pair).identity) < 0.2 * 2**64 for pair in PAIRS]
    for split, wanted in (("train", False), ("heldout", True)):
        expected = []
        for (prompt, answer), side in zip(PAIRS, held, strict=True):
            asked, said = tokenizer.encode(prompt), [*tokenizer.encode(answer), tokenizer.eos_id]
            if side == wanted:
                expected.append((asked + said, [False] * len(asked) + [True] * len(said)))
        assert expected and examples_of(path, split) == expected
    manifest = TokenStore.open(path).manifest
    answers = sum(sum(marks) for split in ("train", "heldout") for _, marks in examples_of(path, split))
    assert manifest.preparation["examples"] == {
        "formats": {"completion": 1},
        "answer_tokens": answers,
        "seq_len": 0,
        "truncated": {"count": 0, "examples": []},
    }
    assert manifest.preparation["inexact_documents"] == 0


def test_marks_are_part_of_a_stores_identity_and_old_stores_have_none(make: Make, pairs_file: Path) -> None:
    made = make(pairs_file)
    marks = made.path / "train" / "answers.bin"
    assert marks.stat().st_size == made.manifest.splits["train"].tokens
    data = bytearray(marks.read_bytes())
    data[3] ^= 1
    marks.write_bytes(data)
    with pytest.raises(DataError, match=r"train/answers\.bin was altered: another sha256"):
        TokenStore.open(made.path, verify="full")


def test_a_store_of_texts_stays_as_it_was(make_store: Make, texts: list[str]) -> None:
    made = make_store(texts)
    store = TokenStore.open(made.path)
    assert not store.has_answers and "examples" not in made.manifest.preparation
    assert sorted(made.manifest.splits["train"].files) == ["bytes.bin", "offsets.bin", "tokens-00000.bin"]
    with pytest.raises(AssertionError, match="a store without marks"):
        store.split("train").read_answers(0, 1)


def test_a_manifest_with_marks_on_one_side_is_refused(make: Make, pairs_file: Path) -> None:
    path = make(pairs_file, heldout_fraction=0.2).path
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["splits"]["heldout"]["files"]["answers.bin"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="files of heldout and its counts disagree"):
        TokenStore.open(path)


def test_texts_asked_for_as_examples_are_all_answer(make: Make, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "laid"}, {"text": "rope"}])
    assert not TokenStore.open(make(path, name="plain").path).has_answers
    assert all(all(marks) for _, marks in examples_of(make(path, name="marked", format="text").path, "train"))


def test_the_held_out_example_of_a_small_store_keeps_its_marks(make: Make, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "rope?", "completion": text} for text in ("laid", "spun", "cut")])
    made = make(path, heldout_fraction=1e-9).path
    for split in ("train", "heldout"):
        for ids, marks in examples_of(made, split):
            assert 0 < sum(marks) < len(ids) and marks[-1]


def test_workers_change_nothing(make: Make, pairs_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.data.encoding.CHUNK_BYTES", 1000)
    one, two = make(pairs_file, name="one"), make(pairs_file, name="two", workers=2)
    assert one.manifest.fingerprint == two.manifest.fingerprint


# ------------------------------------------------------------------------------------------- what can't be learned from


def test_examples_without_a_target_are_counted_and_named(make: Make, tmp_path: Path) -> None:
    records = [{"prompt": "a", "completion": text} for text in ("x", " ", "y", "", "z")]
    path = write(tmp_path / "a.jsonl", records)
    with pytest.raises(DataError) as caught:
        make(path)
    what = f"{path}:2: field 'completion' is empty: there is nothing to answer"
    do = "Repair it, or leave such records out: tools/prepare.py --on-bad-record skip."
    assert str(caught.value) == f"{what}. {do}"
    made = make(path, on_bad_record="skip")
    assert made.bad_records == {"no_target": 2}
    assert made.manifest.preparation["bad_records"]["examples"][0] == f"no_target: {what}"


def test_nothing_but_examples_without_a_target_is_refused(make: Make, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": ""}] * 3)
    with pytest.raises(DataError) as caught:
        make(path, on_bad_record="skip")
    first = f"The first: no_target: {path}:1: field 'completion' is empty: there is nothing to answer"
    assert str(caught.value) == f"'{path}': no document in 1 files (3 no_target). {first}"


@pytest.fixture
def lengths(pairs_file: Path, tokenizer_file: Path) -> list[tuple[int, int]]:
    """Tokens of each example's prompt and of all of it."""
    tokenizer = Tokenizer(tokenizer_file)
    encode = tokenizer.encode
    return [(len(encode(prompt)), len(encode(prompt)) + len(encode(answer)) + 1) for prompt, answer in PAIRS]


def test_an_example_that_is_too_long_ends_the_preparation(
    make: Make, pairs_file: Path, lengths: list[tuple[int, int]]
) -> None:
    first = next(index for index, (_, size) in enumerate(lengths) if size > 60)
    with pytest.raises(DataError) as caught:
        make(pairs_file, seq_len=60)
    what = f"{pairs_file}:{first + 1}: an example of {lengths[first][1]} tokens, more than --seq-len 60"
    do = "Raise --seq-len, or leave such records out: tools/prepare.py --on-long-example skip (or truncate)."
    assert str(caught.value) == f"{what}. {do}"


def test_or_is_left_out(make: Make, pairs_file: Path, lengths: list[tuple[int, int]]) -> None:
    made = make(pairs_file, seq_len=60, on_long_example="skip", heldout_fraction=0.0)
    sizes = [size for _, size in lengths]
    assert made.bad_records == {"over_seq_len": sum(size > 60 for size in sizes)}
    assert [len(ids) for ids, _ in examples_of(made.path, "train")] == [size for size in sizes if size <= 60]


def test_or_is_cut_unless_nothing_of_the_answer_is_left(
    make: Make, pairs_file: Path, lengths: list[tuple[int, int]]
) -> None:
    limit = int(np.median([prompt for prompt, _ in lengths]))
    options = {"seq_len": limit, "on_long_example": "truncate", "on_bad_record": "skip", "heldout_fraction": 0.0}
    made = make(pairs_file, **options)
    lost = sum(prompt >= limit for prompt, _ in lengths)
    assert 0 < lost < len(PAIRS)
    assert made.bad_records == {"no_target": lost}
    examples = examples_of(made.path, "train")
    assert [len(ids) for ids, _ in examples] == [min(limit, size) for prompt, size in lengths if prompt < limit]
    assert all(any(marks) for _, marks in examples)
    cut = made.manifest.preparation["examples"]["truncated"]
    assert cut["count"] == sum(size > limit > prompt for prompt, size in lengths)
    assert len(cut["examples"]) == min(20, cut["count"])
    assert all(f"tokens, more than --seq-len {limit}" in example for example in cut["examples"])


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\\n' }}{% endfor %}"
)
CHAT = [
    {"messages": [{"role": "user", "content": f"rope {number}?"}, {"role": "assistant", "content": "laid"}]}
    for number in range(9)
]


def test_conversations_are_laid_out_by_a_template_that_the_store_keeps(
    make: Make, tmp_path: Path, tokenizer_file: Path
) -> None:
    path = write(tmp_path / "chat.jsonl", CHAT)
    with pytest.raises(DataError) as caught:
        make(path)
    do = "Give one with --chat-template FILE."
    what = "has no chat template (conversations are laid out by one)"
    assert str(caught.value) == f"{tokenizer_file}: {what}. {do}"
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    made = make(path, chat_template=tmp_path / "mine.jinja", heldout_fraction=0.0).path
    assert (made / "tokenizer" / "chat_template.jinja").read_text() == TEMPLATE
    TokenStore.open(made, verify="full")
    tokenizer = Tokenizer(tokenizer_file)
    ids, marks = examples_of(made, "train")[0]
    asked = tokenizer.encode("user: rope 0?\nassistant: laid")
    assert ids == [*asked, tokenizer.eos_id, *tokenizer.encode("\n")]
    assert tokenizer.decode([token for token, mark in zip(ids, marks, strict=True) if mark]).strip() == "laid"
    # Another store made with this one's tokenizer folder has the template too.
    again = make(path, name="again", tokenizer=made / "tokenizer", heldout_fraction=0.0)
    assert again.manifest.fingerprint == TokenStore.open(made).fingerprint


def test_a_template_that_cannot_mark_answers_is_named(make: Make, tmp_path: Path) -> None:
    path = write(tmp_path / "chat.jsonl", CHAT)
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(DataError) as caught:
        make(path, chat_template=tmp_path / "mine.jinja")
    what = "the chat template doesn't mark answers, and message 2 changes the text around it"
    do = (
        "Give a template with {% generation %} blocks by --chat-template, or leave such records out: "
        "tools/prepare.py --on-bad-record skip."
    )
    assert str(caught.value) == f"{path}:1: {what}. {do}"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"on_long_example": "skip"},
            "--on-long-example = 'skip': has no effect without --seq-len. Give the longest length that may stay: "
            "--seq-len N.",
        ),
        (
            {"format": "messages", "prompt_field": "q"},
            "--prompt-field = 'q': has no effect under --format messages. Use --format completion, or remove it.",
        ),
        (
            {"messages_field": "m", "completion_field": "a"},
            "--messages-field = 'm': excludes --prompt-field and --completion-field.",
        ),
        (
            {"chat_template": Path("x.jinja")},
            "--chat-template = 'x.jinja': has no effect without messages. Lay pairs out as conversations with --chat, "
            "or remove it.",
        ),
    ],
)
def test_options_without_effect_are_refused(
    make: Make, pairs_file: Path, options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make(pairs_file, **options)
    assert str(caught.value) == expected


def test_options_of_examples_are_refused_for_texts(make: Make, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "laid"}])
    with pytest.raises(ConfigError) as caught:
        make(path, seq_len=8, chat=True)
    why = "plain documents are cut to sequences by the run"
    assert str(caught.value) == (
        f"--seq-len = 8: has no effect without examples ({why}). Remove it.\n"
        "--chat: has no effect here (no file holds prompts and completions, or instructions). Remove it."
    )


def test_the_command_maps_fields_and_says_what_became_of_the_examples(
    tmp_path: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": prompt, "answer": answer} for prompt, answer in PAIRS])
    arguments = ["--prompt-field", "question", "--completion-field", "answer", "--seq-len", "60"]
    arguments += ["--on-long-example", "truncate", "--tokenizer", str(tokenizer_file), "--out", str(tmp_path / "store")]
    assert command.main([str(path), *arguments]) == 0
    printed = capsys.readouterr().out
    made = TokenStore.open(tmp_path / "store").manifest.preparation["examples"]
    assert f" {made['answer_tokens']:,} tokens, " in printed and "files by format: 1 completion" in printed
    assert f"  cut to 60 tokens: {made['truncated']['count']:,} examples; the first:\n    {path}:" in printed
    assert "--objective.kind sft --data.packing best_fit --data.document_mask true" in printed


def test_a_config_may_name_the_questions_about_the_standard_library(
    tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = tmp_path / "lib"
    few.mkdir()
    (few / "rope.py").write_text('def lay(strands):\n    """Lay strands into a rope."""\n')
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(few))
    config = StoreConfig(path=str(tmp_path / "store"), sources=(STDLIB_DOCS,), tokenizer=str(tokenizer_file))
    store = TokenStore.open(prepare_from_config(config))
    assert store.has_answers
    ids = store.split("train").read(0, store.split("train").num_tokens).tolist()
    assert Tokenizer(tokenizer_file).decode(ids) == "What does rope.lay(strands) do?\nLay strands into a rope."
