"""Hundreds of malformed inputs: each ends with exit 1 or 2, one message with place and remedy, and nothing written.

Most are given to the tools' and launchers' main() in this process; some, of each kind, to real processes. The count is
printed at the end.
"""

import importlib
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.fault.record import read_lines
from tests.fault.malformed import Case, changed, make_template, unspoiled
from tests.fault.malformed_configs import CONFIGS
from tests.fault.malformed_data import DATA
from tests.fault.malformed_weights import LORA_A, WEIGHTS, poked, restored, with_tensors
from tests.runs import ROOT, run_to_end

CASES = CONFIGS + DATA + WEIGHTS
SCRIPTS = {name: f"{'launchers' if name in ('train', 'slurm') else 'tools'}/{name}.py" for name in
           ("train", "slurm", "prepare", "convert", "generate", "evaluate")}  # fmt: skip
CLEAN = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
# What tells a person what to do: an order, or what is expected in the place of what was given.
REMEDY = re.compile(
    r"\b(must|should|expected|use|give|make|restore|remove|prepare|fetch|set|name|choose|free|start|write|keep|save|"
    r"raise|lower|add|repair|correct|rename|point|allow|leave|lay|ask|move|copy|take|train|is it|did you mean|"
    r"presets:|the keys of|the sections are|options are|names go from|supported:|unknown option: .* (is|would be)|"
    r"usage: )",
    re.IGNORECASE,
)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_template(tmp_path_factory.mktemp("template") / "workplace")


def workplace_of(case: Case, template: Path, folder: Path) -> Path:
    if case.make is unspoiled:
        return template  # nothing is written there, as is proved
    shutil.copytree(template, folder, symlinks=True)
    case.make(folder)
    return folder


