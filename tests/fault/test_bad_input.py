"""What a user gets wrong, or a machine, ends a run with one clear message and an exit code, through the real commands.

And with nothing half-made: after each failure that came late enough to leave something, the corrected command works.
"""

import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from engine.checkpoint.checkpointer import open_checkpoint
from engine.data.prepare import PrepareOptions, prepare
from engine.files import hash_file
from tests.runs import ROOT, SCRIPT, STEPS, Processes, make_texts, make_workplace, run_to_end, steps_of

CLEAN = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("made"))


@pytest.fixture
def workplace(made: Path, tmp_path: Path) -> Path:
    """A copy of its own for each test."""
    shutil.copytree(made, tmp_path / "workplace")
    return tmp_path / "workplace"


def command(workplace: Path, script: str, *argv: str, **variables: str) -> tuple[int, str, str]:
    """Run one of our scripts as a user would; return the code, what it printed, and what it complained of."""
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *argv],
        cwd=workplace,
        env=CLEAN | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


def assert_said_once(output: str, text: str) -> None:
    """One message, whole lines of the output, and no traceback."""
    assert f"error: {text}\n" in output, output
    assert (output.count("error: "), output.count("Traceback")) == (1, 0), output


def assert_works(workplace: Path, *argv: str, n: int = 1) -> Path:
    """The corrected command makes a whole run."""
    code, output = run_to_end(workplace, n, *argv)
    assert code == 0, output
    run = workplace / "runs" / "tiny"
    assert [line[1] for line in steps_of(run) if line[0] == "step"] == list(range(1, STEPS + 1))
    assert open_checkpoint(run / "checkpoints").step == STEPS
    return run


# ---- the config: refused before torch is imported, and nothing is made

