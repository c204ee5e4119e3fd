"""Malformed weights: safetensors, Hugging Face folders and indexes, checkpoints and their manifests, PEFT's folders."""

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.fault.malformed import STEP, Case, changed, drawn, edited, gone, put, unspoiled

NORM = "model.norm.weight"
Header = dict[str, Any]


# ---- safetensors


def with_header(path: str, change: Callable[[Header], object]) -> Callable[[Path], object]:
    """Change what a safetensors file says of its tensors, and nothing of its bytes."""

    def make(folder: Path) -> None:
        data = (folder / path).read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        result = change(header)
        text = result if isinstance(result, bytes) else json.dumps(header).encode()
        (folder / path).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return make


def with_tensors(path: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Write a sound safetensors file of other tensors."""

    def make(folder: Path) -> None:
        tensors = load_file(folder / path)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / path, {"format": "pt"})

    return make


def setting(name: str, key: str, value: Any) -> Callable[[Header], None]:
    return lambda header: header[name].__setitem__(key, value)


def shifted(name: str, begin: int, end: int) -> Callable[[Header], None]:
    def change(header: Header) -> None:
        old = header[name]["data_offsets"]
        header[name]["data_offsets"] = [old[0] + begin, old[1] + end]

    return change


def poked(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors[name].view(-1).__setitem__(3, value)


def headers(path: str, name: str) -> dict[str, tuple[Callable[[Path], object], str]]:
    """Ways to spoil a safetensors file, and what the message names."""
    length = struct.pack("<Q", 1 << 62)
    return {
        "no bytes": (put(path, b""), path),
        "7 bytes": (put(path, b"\0" * 7), path),
        "a header of 2^62 bytes": (changed(path, lambda data: length + data[8:]), path),
        "a header of 200 MB": (changed(path, lambda data: struct.pack("<Q", 200 << 20) + data[8:]), path),
        "a header of nothing": (put(path, b"\0" * 8), path),
        "a header longer than the file": (changed(path, lambda data: struct.pack("<Q", len(data)) + data[8:]), path),
        "a header of words": (with_header(path, lambda header: b"hemp and flax"), path),
        "a header that is a list": (with_header(path, lambda header: b"[]"), path),
        "a header that isn't UTF-8": (with_header(path, lambda header: b'{"\xff": 1}'), path),
        "a header of brackets": (with_header(path, lambda header: b"[" * 100_000), path),
        "tensors that overlap": (with_header(path, shifted(name, -4, -4)), path),
        "a hole": (with_header(path, shifted(name, 4, 4)), path),
        "a tensor beyond the end": (with_header(path, shifted(name, 0, 1 << 40)), path),
        "a tensor that ends before it begins": (with_header(path, setting(name, "data_offsets", [64, 0])), path),
        "a negative place": (with_header(path, setting(name, "data_offsets", [-64, 0])), path),
        "three places": (with_header(path, setting(name, "data_offsets", [0, 32, 64])), path),
        "a shape of other bytes": (with_header(path, setting(name, "shape", [17])), path),
        "a negative shape": (with_header(path, setting(name, "shape", [-16])), path),
        "a shape of 2^64": (with_header(path, setting(name, "shape", [1 << 32, 1 << 32])), path),
        "a type nobody knows": (with_header(path, setting(name, "dtype", "F7")), path),
        "no type": (with_header(path, lambda header: header[name].pop("dtype") and None), path),
        "notes that are numbers": (with_header(path, lambda header: header.update(__metadata__={"a": 1})), path),
        "bytes behind the last": (changed(path, lambda data: data + b"\0" * 8), path),
        "one byte less": (changed(path, lambda data: data[:-1]), path),
        "half of it": (changed(path, lambda data: data[: len(data) // 2]), path),
        "no file": (gone(path), os.path.dirname(path)),
        "a folder": (lambda folder: ((folder / path).unlink(), (folder / path).mkdir()), os.path.dirname(path)),
        "a pipe": (lambda folder: ((folder / path).unlink(), os.mkfifo(folder / path)), path),
        "a tensor missing": (with_tensors(path, lambda tensors: tensors.pop(name) is None), name),
        "a tensor too many": (with_tensors(path, lambda t: t.update(hemp=torch.zeros(2))), "hemp"),
        "a tensor of another name": (with_tensors(path, lambda t: t.update(x=t.pop(name))), "unexpected: x"),
        "a tensor of another shape": (with_tensors(path, lambda t: t.update({name: torch.zeros(5)})), name),
        "a tensor of whole numbers": (with_tensors(path, lambda t: t.update({name: t[name].long()})), name),
        "a tensor that is not a number": (with_tensors(path, poked(name, float("nan"))), name),
        "a tensor that is infinite": (with_tensors(path, poked(name, float("-inf"))), name),
    }


FILE = "base/model.safetensors"
GENERATE = ["base", "--max-new-tokens", "2"]
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
FILES = [Case(f"safetensors: {what}", "generate", GENERATE, names, 1, make)
         for what, (make, names) in headers(FILE, NORM).items()]  # fmt: skip
FILES += [
    Case("safetensors: transposed", "generate", GENERATE, "down_proj", 1,
         with_tensors(FILE, lambda t: t.update({"model.layers.0.mlp.down_proj.weight":
                                                t["model.layers.0.mlp.down_proj.weight"].T}))),
    Case("safetensors: a name that is a path", "generate", GENERATE, "../../etc/passwd", 1,
         with_tensors(FILE, lambda t: t.update({"../../etc/passwd": torch.zeros(1)}))),
    Case("safetensors: a pickle beside nothing", "generate", GENERATE, "pytorch_model.bin", 1,
         lambda folder: (gone(FILE)(folder), put("base/pytorch_model.bin", b"\x80\x04cos\nsystem\n.")(folder))),
    Case("safetensors: a pickle by its name", "generate", GENERATE, FILE, 1, put(FILE, b"\x80\x04cos\nsystem\n.")),
    Case("checksums: other weights", "generate", GENERATE, FILE, 1,
         lambda folder: (restored("base")(folder), with_tensors(FILE, poked(NORM, 7.0))(folder))),
    Case("checksums: weights of another model", "generate", GENERATE, "unexpected: x", 1,
         lambda folder: (restored("base")(folder), with_tensors(FILE, lambda t: t.update(x=torch.ones(3)))(folder))),
    Case("checksums: not JSON", "generate", GENERATE, "base/checksums.json", 1, put("base/checksums.json", "{")),
    Case("checksums: of something else", "generate", GENERATE, "base/checksums.json", 1,
         put("base/checksums.json", '{"format": "md5"}')),
    Case("checksums: a file outside", "generate", GENERATE, "../secret", 1,
         put("base/checksums.json", json.dumps({"format": "ropewalk-checksums", "files":
                                                {"../secret.safetensors": {"size": 1, "sha256": "0" * 64}}}))),
    Case("checksums: a file that isn't there", "generate", GENERATE, "base/gone.safetensors", 1,
         put("base/checksums.json", json.dumps({"format": "ropewalk-checksums", "files":
                                                {"gone.safetensors": {"size": 1, "sha256": "0" * 64}}}))),
]  # fmt: skip


def restored(name: str) -> Callable[[Path], object]:
    """Give an exported folder its hashes back."""
    return lambda folder: (folder / f"{name}-checksums.json").rename(folder / name / "checksums.json")


# ---- config.json and indexes


def described(name: str, change: Callable[[Any], object], names: str) -> Case:
    given = ["import", "base", "--out", "new.toml"]
    return Case(f"config.json: {name}", "convert", given, names, 1, edited("base/config.json", change))


def field(name: str, value: Any) -> Case:
    return described(f"{name} {str(value)[:20]}", lambda content: content.update({name: value}), name)


DESCRIPTIONS = [
    Case("config.json: none", "convert", ["import", "base", "--out", "new.toml"], "config.json", 1,
         gone("base/config.json")),
    Case("config.json: cut", "convert", ["import", "base", "--out", "new.toml"], "config.json", 1,
         changed("base/config.json", lambda data: data[:40])),
    Case("config.json: brackets", "convert", ["import", "base", "--out", "new.toml"], "config.json", 1,
         put("base/config.json", "[" * 100_000)),
    Case("config.json: bytes", "convert", ["import", "base", "--out", "new.toml"], "config.json", 1,
         put("base/config.json", b"\xff\xfe{}")),
    described("a list", lambda content: [], "config.json"),
    described("nothing in it", lambda content: {}, "vocab_size"),
    field("architectures", ["MambaForCausalLM"]),
    field("architectures", 7),
    field("model_type", "mamba"),
    field("hidden_act", "gelu"),
    field("hidden_size", -16),
    field("hidden_size", "16"),
    field("hidden_size", True),
    field("hidden_size", 10**30),
    field("num_hidden_layers", 10**12),
    field("num_hidden_layers", 0),
    field("num_attention_heads", 3),
    field("num_key_value_heads", 3),
    field("head_dim", 3),
    described("vocab_size 301", lambda content: content.update(vocab_size=301), "embed_tokens"),
    field("rms_norm_eps", float("inf")),
    field("rms_norm_eps", float("nan")),
    field("rms_norm_eps", "small"),
    field("tie_word_embeddings", "no"),
    Case(
        "config.json: rope_theta without end", "convert", ["import", "base", "--out", "new.toml"], "rope_theta", 1,
        edited("base/config.json", lambda content: content.update(rope_parameters={"rope_theta": float("inf")}))),
    Case(
        "config.json: another scaling", "convert", ["import", "base", "--out", "new.toml"], "rope_type", 1,
        edited("base/config.json", lambda content: content.update(rope_parameters={"rope_type": "yarn"}))),
    field("quantization_config", {"bits": 4}),
]  # fmt: skip

INDEX = "shards/model.safetensors.index.json"


def index(name: str, make: Callable[[Path], object], names: str = INDEX) -> Case:
    return Case(f"index: {name}", "generate", ["shards", "--max-new-tokens", "2"], names, 1, make)


def lies_in(file: Any) -> Callable[[Any], None]:
    return lambda content: content["weight_map"].__setitem__(NORM, file)


def first_of(content: Any) -> str:
    return min(content["weight_map"].values())


INDEXES = [
    index("no JSON", put(INDEX, "{")),
    index("a list", put(INDEX, "[]")),
    index("brackets", put(INDEX, "[" * 100_000)),
    index("no map", edited(INDEX, lambda content: content.pop("weight_map") and None)),
    index("a map that is a list", edited(INDEX, lambda content: content.update(weight_map=[]))),
    index("a map of nothing", edited(INDEX, lambda content: content.update(weight_map={})), "missing"),
    index("a file outside", edited(INDEX, lies_in("../base/model.safetensors"))),
    index("a file of the root", edited(INDEX, lies_in("/etc/passwd"))),
    index("a file that is a number", edited(INDEX, lies_in(7))),
    index("a file that is null", edited(INDEX, lies_in(None))),
    index("a pickle", edited(INDEX, lies_in("model.bin"))),
    index("a file with a backslash", edited(INDEX, lies_in("..\\model.safetensors"))),
    index("a file that isn't there", edited(INDEX, lies_in("gone.safetensors")), "gone.safetensors"),
    index("a file that holds others", edited(INDEX, lambda content: lies_in(first_of(content))(content)), NORM),
    index("a tensor not in it", edited(INDEX, lambda content: content["weight_map"].pop(NORM) and None), NORM),
    index("a tensor too many", edited(INDEX, lambda content: content["weight_map"].update(
        hemp=content["weight_map"][NORM])), "hemp"),
    index("a shard less", lambda folder: sorted((folder / "shards").glob("model-*"))[0].unlink(), "00001-of"),
    index("a folder", lambda folder: ((folder / INDEX).unlink(), (folder / INDEX).mkdir())),
]  # fmt: skip


# ---- checkpoints

MANIFEST = f"{STEP}/manifest.json"
SEALED = "0" * 64


def sealed(change: Callable[[Any], object]) -> Callable[[Path], object]:
    """Change a checkpoint's manifest, and its hash with it, as docs/checkpoints.md describes it."""

    def make(folder: Path) -> None:
        content = json.loads((folder / MANIFEST).read_text())
        change(content)
        content.pop("sha256", None)
        text = json.dumps(content | {"sha256": SEALED})
        (folder / MANIFEST).write_text(text.replace(SEALED, hashlib.sha256(text.encode()).hexdigest()))

    return make


def saved(name: str, make: Callable[[Path], object], names: str = "manifest.json", *argv: str) -> Case:
    return Case(f"checkpoint: {name}", "convert", ["export", "runs/saved", "new", *argv], names, 1, make)


def tensor(key: str, value: Any) -> Callable[[Any], None]:
    return lambda content: content["tensors"][NORM].__setitem__(key, value)


def chunk(key: str, value: Any) -> Callable[[Any], None]:
    return lambda content: content["tensors"][NORM]["chunks"][0].__setitem__(key, value)


def renamed(file: str) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        content["files"][file] = content["files"].pop("tokenizer/tokenizer.model")

    return change


RANK = "model-rank-00000.safetensors"
CHECKPOINTS = [
    saved("no manifest", gone(MANIFEST)),
    saved("an empty manifest", put(MANIFEST, "")),
    saved("a manifest cut in half", changed(MANIFEST, lambda data: data[: len(data) // 2])),
    saved("a manifest of brackets", put(MANIFEST, "[" * 100_000)),
    saved("a manifest of bytes", put(MANIFEST, bytes(range(256)))),
    saved("a manifest that links elsewhere", lambda folder: (
        (folder / MANIFEST).rename(folder / "m.json"), (folder / MANIFEST).symlink_to(folder / "m.json"))),
    saved("a manifest with a flipped digit", changed(MANIFEST, lambda data: data.replace(b'"step": 2', b'"step": 3'))),
    saved("a manifest without a seal", edited(MANIFEST, lambda content: content.pop("sha256") and None)),
    saved("a newer manifest", sealed(lambda content: content.update(version=2))),
    saved("the manifest of something else", sealed(lambda content: content.update(format="zip"))),
    saved("another step", lambda folder: (folder / STEP).rename((folder / STEP).with_name("step-00000003")), "step"),
    saved("a file of another", sealed(renamed("../secret"))),
    saved("a file of the root", sealed(renamed("/etc/passwd"))),
    saved("sizes below nothing", sealed(lambda content: content["files"][RANK].update(size=-1))),
    saved("a hash of words", sealed(lambda content: content["files"][RANK].update(sha256="hemp"))),
    saved("a shape below nothing", sealed(tensor("shape", [-16]))),
    saved("a shape of another chunk", sealed(tensor("shape", [17]))),
    saved("a shape of words", sealed(tensor("shape", "16"))),
    saved("dims without end", sealed(tensor("shape", [1] * 99))),
    saved("no chunks", sealed(tensor("chunks", []))),
    saved("a chunk twice", sealed(lambda content: content["tensors"][NORM]["chunks"].append(
        content["tensors"][NORM]["chunks"][0]))),
    saved("a chunk beyond the tensor", sealed(chunk("offset", [8]))),
    saved("a chunk of another file", sealed(chunk("file", "other.safetensors"))),
    saved("a type nobody knows", sealed(tensor("dtype", "float7")), "float7"),
    saved("a tensor less", sealed(lambda content: content["tensors"].pop(f"model.{NORM[6:]}")), "tensors"),
    saved("tensors as a list", sealed(lambda content: content.update(tensors=[]))),
    saved("no meta", sealed(lambda content: content.pop("meta"))),
    saved("no config", sealed(lambda content: content["meta"].pop("config")), "config"),
    saved("a config of words", sealed(lambda content: content["meta"].update(config="tiny")), "config"),
    saved("a config that can't be", sealed(lambda c: c["meta"]["config"]["model"].update(num_heads=5)), "tensors"),
    saved("a config of another model", sealed(lambda c: c["meta"]["config"]["model"].update(dim=32)), "tensors"),
    saved("a shard less", gone(f"{STEP}/{RANK}"), RANK),
    saved("a shard cut", changed(f"{STEP}/{RANK}", lambda data: data[:-1]), RANK),
    saved("a shard with a flipped bit", changed(f"{STEP}/{RANK}", lambda d: d[:-1] + bytes([d[-1] ^ 1])), RANK),
    saved("a shard that links elsewhere", lambda folder: (
        (folder / STEP / RANK).rename(folder / RANK), (folder / STEP / RANK).symlink_to(folder / RANK)), RANK),
    saved("a tokenizer that was altered", put(f"{STEP}/tokenizer/tokenizer.model", "x"), "tokenizer.model"),
    saved("a step that isn't there", unspoiled, "step = 7", "--step", "7"),
    saved("no best", unspoiled, "best", "--best"),
    Case("checkpoint: no run", "convert", ["export", "runs/nowhere", "new"], "runs/nowhere", 1),
    Case("checkpoint: a folder of texts", "generate", ["texts"], "texts", 1),
    Case("checkpoint: a file", "generate", ["tiny.toml"], "tiny.toml", 1),
]  # fmt: skip


# ---- adapters

ADAPTER = "lora/adapter_model.safetensors"
LORA_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
MERGE = ["merge", "base", "new", "--adapter", "lora", "--tokenizer", "none"]


def adapter(name: str, make: Callable[[Path], object], names: str) -> Case:
    return Case(f"adapter: {name}", "convert", MERGE, names, 1, make)


def said(name: str, value: Any) -> Case:
    make = edited("lora/adapter_config.json", lambda content: content.update({name: value}))
    return adapter(f"{name} {str(value)[:24]}", make, name)


ADAPTERS = [adapter(f"file: {what}", make, names) for what, (make, names) in headers(ADAPTER, LORA_A).items()
            if what not in ("a folder", "no file")]  # fmt: skip
ADAPTERS += [
    adapter("no config", gone("lora/adapter_config.json"), "adapter_config.json"),
    adapter("a config of brackets", put("lora/adapter_config.json", "[" * 100_000), "adapter_config.json"),
    adapter("a config that is a list", put("lora/adapter_config.json", "[]"), "adapter_config.json"),
    adapter("a config of 2 MB", put("lora/adapter_config.json", '{"a": "' + "x" * (2 << 20) + '"}'), "adapter_config"),
    adapter("no weights", gone(ADAPTER), ADAPTER),
    adapter("a pickle", lambda folder: (gone(ADAPTER)(folder), put("lora/adapter_model.bin", b"\x80\x04.")(folder)),
            "adapter_model.bin"),
    adapter("hashes of other weights", lambda folder: (
        restored("lora")(folder), with_tensors(ADAPTER, poked(LORA_A, 7.0))(folder)), ADAPTER),
    said("peft_type", "IA3"),
    said("peft_type", None),
    said("task_type", "SEQ_CLS"),
    said("r", 0),
    said("r", "4"),
    said("r", 8),
    said("lora_alpha", -1),
    said("lora_alpha", float("inf")),
    said("lora_alpha", float("nan")),
    said("lora_alpha", "8"),
    said("lora_dropout", 1),
    said("bias", "all"),
    said("target_modules", []),
    adapter("targets of other tensors", edited("lora/adapter_config.json", lambda content: content.update(
        target_modules=["gate_proj"])), "unexpected"),
    said("target_modules", "(a+)+$"),
    said("target_modules", 7),
    said("rank_pattern", {"q_proj": 0}),
    said("rank_pattern", []),
    said("alpha_pattern", {"(": 1}),
    said("modules_to_save", ["lm_head"]),
    said("use_dora", "yes"),
    said("use_rslora", 1),
    said("init_lora_weights", "pissa"),
    said("fan_in_fan_out", True),
    said("new_field_of_tomorrow", 1),
    Case("adapter: none there", "convert", ["merge", "base", "new", "--adapter", "nowhere"], "nowhere", 1),
    Case("adapter: a base elsewhere", "generate", ["lora"], "lora", 1,
         edited("lora/adapter_config.json", lambda content: content.update(base_model_name_or_path="meta/llama"))),
]  # fmt: skip


# ---- drawn

OFFSETS = drawn(st.tuples(st.integers(-200, 200), st.integers(-200, 200)).filter(lambda pair: pair[0] or pair[1]), 15)
FLIPS = drawn(st.tuples(st.floats(0, 0.99), st.integers(0, 7)), 12)


def flipped(path: str, place: float, bit: int) -> Callable[[Path], object]:
    def change(data: bytes) -> bytes:
        at = int(place * len(data))
        return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]

    return changed(path, change)


DRAWN = [Case(f"safetensors: drawn: {pair}", "generate", GENERATE, FILE, 1, with_header(FILE, shifted(NORM, *pair)))
         for pair in OFFSETS]  # fmt: skip
DRAWN += [saved(f"drawn: bit {bit} at {place:.3f} of the {what}", flipped(path, place, bit), names)
          for number, (place, bit) in enumerate(FLIPS)
          for what, path, names in [(("manifest", MANIFEST, "manifest.json"),
                                     ("shard", f"{STEP}/{RANK}", RANK))[number % 2]]]  # fmt: skip

WEIGHTS = FILES + DESCRIPTIONS + INDEXES + CHECKPOINTS + ADAPTERS + DRAWN