def everything(folder: Path) -> dict[str, tuple[int, int, int]]:
    """All that lies below a folder: kind and size, and when it was changed."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in folders + files:
            info = os.lstat(os.path.join(place, name))
            found[os.path.join(place, name)] = (info.st_mode, info.st_size, info.st_mtime_ns)
    return found


def assert_refused(case: Case, code: object, printed: str, complained: str) -> None:
    assert code == case.code, complained or printed
    assert "Traceback" not in complained, complained
    assert len(re.findall(r"^(?:\S+ )*?error: ", complained, re.MULTILINE)) == 1, complained
    assert case.names in complained, complained
    assert REMEDY.search(complained), complained
    assert printed == ""


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.tool}: {case.name}")
def test_a_malformed_input_is_refused_with_one_message(
    case: Case, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace = workplace_of(case, template, tmp_path / "workplace")
    monkeypatch.chdir(workplace)

    def accepted(*arguments: object) -> int:
        raise AssertionError("the input was accepted")

    monkeypatch.setattr("launchers.rank.run_rank", accepted)  # no run in this process
    before = everything(workplace)
    main = importlib.import_module(SCRIPTS[case.tool].removesuffix(".py").replace("/", ".")).main
    try:
        code = main([word.replace("{here}", str(workplace)) for word in case.argv])
    except SystemExit as left:  # argparse
        code = left.code
    said = capsys.readouterr()
    assert_refused(case, code, said.out, said.err)
    assert everything(workplace) == before


# ---- real processes


def chosen(tool: str, every: int) -> list[Case]:
    """Some cases of a tool, spread over its table."""
    return [case for case in CASES if case.tool == tool][::every]


COMMANDS = chosen("train", 12) + chosen("slurm", 9) + chosen("prepare", 24)
BASE = ("--model.init_from", "base", "--optim.lr", "1e-3")
LORA = (*BASE, "--adapter.kind", "lora", "--adapter.rank", "4", "--adapter.alpha", "8", "--adapter.targets",
        '["q_proj", "down_proj"]', "--adapter.init_from", "lora")  # fmt: skip
RUNS = [
    (2, Case("a store with a flipped bit", "train", (), "store/train/tokens-00000.bin: was altered (its sha256 is ",
             make=changed("store/train/tokens-00000.bin", lambda data: bytes([data[0] ^ 1]) + data[1:]))),
    (1, Case("held-out tokens with a flipped bit", "train", (), "store/heldout/tokens-00000.bin: was altered",
             make=changed("store/heldout/tokens-00000.bin", lambda data: data[:-1] + bytes([data[-1] ^ 1])))),
    (2, Case("bounds that were altered", "train", (), "store/train/offsets.bin: was altered",
             make=changed("store/train/offsets.bin", lambda data: data[:8] + b"\1" + data[9:]))),
    (1, Case("tokens beyond the vocabulary", "train", ("--data.verify", "sizes"), "must be below 300, the tokens of",
             make=changed("store/train/tokens-00000.bin", lambda data: b"\xff" * len(data)))),
    (1, Case("bounds that fall", "train", ("--data.verify", "sizes", "--data.packing", "best_fit"),
             "store/train/offsets.bin: must rise",
             make=changed("store/train/offsets.bin", lambda data: data[:8] + b"\xff" * 6 + data[14:]))),
    (2, Case("a manifest cut in half", "train", (), "store/manifest.json",
             make=changed("store/manifest.json", lambda data: data[: len(data) // 2]))),
    (1, Case("a base with a header of 2^62 bytes", "train", BASE, "base/model.safetensors",
             make=changed("base/model.safetensors", lambda data: (1 << 62).to_bytes(8, "little") + data[8:]))),
    (2, Case("a base that is not a number", "train", BASE, "model.norm.weight: holds NaN or infinity",
             make=with_tensors("base/model.safetensors", poked("model.norm.weight", float("nan"))))),
    (2, Case("a base of other hashes", "train", BASE, "base/model.safetensors: was altered (its sha256 is ",
             make=lambda folder: (restored("base")(folder), with_tensors("base/model.safetensors",
                                                                         poked("model.norm.weight", 7.0))(folder)))),
    (1, Case("a base without a tensor", "train", BASE, "missing: model.norm.weight",
             make=with_tensors("base/model.safetensors", lambda tensors: tensors.pop("model.norm.weight")))),
    (1, Case("an adapter of other hashes", "train", LORA, "lora/adapter_model.safetensors: was altered",
             make=lambda folder: (restored("lora")(folder), with_tensors("lora/adapter_model.safetensors",
                                                                         poked(LORA_A, 7.0))(folder)))),
    (1, Case("an adapter cut short", "train", LORA, "lora/adapter_model.safetensors",
             make=changed("lora/adapter_model.safetensors", lambda data: data[:-4]))),
]  # fmt: skip


@pytest.mark.parametrize("case", COMMANDS, ids=lambda case: f"{case.tool}: {case.name}")
def test_a_real_command_refuses_it_before_torch_is_imported(case: Case, template: Path, tmp_path: Path) -> None:
    """Within a second of computing, whatever else the machine does meanwhile."""
    workplace = workplace_of(case, template, tmp_path / "workplace")
    before, spent = everything(workplace), resource.getrusage(resource.RUSAGE_CHILDREN)
    given = [sys.executable, "-X", "importtime", str(ROOT / SCRIPTS[case.tool]), *case.argv]
    done = subprocess.run(given, cwd=workplace, env=CLEAN, capture_output=True, text=True, errors="replace", timeout=60)
    lines = done.stderr.splitlines(keepends=True)
    complained = "".join(line for line in lines if not line.startswith("import time:"))
    imported = [line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")]
    assert_refused(case, done.returncode, done.stdout, complained)
    assert everything(workplace) == before
    assert "torch" not in imported
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    if case.tool == "train":
        assert now.ru_utime + now.ru_stime - spent.ru_utime - spent.ru_stime < 1.0


@pytest.mark.parametrize(
    ("ranks", "case"),
    [
        pytest.param(ranks, case, id=case.name, marks=[pytest.mark.long] if number % 4 else [])
        for number, (ranks, case) in enumerate(RUNS)
    ],
)
def test_a_real_run_refuses_it_and_leaves_nothing_to_trust(
    ranks: int, case: Case, template: Path, tmp_path: Path
) -> None:
    workplace = workplace_of(case, template, tmp_path / "workplace")
    code, output = run_to_end(workplace, ranks, *case.argv)
    assert_refused(case, code, "", output)
    run = workplace / "runs" / "tiny"
    assert not list(run.glob("checkpoints/*"))
    if "sizes" not in case.argv:
        assert not (run / "metrics.jsonl").exists()
        assert not (run / "proved.json").exists() or "base" in case.argv
    kinds = [fault["kind"] for fault in read_lines(run / "faults.jsonl")]
    assert ("corrupt_input" in kinds) == ("altered" in case.names)
    assert ("bad_batch" in kinds) == (case.name == "tokens beyond the vocabulary")


def test_there_are_enough_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    real = len(COMMANDS) + len(RUNS)
    assert len({(case.tool, case.name) for case in CASES}) == len(CASES)
    with capsys.disabled():
        print(f"\nmalformed inputs: {len(CASES)} in one process, {real} in real ones")
    assert len(CASES) >= 200
    assert real >= 20