WRONG_CONFIGS = {
    "unknown key": (
        "--optim.weight_deacy 1",
        "--optim.weight_deacy: unknown option; did you mean --optim.weight_decay?",
    ),
    "wrong type": ("--run.steps many", "--run.steps = 'many': must be an integer."),
    "missing file": (
        "--data.stores.0.path nowhere",
        "data.stores.0.path = 'nowhere': no such token store. "
        "Make it with tools/prepare.py, or set data.stores.0.sources and a tokenizer.",
    ),
    "missing source": (
        "--data.stores.0.path new --data.stores.0.sources [\"nothing\"] --data.stores.0.train_tokenizer 300",
        "data.stores.0.sources = 'nothing': no such file or folder. Give what is there to be read.",
    ),
    "sequence longer than the model": (
        "--data.seq_len 65",
        "data.seq_len = 65: must be at most model.max_seq_len = 64. "
        "Use data.seq_len 64 or less, or raise model.max_seq_len.",
    ),
    "no share of the batch": (
        "--data.micro_batch_size 3",
        "data.micro_batch_size = 3: must divide the 8 of 8 sequences that a rank computes. "
        "Use 1, 2, 4 or 8.",
    ),
    "metrics off": ("--metrics.every_steps 0", "metrics.every_steps = 0: must be at least 1."),
    "more than one": (
        "--run.steps 0 --optim.lr 0",
        "run.steps = 0: must be at least 1.\noptim.lr = 0.0: must be more than 0.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_a_wrong_config(made: Path, case: str) -> None:
    argv, text = WRONG_CONFIGS[case]
    code, printed, complained = command(made, "launchers/train.py", "tiny.toml", *argv.split())
    assert (code, printed, complained) == (2, "", f"error: {text}\n")
    assert not (made / "runs").exists()


def test_a_config_that_is_not_there(made: Path) -> None:
    code, _, complained = command(made, "launchers/train.py", "tinny.toml")
    assert code == 2
    assert_said_once(complained, complained.removeprefix("error: ").removesuffix("\n"))
    assert "tinny.toml" in complained


def test_torchrun_says_a_wrong_config_once_and_then_its_own_report(made: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    given = [*torchrun, str(SCRIPT), "tiny.toml"]
    done = subprocess.run(given, cwd=made, env=CLEAN, capture_output=True, text=True, timeout=60)
    text = (
        "error: data.global_batch_size = 8: must be a multiple of the 3 ranks (every rank computes the same number of "
        "sequences). Use 6 or 9, or start 1, 2, 4 or 8 ranks.\n"
    )
    assert (done.returncode, done.stderr.count(text)) == (1, 1)
    ours, report = done.stderr.split(text)
    assert "Traceback" not in ours
    assert "ChildFailedError" in report


def test_more_ranks_than_a_parameter_has_rows(made: Path) -> None:
    argv = ("--model.num_kv_heads", "1", "--model.head_dim", "2")
    code, output = run_to_end(made, 4, *argv)
    assert code == 2
    assert_said_once(
        output,
        "parallel.dp_shard = 4: must be at most model.num_kv_heads * head_dim = 2 (a parameter has so few rows, and "
        "each of the 4 ranks of a replica holds some). Use parallel.dp_replicate 2 or 4.",
    )


def test_an_environment_that_is_half_set(made: Path) -> None:
    code, printed, complained = command(made, "launchers/train.py", "tiny.toml", RANK="0", WORLD_SIZE="2")
    assert (code, printed) == (1, "")
    assert complained == (
        "error: environment: RANK, WORLD_SIZE set but LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT not "
        "(torchrun sets all six for every rank, and guessing one would hang the others). "
        "Start with torchrun, or unset them for a single process.\n"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(made: Path) -> None:
    code, output = run_to_end(made, 2, "--run.device", "cuda")
    assert code == 2
    assert_said_once(output, "run.device = 'cuda': torch finds no CUDA device here. Use cpu or auto.")


FOR_GPUS = {
    "--parallel.cpu_offload true": "parallel.cpu_offload = True: has no effect on CPUs. Remove it, or run on GPUs.",
    "--model.attention flex": "model.attention = 'flex': does not run on cpu here (torch has no backward pass of "
    "FlexAttention on CPUs). Use 'auto', 'sdpa' or 'blocked'.",
    "--model.attention varlen": "model.attention = 'varlen': does not run on cpu here (its kernels are for GPUs). Use "
    "'auto', 'sdpa' or 'blocked'.",
    "--precision.float8 rowwise": "precision.float8 = 'rowwise': needs a GPU of compute capability 8.9 or more, this "
    "is a CPU. Use 'none'.",
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("option", FOR_GPUS)
def test_what_only_gpus_have(made: Path, option: str) -> None:
    code, output = run_to_end(made, 1, *option.split())
    assert code == 2
    assert FOR_GPUS[option] in output
    assert "Traceback" not in output
    assert not (made / "runs").exists()


def test_degrees_that_do_not_fit(made: Path) -> None:
    code, printed, complained = command(made, "launchers/train.py", "tiny.toml", "--parallel.tp", "3")
    assert (code, printed) == (2, "")
    assert complained.startswith("error: parallel.tp = 3: must divide the 1 rank")
    code, output = run_to_end(made, 2, "--parallel.pp", "2", "--parallel.schedule_csv", "none.csv")
    assert code == 2
    assert_said_once(output, "parallel.schedule_csv = 'none.csv': no such file. Give a CSV file, or none.")


# ---- the corpus and the tokenizer


def test_an_empty_corpus(workplace: Path) -> None:
    (workplace / "nothing").mkdir()
    code, _, complained = command(workplace, "tools/prepare.py", "nothing", "--out", "mine", "--train-tokenizer", "300")
    assert code == 1
    assert re.fullmatch(r"error: .*'?nothing'?: .*\n", complained), complained
    assert not (workplace / "mine").exists()
    make_texts(workplace / "nothing" / "now", "tar")
    code, _, complained = command(workplace, "tools/prepare.py", "nothing", "--out", "mine", "--train-tokenizer", "300")
    assert code == 0, complained
    assert_works(workplace, "--data.stores.0.path", "mine")


@pytest.mark.long
def test_an_empty_corpus_of_a_config_ends_all_ranks(workplace: Path) -> None:
    (workplace / "nothing").mkdir()
    argv = ("--data.stores.0.path", "mine", "--data.stores.0.train_tokenizer", "300", "--data.stores.0.sources")
    code, output = run_to_end(workplace, 2, *argv, '["nothing"]')
    assert code == 1
    assert (output.count("error: "), output.count("Traceback")) == (1, 0), output
    assert "'nothing'" in output
    assert not (workplace / "mine").exists()
    assert_works(workplace, *argv, '["texts"]', n=2)


def test_a_vocabulary_larger_than_the_type_of_the_store(workplace: Path) -> None:
    words = {f"w{number}": number for number in range(70_000)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": 70_000, "content": "</s>", "special": True, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False}],
        "model": {"type": "WordLevel", "vocab": words | {"</s>": 70_000}, "unk_token": "w0"},
        "pre_tokenizer": {"type": "Whitespace"},
    }  # fmt: skip
    (workplace / "tokenizer.json").write_text(json.dumps(tokenizer))
    given = ("texts", "--out", "large", "--tokenizer", "tokenizer.json", "--eos-token", "</s>", "--dtype", "uint16")
    code, _, complained = command(workplace, "tools/prepare.py", *given)
    assert code in (1, 2)
    assert re.fullmatch(r"error: dtype = 'uint16': .*70001.* Use uint32\.\n", complained), complained
    assert not (workplace / "large").exists()


def other_store(workplace: Path) -> Path:
    """A store with a tokenizer of its own."""
    make_texts(workplace / "other-texts", "tar")
    options = PrepareOptions(
        sources=(str(workplace / "other-texts"),), out=workplace / "other", train_tokenizer=290, workers=1
    )
    return prepare(options).path


def test_stores_of_two_tokenizers(workplace: Path) -> None:
    other_store(workplace)
    code, output = run_to_end(workplace, 2, "--data.stores", '[{path = "store"}, {path = "other"}]')
    assert code == 1
    first, second = (
        json.loads((workplace / name / "manifest.json").read_text())["tokenizer"]["sha256"][:12]
        for name in ("store", "other")
    )
    assert_said_once(
        output,
        f"other: was made with another tokenizer than store ({second}.. is not {first}..). "
        "Prepare it with --tokenizer store/tokenizer.",
    )
    assert_works(workplace)


def test_a_tokenizer_that_is_not_the_one_the_store_was_made_with(workplace: Path) -> None:
    model = str(other_store(workplace) / "tokenizer" / "tokenizer.model")
    sources = ("--data.stores.0.sources", '["texts"]', "--data.stores.0.tokenizer")
    code, output = run_to_end(workplace, 1, *sources, model)
    assert code == 2
    assert_said_once(
        output,
        f"data.stores.0.tokenizer = {model!r}: store was made with another tokenizer. "
        "Remove the setting, or the folder store to prepare it again.",
    )
    assert_works(workplace, *sources, "store/tokenizer/tokenizer.model")


@pytest.mark.long
def test_a_store_whose_tokenizer_was_altered(workplace: Path) -> None:
    """As many bytes as before: the size says nothing."""
    file = workplace / "store" / "tokenizer" / "tokenizer.model"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    code, output = run_to_end(workplace, 2)
    assert code == 1
    assert_said_once(
        output,
        f"store/tokenizer/tokenizer.model: was altered (its sha256 is {hash_file(file)[:12]}.., its manifest says "
        f"{hashlib.sha256(good).hexdigest()[:12]}..). Restore it from a copy, or make it again.",
    )
    file.write_bytes(good)
    assert_works(workplace)


def test_a_model_with_fewer_tokens_than_the_tokenizer(workplace: Path) -> None:
    code, output = run_to_end(workplace, 2, "--model.vocab_size", "299")
    assert code == 2
    assert_said_once(
        output,
        "model.vocab_size = 299: must be at least the 300 tokens of the stores' tokenizer (a token without a row can't "
        "be looked up). Use --model.vocab_size 300.",
    )
    assert_works(workplace)


@pytest.mark.long
def test_a_damaged_store(workplace: Path) -> None:
    shard = workplace / "store" / "train" / "tokens-00000.bin"
    good = shard.read_bytes()
    os.truncate(shard, len(good) - 2)
    code, output = run_to_end(workplace, 2)
    assert code == 1
    assert_said_once(
        output,
        f"store: train/tokens-00000.bin has {len(good) - 2} bytes, the manifest says {len(good)} "
        "(the store is damaged). Remove the folder and prepare it again.",
    )
    shard.write_bytes(good)
    assert_works(workplace)


def test_evaluation_of_a_store_without_heldout_documents(workplace: Path) -> None:
    options = PrepareOptions(
        sources=("texts",), out=Path("all"), tokenizer=Path("store/tokenizer"), heldout_fraction=0.0, workers=1
    )
    here = Path.cwd()
    os.chdir(workplace)
    prepare(options)
    os.chdir(here)
    code, output = run_to_end(workplace, 1, "--data.stores.0.path", "all")
    assert code == 1
    assert_said_once(
        output,
        "all: has no held-out documents. Prepare it again with --heldout-fraction above 0, or set --eval.every_steps "
        "0.",
    )
    run = assert_works(workplace, "--data.stores.0.path", "all", "--eval.every_steps", "0")
    assert {line[0] for line in steps_of(run)} == {"step"}


# ---- the run folder


@pytest.mark.long
def test_a_folder_in_use_by_another_run(workplace: Path) -> None:
    with Processes(workplace, 1, "--run.steps", "1000000") as live:
        live.until((workplace / "runs" / "tiny" / "metrics.jsonl").exists)
        owner = (workplace / "runs" / "tiny" / ".lock").read_text().strip()
        assert f"process {live.ranks[0].pid} on " in owner
        # In a folder of its own, but for the runs: two starts would share the files that their output goes to.
        second = workplace.with_name("second")
        shutil.copytree(workplace, second, ignore=shutil.ignore_patterns("runs"))
        code, output = run_to_end(second, 2, "--run.dir", str(workplace / "runs"))
        assert code == 1
        text = f"in use by {owner} (one run writes a folder). Wait for it, stop it, or choose another --run.name."
        assert_said_once(output, f"{workplace}/runs/tiny: {text}")
        live.until(lambda: True)
    code, output = run_to_end(workplace, 1, "--run.name", "another")
    assert code == 0, output


@pytest.mark.long
def test_a_folder_that_can_not_be_written(workplace: Path) -> None:
    code, output = run_to_end(workplace, 2, "--run.dir", "tiny.toml")
    assert code == 1
    assert_said_once(
        output,
        "tiny.toml/tiny: can't be written: Not a directory. Make it writable, make room, or choose another --run.dir.",
    )


def limit_files(num_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_checkpoint_that_can_not_be_written(workplace: Path, asynchronous: str) -> None:
    """The third failure in a row, as checkpoint.max_failures has it, ends the run."""
    argv = ("--checkpoint.asynchronous", asynchronous)
    code, output = run_to_end(workplace, 2, *argv, limits=partial(limit_files, 30_000))
    assert code == 1
    found = re.search(r"error: (.*)\n", output)
    assert found is not None, output
    assert re.fullmatch(
        r"checkpoint of step 15: rank [01]: runs/tiny/checkpoints/\.tmp-step-00000015-[0-9a-f]{8}/"
        r"(model|optimizer)-rank-0000[01]\.safetensors: File too large \(errno 27\) "
        r"\(earlier checkpoints are untouched\)",
        found[1],
    )
    assert_said_once(output, found[1])
    assert os.listdir(workplace / "runs" / "tiny" / "checkpoints") == []
    assert_works(workplace)


@pytest.mark.long
def test_metrics_that_can_not_be_written(workplace: Path) -> None:
    code, output = run_to_end(workplace, 2, limits=partial(limit_files, 5_000))
    assert code == 1
    assert_said_once(
        output,
        "runs/tiny/metrics.jsonl = 'File too large': must be writable. Free space or set run.dir elsewhere.",
    )
    assert_works(workplace)


@pytest.fixture
def small_disk(workplace: Path) -> Iterator[Callable[..., Path]]:
    """Mount file systems of a few KiB; only root may."""
    disk = workplace / "disk"
    disk.mkdir()
    mounted = []

    def mount(size_kib: int, more: str = "mode=755") -> Path:
        given = ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k,{more}", "tmpfs", str(disk)]
        done = subprocess.run(given, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"can't mount a small disk: {done.stderr.strip()}")
        mounted.append(disk)
        return disk

    yield mount
    for path in mounted:
        subprocess.run(["umount", path], check=True)


@pytest.mark.parametrize("size_kib", [4, 8, 12, 16, 24, 100])
def test_a_full_disk_wherever_it_fills_up(workplace: Path, small_disk: Callable[[int], Path], size_kib: int) -> None:
    small_disk(size_kib)
    argv = ("--run.dir", "disk", "--metrics.tensorboard", "true")
    code, output = run_to_end(workplace, 1, *argv)
    assert code == 1
    assert (output.count("error: "), output.count("Traceback"), output.count("Logging error")) == (1, 0, 0), output
    assert re.search(r"No space left on device|the disk has \d+ free \(nothing was written\)", output), output
    assert not list((workplace / "disk" / "tiny").glob("checkpoints/*"))


def test_a_checkpoint_that_can_not_be_read(workplace: Path) -> None:
    assert run_to_end(workplace, 1, "--run.steps", "4", "--lr.schedule", "constant")[0] == 0
    run = workplace / "runs" / "tiny"
    manifest = run / "checkpoints" / "step-00000004" / "manifest.json"
    good = manifest.read_text()
    manifest.write_text("{")
    code, output = run_to_end(workplace, 2, "--lr.schedule", "constant")
    assert code == 1
    assert "error: runs/tiny/checkpoints: no checkpoint can be loaded:\n  step-00000004: manifest.json" in output
    assert (output.count("error: "), output.count("Traceback")) == (1, 0), output
    manifest.write_text(good)
    assert_works(workplace, "--lr.schedule", "constant")


# ---- the numbers


@pytest.mark.parametrize("every_steps", ["1", "10"])
def test_a_loss_that_is_no_number(workplace: Path, every_steps: str) -> None:
    """Also between logged steps: a run that has left its curve skips what it may, and leaves no checkpoint."""
    argv = ("--optim.lr", "1e30", "--metrics.every_steps", every_steps, "--eval.every_steps", "0")
    code, output = run_to_end(workplace, 2, *argv)
    assert code == 1
    found = re.search(r"error: (.*)\n", output)
    assert found is not None, output
    assert re.fullmatch(
        r"steps 2 to 5: loss [\d.]+, grad_norm nan: must be finite \(no update of theirs was applied; no checkpoint is "
        r"from before step 2\)\. The same command would come to the same step: lower optim\.lr or lengthen "
        r"lr\.warmup_steps under another --run\.name, or look at the data of these steps\.",
        found[1],
    )
    told = re.findall(r"^non_finite: loss [\d.]+, grad_norm nan \(step (\d)\)", output, re.M)
    assert told == ["2", "3", "4", "5"], output
    assert_said_once(output, found[1])
    assert os.listdir(workplace / "runs" / "tiny" / "checkpoints") == []
    assert_works(workplace)
