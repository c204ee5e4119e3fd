"""Malformed token stores, tokenizers and corpora: stores are opened by tools/evaluate.py, the rest by tools/prepare.py.

What is proved by hashes is opened by a run only: see REAL in test_malformed_inputs.py.
"""

import gzip
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from hypothesis import strategies as st

from tests.fault.malformed import Case, changed, drawn, edited, gone, put, unspoiled

MANIFEST = "store/manifest.json"
SHARD = "store/train/tokens-00000.bin"


# ---- token stores


def store(name: str, make: Callable[[Path], object], names: str = MANIFEST) -> Case:
    return Case(f"store: {name}", "evaluate", ["base", "--store", "store"], names, 1, make)


def fingerprinted(change: Callable[[Any], object]) -> Callable[[Path], object]:
    """Change the manifest, and make its fingerprint agree with what it says then, as docs/data.md describes it."""

    def make(folder: Path) -> None:
        content = json.loads((folder / MANIFEST).read_text())
        change(content)
        names = ("kind", "sha256", "vocab_size", "eos_id", "bos_id", "prefix_bytes")
        seen = {
            "version": 1,
            "dtype": content["dtype"],
            "shard_tokens": content["shard_tokens"],
            "tokenizer": {name: content["tokenizer"].get(name) for name in names},
            "splits": {
                name: {"documents": split["documents"], "files": {f: e["sha256"] for f, e in split["files"].items()}}
                for name, split in content["splits"].items()
            },
        }
        content["fingerprint"] = hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()
        (folder / MANIFEST).write_text(json.dumps(content))

    return make


def field(*path: str, value: Any) -> Callable[[Any], None]:
    """Set a field of the manifest."""

    def change(content: Any) -> None:
        *above, last = path
        for name in above:
            content = content[name]
        content[last] = value

    return change


def moved(old: str, new: str) -> Callable[[Any], None]:
    """Give a tokenizer's file another name in the manifest."""

    def change(content: Any) -> None:
        files = content["tokenizer"]["files"]
        files[new] = files.pop(old)

    return change


def resized(path: str, by: int) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / path, (folder / path).stat().st_size + by)


def replaced(path: str, by: Callable[[Path], object]) -> Callable[[Path], object]:
    """Put something else where a file was."""

    def make(folder: Path) -> None:
        (folder / path).unlink()
        by(folder / path)

    return make


