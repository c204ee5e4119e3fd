"""The manifest: exact text back and forth, everything that doesn't hold refused, and what retention deletes."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from configs.errors import CheckpointError
from engine.checkpoint import manifest as m
from engine.checkpoint.manifest import Chunk, Manifest, TensorEntry
from engine.files import FileEntry

SHA = hashlib.sha256(b"abcd").hexdigest()


def example() -> Manifest:
    chunks = (Chunk("model-rank-00000.safetensors", (0, 0), (2, 3)), Chunk("b.safetensors", (2, 0), (1, 3)))
    return Manifest(
        step=100,
        files={
            name: FileEntry(4, SHA) for name in ("model-rank-00000.safetensors", "b.safetensors", "tokenizer/t.json")
        },
        tensors={"model.norm.weight": TensorEntry("float32", (3, 3), chunks), "optimizer.x.step": scalar()},
        meta={"config": {"run": {"name": 'a "sha256": "b'}}, "lr": 0.1, "none": None},
        heldout_loss=1.0 / 3.0,
    )


def scalar() -> TensorEntry:
    return TensorEntry("float32", (), (Chunk("b.safetensors", (), ()),))


def sealed(content: dict[str, Any]) -> str:
    """A manifest whose own hash is right, by the rule in docs/checkpoints.md and not by the code under test."""
    content = {**content, "sha256": "0" * 64}
    text = json.dumps(content, indent=1) + "\n"
    return text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest())


def test_what_was_written_is_what_is_read() -> None:
    assert m.parse_manifest(example().to_text(), "manifest.json") == example()


def test_the_hash_is_over_the_text_with_zeros_in_its_place() -> None:
    text = example().to_text()
    seal = json.loads(text)["sha256"]
    assert text.endswith(f'"sha256": "{seal}"\n}}\n')
    assert hashlib.sha256(text.replace(seal, "0" * 64).encode()).hexdigest() == seal


def test_every_single_flipped_bit_is_noticed() -> None:
    data = example().to_text().encode()
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << (place % 8)
        try:
            text = flipped.decode()
        except UnicodeDecodeError:
            continue
        with pytest.raises(CheckpointError):
            m.parse_manifest(text, "manifest.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"format": "other"}', "[" * 100_000])
def test_what_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"^manifest\.json (isn't JSON|isn't a checkpoint's manifest)"):
        m.parse_manifest(text, "manifest.json")


def test_an_altered_value_is_told_with_both_hashes() -> None:
    text = example().to_text().replace('"step": 100', '"step": 101')
    with pytest.raises(
        CheckpointError, match=r"^manifest\.json was altered: its sha256 is [0-9a-f]{12}\.\., it says [0-9a-f]{12}\.\.$"
    ):
        m.parse_manifest(text, "manifest.json")


def test_another_version_is_refused_by_number() -> None:
    content = json.loads(example().to_text()) | {"version": 2}
    with pytest.raises(CheckpointError) as failure:
        m.parse_manifest(sealed(content), "manifest.json")
    assert str(failure.value) == "manifest.json: version = 2: this Ropewalk reads version 1."


BAD_NAMES = [
    "../x",
    "/etc/passwd",
    "a/b",
    "tokenizer/../x",
    "tokenizer/a/b",
    ".hidden",
    "",
    "a\nb",
    "tokenizer/",
    "x" * 201,
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_file_name_never_leads_out_of_the_folder(name: str) -> None:
    content = json.loads(example().to_text())
    content["files"][name] = {"size": 4, "sha256": SHA}
    with pytest.raises(CheckpointError) as failure:
        m.parse_manifest(sealed(content), "manifest.json")
    assert str(failure.value) == f"manifest.json is not well-formed (ValueError: file name {name!r})"


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        (["step"], -1, "step or meta"),
        (["step"], True, "step or meta"),
        (["step"], "1", "step or meta"),
        (["meta"], [], "step or meta"),
        (["heldout_loss"], "low", "heldout_loss"),
        (["files", "b.safetensors", "size"], -4, "entry of b.safetensors"),
        (["files", "b.safetensors", "size"], 4.5, "entry of b.safetensors"),
        (["files", "b.safetensors", "sha256"], "abc", "entry of b.safetensors"),
        (["tensors", "model.norm.weight", "shape"], [3] * 9, "tensor 'model.norm.weight'"),
        (["tensors", "model.norm.weight", "shape"], [4, 3], "tensor 'model.norm.weight': chunks hold 9 of 12 elements"),
        (["tensors", "model.norm.weight", "shape"], [2, 3], "tensor 'model.norm.weight': chunk out of bounds"),
        (["tensors", "model.norm.weight", "shape"], [1 << 63, 3], "tensor 'model.norm.weight': shape"),
        (["tensors", "model.norm.weight", "dtype"], 7, "tensor 'model.norm.weight'"),
        (
            ["tensors", "model.norm.weight", "chunks", 0, "file"],
            "c.safetensors",
            "tensor 'model.norm.weight': file 'c.safetensors' is not listed",
        ),
        (["tensors", "model.norm.weight", "chunks", 0, "offset"], [0], "tensor 'model.norm.weight': chunk"),
        (["tensors", "model.norm.weight", "chunks", 0, "offset"], [-1, 0], "chunk out of bounds"),
    ],
)
def test_a_part_that_contradicts_another_is_named(path: list[Any], value: object, text: str) -> None:
    content = json.loads(example().to_text())
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(CheckpointError) as failure:
        m.parse_manifest(sealed(content), "manifest.json")
    assert str(failure.value).startswith("manifest.json is not well-formed (ValueError: ")
    assert str(failure.value).endswith(f"{text})")


@pytest.mark.parametrize("key", ["step", "files", "tensors", "meta", "heldout_loss"])
def test_a_missing_part_is_refused(key: str) -> None:
    content = json.loads(example().to_text())
    del content[key]
    with pytest.raises(CheckpointError, match="is not well-formed"):
        m.parse_manifest(sealed(content), "manifest.json")


def test_two_chunks_in_one_place_are_refused() -> None:
    content = json.loads(example().to_text())
    entry = content["tensors"]["model.norm.weight"]
    entry["shape"], entry["chunks"] = [4, 3], [entry["chunks"][0], entry["chunks"][0]]
    with pytest.raises(CheckpointError, match="chunk twice"):
        m.parse_manifest(sealed(content), "manifest.json")


# -------------------- files


def test_files_are_checked_by_presence_kind_size_and_hash(tmp_path: Path) -> None:
    for name in ("good", "changed", "long", "kept"):
        (tmp_path / name).write_bytes(b"abcd")
    (tmp_path / "changed").write_bytes(b"abce")
    (tmp_path / "long").write_bytes(b"abcde")
    (tmp_path / "link").symlink_to(tmp_path / "good")
    (tmp_path / "folder").mkdir()
    names = ["good", "changed", "long", "gone", "link", "folder"]
    manifest = Manifest(step=1, files={name: FileEntry(4, SHA) for name in names}, tensors={})
    changed = hashlib.sha256(b"abce").hexdigest()
    assert m.check_files(tmp_path, manifest, names) == [
        f"changed has sha256 {changed[:12]}.., the manifest says {SHA[:12]}..",
        "long has 5 bytes, the manifest says 4",
        "gone is missing",
        "link is no regular file of the folder",
        "folder is no regular file of the folder",
    ]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 64])
def test_every_file_is_proved_by_one_rank_and_the_bytes_are_spread(num_ranks: int) -> None:
    files = {f"f{i}": FileEntry(size, SHA) for i, size in enumerate([9, 1, 1, 1, 5, 4, 0, 7, 2] * 3)}
    shares = [m.share_files(files, rank, num_ranks) for rank in range(num_ranks)]
    assert sorted(name for share in shares for name in share) == sorted(files)
    loads = [sum(files[name].size for name in share) for share in shares]
    assert max(loads) <= max(9, 1.5 * sum(loads) / num_ranks + 1)


def test_only_step_folders_are_checkpoints(tmp_path: Path) -> None:
    for name in ("step-00000100", "step-00000020", "step-123456789", "step-5", ".tmp-step-00000300-0123abcd", "steps"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000400").touch()
    (tmp_path / "step-00000500").symlink_to(tmp_path / "step-00000100")
    assert m.list_steps(tmp_path) == [123456789, 100, 20]
    assert m.list_steps(tmp_path / "nowhere") == []


def test_only_our_own_leftovers_are_removed(tmp_path: Path) -> None:
    stale = [m.temporary_name(7), m.temporary_name(7, "trash")]
    others = [".tmp-step-7", ".tmp-step-00000007-zzzzzzzz", ".tmp", "step-00000007", ".trash"]
    for name in stale + others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    assert m.remove_stale(tmp_path) == sorted(stale)
    assert sorted(os.listdir(tmp_path)) == sorted(others)


def test_a_deletion_that_is_cut_short_leaves_no_half_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / m.step_folder(5)
    path.mkdir()
    (path / "file").touch()

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            m.discard(path)
    assert m.list_steps(tmp_path) == []
    assert len(m.remove_stale(tmp_path)) == 1
    assert os.listdir(tmp_path) == []


def test_a_tokenizer_is_copied_with_its_hashes(tmp_path: Path) -> None:
    source, target = tmp_path / "from", tmp_path / "to"
    (source / "inner").mkdir(parents=True)
    target.mkdir()
    (source / "tokenizer.model").write_bytes(b"abcd")
    (source / ".cache").write_bytes(b"no")
    assert m.copy_tokenizer(source, target) == {"tokenizer/tokenizer.model": FileEntry(4, SHA)}
    assert (target / "tokenizer/tokenizer.model").read_bytes() == b"abcd"
    (source / "a b").touch()
    shutil.rmtree(target / "tokenizer")
    with pytest.raises(CheckpointError) as failure:
        m.copy_tokenizer(source, target)
    assert str(failure.value) == f"{source}/a b: a name of letters, digits, '.', '_' and '-' is expected."


def test_a_file_is_never_written_over(tmp_path: Path) -> None:
    m.write_whole(tmp_path / "x", b"abcd")
    with pytest.raises(FileExistsError):
        m.write_whole(tmp_path / "x", b"efgh")
    assert (tmp_path / "x").read_bytes() == b"abcd"


# -------------------- retention


@pytest.mark.parametrize(
    ("losses", "newest", "keep", "gone"),
    [
        ({1: None}, 1, (1, 0, True), []),
        ({1: None, 2: None, 3: None}, 3, (1, 0, True), [1, 2]),
        ({1: None, 2: None, 3: None}, 3, (2, 0, True), [1]),
        ({1: None, 2: None, 3: None}, 3, (9, 0, True), []),
        ({1: 0.5, 2: 0.4, 3: 0.6, 4: None}, 4, (1, 0, True), [1, 3]),
        ({1: 0.5, 2: 0.4, 3: 0.6, 4: None}, 4, (1, 0, False), [1, 2, 3]),
        ({1: 0.4, 2: 0.4, 3: 0.6}, 3, (1, 0, True), [1]),
        ({10: None, 15: None, 20: None, 25: None}, 25, (1, 10, False), [15]),
        ({100: None, 250: None, 300: None}, 250, (1, 0, False), [100]),  # resumed from before 300
    ],
)
def test_retention(losses: dict[int, float | None], newest: int, keep: tuple[int, int, bool], gone: list[int]) -> None:
    last, every, best = keep
    assert m.expired_steps(losses, newest, keep_last=last, keep_every=every, keep_best=best) == gone