STORES = [
    store("no manifest", gone(MANIFEST), "store"),
    store("an empty manifest", put(MANIFEST, "")),
    store("a manifest cut in half", changed(MANIFEST, lambda data: data[: len(data) // 2])),
    store("a manifest of bytes", put(MANIFEST, bytes(range(256)))),
    store("a manifest that is a list", put(MANIFEST, "[]")),
    store("a manifest of brackets", put(MANIFEST, "[" * 100_000)),
    store("a manifest that is a folder", replaced(MANIFEST, Path.mkdir)),
    store("the manifest of something else", put(MANIFEST, '{"format": "zip"}')),
    store("a newer manifest", edited(MANIFEST, field("version", value=2))),
    store("a version of words", edited(MANIFEST, field("version", value="1"))),
    store("no tokenizer in it", edited(MANIFEST, lambda content: content.pop("tokenizer") and None)),
    store("no heldout split in it", edited(MANIFEST, lambda content: content["splits"].pop("heldout") and None)),
    store("another type", edited(MANIFEST, field("dtype", value="float16"))),
    store("another number of documents", edited(MANIFEST, field("splits", "train", "documents", value=3))),
    store("another seed of the tokenizer", edited(MANIFEST, field("tokenizer", "eos_id", value=7)), "fingerprint"),
    store("a vocabulary beyond the type", fingerprinted(field("tokenizer", "vocab_size", value=1 << 20))),
    store("a vocabulary of nothing", fingerprinted(field("tokenizer", "vocab_size", value=0))),
    store("a vocabulary of words", fingerprinted(field("tokenizer", "vocab_size", value="300"))),
    store("an end of text beyond the vocabulary", fingerprinted(field("tokenizer", "eos_id", value=300))),
    store("a negative end of text", fingerprinted(field("tokenizer", "eos_id", value=-1))),
    store("a begin of text of words", fingerprinted(field("tokenizer", "bos_id", value="<s>"))),
    store("a prefix of much", fingerprinted(field("tokenizer", "prefix_bytes", value=-5))),
    store("shards of nothing", fingerprinted(field("shard_tokens", value=0))),
    store("shards of less", fingerprinted(field("shard_tokens", value=-1))),
    store("shards of half a token", fingerprinted(field("shard_tokens", value=0.5))),
    store("tokens without number", fingerprinted(field("splits", "train", "tokens", value=float("inf")))),
    store("tokens of 2^62", fingerprinted(field("splits", "train", "tokens", value=1 << 62))),
    store("less than no documents", fingerprinted(field("splits", "train", "documents", value=-1))),
    store("a size of words", fingerprinted(field("splits", "train", "files", "offsets.bin", "size", value="8"))),
    store("a hash of nothing", fingerprinted(field("splits", "train", "files", "offsets.bin", "sha256", value=None))),
    store("a field nobody knows", fingerprinted(field("splits", "train", "colour", value="red"))),
    store("files as a list", edited(MANIFEST, field("splits", "train", "files", value=[]))),
    store(
        "a tokenizer's file outside",
        fingerprinted(moved("tokenizer/tokenizer.model", "../texts/00.txt")),
        "../texts/00.txt",
    ),
    store(
        "a tokenizer's file of the root",
        fingerprinted(moved("tokenizer/tokenizer.model", "/etc/passwd")),
        "/etc/passwd",
    ),
    store("a shard that ends early", resized(SHARD, -2), "tokens-00000.bin"),
    store("a shard that goes on", resized(SHARD, 2), "tokens-00000.bin"),
    store("an empty shard", put(SHARD, ""), "tokens-00000.bin"),
    store("no shard", gone(SHARD), "tokens-00000.bin"),
    store("a shard that is a folder", replaced(SHARD, Path.mkdir), "tokens-00000.bin"),
    store("a shard that links to nothing", replaced(SHARD, lambda path: path.symlink_to("gone")), "tokens-00000.bin"),
    store("a shard that is a pipe", replaced(SHARD, os.mkfifo), "tokens-00000.bin"),
    store("bounds that end early", resized("store/train/offsets.bin", -8), "offsets.bin"),
    store("no bounds", gone("store/heldout/offsets.bin"), "heldout/offsets.bin"),
    store("bounds that begin late", changed("store/train/offsets.bin", lambda data: b"\1" + data[1:]), "offsets.bin"),
    store("no bytes of tokens", gone("store/token_bytes.bin"), "token_bytes.bin"),
    store("no tokenizer", gone("store/tokenizer/tokenizer.model"), "tokenizer.model"),
    store(
        "tokens beyond the vocabulary",
        changed("store/heldout/tokens-00000.bin", lambda data: b"\xff" * len(data)),
        "store/heldout/tokens-00000.bin: token 0 = 65535",
    ),
    Case("store: there is none", "evaluate", ["base", "--store", "nowhere"], "nowhere"),
    Case("store: a file", "evaluate", ["base", "--store", "tiny.toml"], "tiny.toml"),
    Case("store: a line end in its name", "evaluate", ["base", "--store", "a\nb"], "b"),
]


# ---- corpora


def corpus(name: str, content: bytes | str, names: str, *argv: str, file: str = "texts.jsonl", code: int = 1) -> Case:
    given = [file, "--out", "new", "--tokenizer", "store/tokenizer", "--workers", "1", *argv]
    return Case(f"corpus: {name}", "prepare", given, names, code, put(file, content))


def asked(name: str, argv: str, names: str, code: int = 2, make: Callable[[Path], object] = unspoiled) -> Case:
    return Case(f"corpus: {name}", "prepare", argv.split(), names, code, make)


def table(column: str, values: list[Any]) -> Callable[[Path], object]:
    return lambda folder: pq.write_table(pa.table({column: values}), folder / "texts.parquet")


LINE = '{"text": "hemp and flax"}\n'
GOOD = "--tokenizer store/tokenizer --workers 1 --out new"
CORPORA = [
    corpus("a broken line", LINE + '{"text": "hemp\n', "texts.jsonl:2"),
    corpus("a torn last line", LINE * 3 + LINE[:10], "texts.jsonl:4"),
    corpus("two objects a line", LINE + LINE.strip() + LINE, "texts.jsonl:2"),
    corpus("a list a line", LINE + '["hemp"]\n', "texts.jsonl:2"),
    corpus("a number a line", "7\n", "texts.jsonl"),
    corpus("no text", LINE + '{"body": "hemp"}\n', "texts.jsonl:2"),
    corpus("a text that is null", LINE + '{"text": null}\n', "texts.jsonl:2"),
    corpus("a text that is a number", LINE + '{"text": 7}\n', "texts.jsonl:2"),
    corpus("a text that is empty", LINE + '{"text": ""}\n', "texts.jsonl:2"),
    corpus("a text of white space", LINE + '{"text": " \\n "}\n', "texts.jsonl:2"),
    corpus("bytes that aren't UTF-8", LINE.encode() + b'{"text": "\xff\xfe"}\n', "texts.jsonl:2"),
    corpus("half a surrogate pair", LINE + '{"text": "\\ud800"}\n', "texts.jsonl:2"),
    corpus("brackets without end", LINE + "[" * 100_000 + "\n", "texts.jsonl:2"),
    corpus("UTF-16", LINE.encode("utf-16"), "texts.jsonl:1"),
    corpus("nothing", "", "texts.jsonl"),
    corpus("blank lines", "\n\n\n", "texts.jsonl"),
    corpus("one document, and none to train on", LINE, "new", "--heldout-fraction", "0.9999999999"),
    corpus("a prompt without an answer", '{"prompt": "a"}\n', "texts.jsonl:1", "--format", "completion"),
    corpus("an empty answer", '{"prompt": "a", "completion": ""}\n', "texts.jsonl:1"),
    asked("messages that are a string", f"q.jsonl {GOOD} --chat-template t.jinja --format messages", "q.jsonl:1", 1,
          lambda folder: (put("t.jinja", "{{ messages }}")(folder), put("q.jsonl", '{"messages": "hello"}\n')(folder))),
    corpus("messages without a template", '{"messages": [{"role": "user", "content": "a"}]}\n', "store/tokenizer"),
    corpus("a text file that isn't UTF-8", b"hemp\n\xff\n", "texts.txt:2", file="texts.txt"),
    corpus("an empty text file", b"", "texts.txt", file="texts.txt"),
    corpus("a gz file that isn't", b"plain", "texts.jsonl.gz", file="texts.jsonl.gz"),
    corpus("a gz file cut short", gzip.compress(LINE.encode() * 99)[:-9], "texts.jsonl.gz", file="texts.jsonl.gz"),
    corpus("a gz file with a flipped bit", gzip.compress(LINE.encode())[:-5] + b"\0\0\0\0\0", "texts.jsonl.gz",
           file="texts.jsonl.gz"),
    corpus("a zst file that isn't", b"plain", "texts.jsonl.zst", file="texts.jsonl.zst"),
    corpus("a zst file cut short", zstandard.compress(os.urandom(999))[:-9], "texts.jsonl.zst", file="texts.jsonl.zst"),
    corpus("a parquet file that isn't", b"PAR1plainPAR1", "texts.parquet", file="texts.parquet"),
    asked("parquet without the column", f"texts.parquet {GOOD}", "texts.parquet", 1, table("body", ["a"])),
    asked("a column of numbers", f"texts.parquet {GOOD}", "texts.parquet", 1, table("text", [1, 2])),
    asked("a null in a column", f"texts.parquet {GOOD}", "texts.parquet:2", 1, table("text", ["hemp", None])),
    asked("no such file", f"nowhere.jsonl {GOOD}", "nowhere.jsonl", 1),
    asked("a file of no kind", f"texts.xyz {GOOD}", "texts.xyz", 1, put("texts.xyz", "hemp")),
    asked("a folder of files of no kind", f"odd {GOOD}", "odd", 1, put("odd/a.xyz", "hemp")),
    asked("over a store", "texts --out store --tokenizer store/tokenizer", "store", 1),
    asked("below a file", "texts --out tiny.toml/new --tokenizer store/tokenizer --workers 1", "tiny.toml", 1),
    asked("more held out than there is", f"texts {GOOD} --heldout-fraction 1.5", "--heldout-fraction = 1.5"),
    asked("held out without number", f"texts {GOOD} --heldout-fraction nan", "--heldout-fraction = nan"),
    asked("fewer workers than none", "texts --out new --tokenizer store/tokenizer --workers -1", "--workers = -1"),
    asked("fewer bytes than none", f"texts {GOOD} --max-bytes -1", "--max-bytes = -1"),
    asked("fewer bytes than a document", f"texts {GOOD} --max-bytes 1", "max_bytes = 1", 1),
    asked("lengths of no examples", f"texts {GOOD} --seq-len 8", "--seq-len = 8"),
    asked("two formats at once", f"texts {GOOD} --format text --prompt-field a", "--prompt-field"),
    asked("a template of nothing", f"texts {GOOD} --chat-template no.jinja", "--chat-template"),
    asked("a vocabulary too small", "texts --out new --train-tokenizer 10 --workers 1", "10"),
    asked("a vocabulary too large for the text", "texts --out new --train-tokenizer 60000 --workers 1", "60000", 1),
    asked("a vocabulary larger than any", "texts --out new --train-tokenizer 99999999999 --workers 1", "99999999999"),
    asked("an end of text that is none", f"texts {GOOD} --eos-token <nope>", "--eos-token = '<nope>'", 1),
    asked("a broken template", f"q.jsonl {GOOD} --chat-template t.jinja --format messages", "t.jinja", 1,
          lambda folder: (put("t.jinja", "{% for %}")(folder), put("q.jsonl", '{"messages": []}\n')(folder))),
    asked("a template that is a folder", f"q.jsonl {GOOD} --chat-template texts --format messages", "texts", 1,
          put("q.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n')),
]  # fmt: skip


# ---- tokenizers


def tokenizer(name: str, file: str, content: bytes | str, names: str = "", *argv: str) -> Case:
    given = ["texts", "--out", "new", "--workers", "1", "--tokenizer", file, *argv]
    return Case(f"tokenizer: {name}", "prepare", given, names or file, 1, put(file, content))


def pieces(**more: Any) -> str:
    vocab = {f"w{number}": number for number in range(4)} | {"</s>": 4}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}
    return json.dumps({"version": "1.0", "added_tokens": [], "model": model} | more)


TOKENIZERS = [
    tokenizer("no bytes", "t.model", b""),
    tokenizer("text", "t.model", "hemp"),
    tokenizer("bytes", "t.model", bytes(range(256)) * 4),
    tokenizer("no JSON", "t.json", ""),
    tokenizer("a list", "t.json", "[]"),
    tokenizer("null", "t.json", "null"),
    tokenizer("another JSON", "t.json", '{"model_max_length": 5}'),
    tokenizer("JSON cut short", "t.json", pieces()[:-20]),
    tokenizer("JSON that isn't UTF-8", "t.json", b'{"\xff": 1}'),
    tokenizer("brackets without end", "t.json", "[" * 100_000),
    tokenizer("a model of no kind", "t.json", pieces(model={"type": "Abacus"})),
    tokenizer("no words", "t.json", pieces(model={"type": "WordLevel", "vocab": {}, "unk_token": "w0"})),
    tokenizer("numbers of words", "t.json", pieces(model={"type": "WordLevel", "vocab": {"a": "b"}, "unk_token": "a"})),
    tokenizer("a word of 2^32 numbers", "t.json",
              pieces(model={"type": "WordLevel", "vocab": {"a": 0, "</s>": 1 << 32}, "unk_token": "a"})),
    tokenizer("a word far behind the others", "t.json",
              pieces(model={"type": "WordLevel", "vocab": {"a": 0, "</s>": (1 << 32) - 1}, "unk_token": "a"})),
    tokenizer("merges of nothing", "t.json", pieces(model={"type": "BPE", "vocab": {"</s>": 0}, "merges": ["a b"]})),
    tokenizer("no end of text", "t.json", pieces(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"})),
    tokenizer("another suffix", "t.txt", pieces()),
    tokenizer("a folder without one", "t/readme.txt", "hemp", "t", "--tokenizer", "t"),
    tokenizer("a folder with two", "t/a.model", "hemp", "t", "--tokenizer", "t"),
    tokenizer("settings that aren't JSON", "t/tokenizer_config.json", "{", "t", "--tokenizer", "t"),
    Case("tokenizer: none there", "prepare", ["texts", "--out", "new", "--tokenizer", "no.model"], "no.model", 1),
    Case("tokenizer: settings of no object", "prepare",
         ["texts", "--out", "new", "--tokenizer", "store/tokenizer", "--workers", "1"], "tokenizer_config.json", 1,
         put("store/tokenizer/tokenizer_config.json", "[]")),
    Case("tokenizer: settings name no token", "prepare",
         ["texts", "--out", "new", "--tokenizer", "store/tokenizer", "--workers", "1"], "tokenizer_config.json", 1,
         put("store/tokenizer/tokenizer_config.json", '{"eos_token": "<gone>"}')),
]  # fmt: skip


# ---- drawn

TORN = drawn(st.integers(1, 23).map(lambda cut: LINE[:cut]).filter(lambda text: text.strip()), 8)
NOISE = drawn(st.binary(min_size=1, max_size=60), 8)
DRAWN = [corpus(f"drawn: {text!r}", LINE + text + "\n", "texts.jsonl:2") for text in TORN]
DRAWN += [tokenizer(f"drawn: {data[:6].hex()}", "t.model" if index % 2 else "t.json", data)
          for index, data in enumerate(NOISE)]  # fmt: skip
DRAWN += [
    store(f"drawn: {value!r} for {name}", edited(MANIFEST, field(name, value=value)))
    for name, value in drawn(
        st.tuples(
            st.sampled_from(["version", "dtype", "shard_tokens", "tokenizer", "splits", "fingerprint"]),
            st.one_of(st.none(), st.booleans(), st.integers(-3, 0), st.text("abc", max_size=3), st.just([])),
        ),
        12,
    )
]

DATA = STORES + CORPORA + TOKENIZERS + DRAWN
