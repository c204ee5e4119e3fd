"""What a run reads never runs code, stays in its folder, and what it writes holds no pickle and no secret.

docs/security.md says what is promised. Payloads are real: each is shown to run when something loads it. What a run
writes is looked at file by file, after real runs of two ranks.
"""

import json
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from configs.errors import CheckpointError, DataError, RunError
from configs.schema import ModelConfig, ParallelConfig
from engine.checkpoint.checkpointer import open_checkpoint
from engine.checkpoint.manifest import copy_tokenizer
from engine.data.store import TokenStore, read_manifest
from engine.data.tokenizer import Tokenizer
from engine.files import FileEntry
from launchers.redaction import redactor
from models.hf_weights import MAX_HEADER_BYTES, open_safetensors
from models.peft_format import AdapterWeights
from parallel.pipeline import stages_of_ranks
from tests.fault.pickles import holds_pickle, payloads
from tests.runs import ROOT, run_to_end
from tools import convert

CANARY = "hf_cAnArY/0123+456789=end"
MODEL_JSON = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 300, "hidden_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip


@pytest.fixture(scope="module")
def rich(workplace: Path) -> tuple[Path, str]:
    """A run that writes every kind of file, started with secrets in its environment, and what it printed."""
    options = ["--run.name", "rich", "--run.steps", "6", "--metrics.tensorboard", "true", "--adapter.kind", "lora"]
    options += ["--data.stores.0.path", "made", "--data.stores.0.sources", '["texts"]']
    options += ["--data.stores.0.train_tokenizer", "300", "--eval.every_steps", "3"]
    code, output = run_to_end(workplace, 2, *options, variables={"HF_TOKEN": CANARY})
    assert code == 0, output
    return workplace / "runs" / "rich", output


def files_below(folder: Path) -> list[Path]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    assert found
    return found


# ---- nothing is unpickled


def test_the_payloads_run_when_loaded_and_the_search_finds_them(tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    for form, data in payloads(sentinel).items():
        if form == "torch.save":
            (tmp_path / "file.pt").write_bytes(data)
            torch.load(tmp_path / "file.pt", weights_only=False)
        else:
            pickle.loads(data)
        assert sentinel.exists(), form
        sentinel.unlink()
        assert holds_pickle(data), form
    assert holds_pickle(b"log line\n" * 9 + pickle.dumps(list(range(99)), 5))
    for innocent in (b"", b"{}", b'{"a": 1}\n', b"2026-01-01 INFO rank 0 of 2\n", b"0" * 64, bytes(64)):
        assert not holds_pickle(innocent), innocent


@pytest.mark.parametrize("form", ["protocol 0", "protocol 2", "protocol 5", "torch.save"])
def test_what_is_no_pickle_is_never_loaded_as_one(
    form: str, tmp_path: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each place that reads a file gets the payload under the name it looks for; the refusal names the file."""
    sentinel = tmp_path / "sentinel"
    data = payloads(sentinel)[form]
    hf, peft = tmp_path / "hf", tmp_path / "peft"
    for folder in (hf, peft):
        folder.mkdir()
    (hf / "config.json").write_text(json.dumps(MODEL_JSON))
    adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (peft / "adapter_config.json").write_text(json.dumps(adapter))
    model = ModelConfig(vocab_size=300, dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, ffn_dim=24)

    def convert_import() -> None:
        convert.main(["import", str(hf), "--out", str(tmp_path / "imported.toml")])
        raise CheckpointError(capsys.readouterr().err)

    def refused(path: Path, read: Callable[[], object]) -> None:
        path.write_bytes(data)
        with pytest.raises(RunError) as caught:
            read()
        assert path.name in str(caught.value), str(caught.value)
        path.unlink()

    for name in ("pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.safetensors"):
        refused(hf / name, convert_import)
    refused(peft / "adapter_model.bin", lambda: AdapterWeights(peft, model))
    refused(peft / "adapter_model.safetensors", lambda: AdapterWeights(peft, model))
    refused(tmp_path / "tokenizer.model", lambda: Tokenizer(tmp_path / "tokenizer.model"))
    refused(tmp_path / "tokenizer.json", lambda: Tokenizer(tmp_path / "tokenizer.json"))
    csv = tmp_path / "schedule.csv"
    refused(csv, lambda: stages_of_ranks(ParallelConfig(pp=2, schedule_csv=str(csv))))
    store = tmp_path / "store"
    shutil.copytree(workplace / "store", store)
    for name in ("manifest.json", "token_bytes.bin", "train/tokens-00000.bin", "heldout/offsets.bin"):
        kept = (store / name).read_bytes()
        refused(store / name, lambda: TokenStore.open(store))
        (store / name).write_bytes(kept)
    TokenStore.open(store, verify="full")
    assert not sentinel.exists()


def test_a_run_folder_full_of_payloads_runs_none(workplace: Path, rich: tuple[Path, str], tmp_path: Path) -> None:
    """Beside the checkpoint's files, where DCP would look for its own, and instead of what a start reads."""
    sentinel = tmp_path / "sentinel"
    run = workplace / "runs" / "stuffed"
    shutil.copytree(rich[0], run)
    bare, packed = payloads(sentinel)["protocol 2"], payloads(sentinel)["torch.save"]
    for step in (run / "checkpoints").iterdir():
        for name in (".metadata", "__0_0.distcp", "model.pt", "pytorch_model.bin"):
            (step / name).write_bytes(packed if name.endswith("pt") else bare)
    for name in ("progress.json", "attempts.jsonl", "faults.jsonl", "proved.json"):
        (run / name).write_bytes(bare)
    newest = sorted((run / "checkpoints").iterdir())[-1]
    shard = newest / "model-rank-00001.safetensors"
    shard.write_bytes(packed)
    options = ["--run.name", "stuffed", "--run.steps", "6", "--adapter.kind", "lora", "--data.stores.0.path", "made"]
    code, output = run_to_end(workplace, 2, *options, "--eval.every_steps", "3")
    assert not sentinel.exists()
    assert code == 0, output
    assert f"refused {newest.name}: {shard.name} has {len(packed)} bytes" in output
    assert open_checkpoint(run / "checkpoints").step == 6


# ---- paths stay inside


def ways_out(folder: Path) -> list[str]:
    """Names of one and the same file outside: upwards, absolute, and through a link that this makes."""
    outside = folder.parent / "outside.bin"
    (folder / "inside.bin").symlink_to(outside)
    return ["../outside.bin", str(outside), "inside.bin"]


def test_a_store_leads_nowhere_else(workplace: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(workplace / "store", store)
    manifest = read_manifest(store)
    (tmp_path / "outside.bin").write_bytes(b"private")
    for name in ways_out(store):
        files = manifest.tokenizer.files | {name: FileEntry(7, "0" * 64)}
        forged = replace(manifest, tokenizer=replace(manifest.tokenizer, files=files))
        (store / "manifest.json").write_text(forged.to_text())
        with pytest.raises(DataError, match="leads out of the store") as caught:
            TokenStore.open(store)
        assert name in str(caught.value)


def test_a_link_in_a_tokenizer_folder_is_not_copied_into_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "outside.bin").write_bytes(b"private")
    source, target = tmp_path / "tokenizer", tmp_path / "step"
    source.mkdir()
    target.mkdir()
    ways_out(source)
    (source / "tokenizer.json").write_text("{}")
    assert list(copy_tokenizer(source, target)) == ["tokenizer/tokenizer.json"]


def test_weights_leave_their_folder_only_for_the_cache_that_it_is_of(tmp_path: Path) -> None:
    """The Hub's cache keeps files below blobs/ and links to them from snapshots/REVISION/."""
    hub = tmp_path / "models--some--model"
    snapshot, blob = hub / "snapshots" / "0123abcd", hub / "blobs" / "feedbeef"
    snapshot.mkdir(parents=True)
    blob.parent.mkdir()
    save_file({"x": torch.ones(2)}, blob)
    (snapshot / "model.safetensors").symlink_to("../../blobs/feedbeef")
    assert list(open_safetensors(snapshot / "model.safetensors").keys()) == ["x"]
    shutil.copy(blob, tmp_path / "private.safetensors")
    (snapshot / "other.safetensors").symlink_to(tmp_path / "private.safetensors")
    with pytest.raises(CheckpointError) as caught:
        open_safetensors(snapshot / "other.safetensors")
    assert str(caught.value) == (
        f"{snapshot / 'other.safetensors'}: leads out of its folder, to {tmp_path / 'private.safetensors'} "
        "(a folder of weights must hold them itself). Put a copy of the file there."
    )


def test_a_header_beyond_reason_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for claimed in (MAX_HEADER_BYTES + 1, 1 << 62):
        path.write_bytes(claimed.to_bytes(8, "little") + b"{}")
        with pytest.raises(CheckpointError, match=f"a header of {claimed} bytes, at most {MAX_HEADER_BYTES} are read"):
            open_safetensors(path)


# ---- what a run writes


def test_no_file_of_a_run_holds_a_pickle(rich: tuple[Path, str]) -> None:
    run = rich[0]
    kinds = {path.relative_to(run).parts[0] for path in files_below(run)}
    assert {"checkpoints", "tensorboard", "adapter", "logs", "metrics.jsonl", "config.toml"} <= kinds
    found = {
        str(path): holds_pickle(path.read_bytes()) for path in [*files_below(run), *files_below(run / "../../made")]
    }
    assert {path: text for path, text in found.items() if text} == {}


def test_what_a_run_writes_is_for_its_user_alone(workplace: Path, rich: tuple[Path, str]) -> None:
    made = [rich[0], *rich[0].rglob("*"), workplace / "made", *(workplace / "made").rglob("*")]
    assert len(made) > 20
    open_to_others = {str(path): stat.filemode(path.stat().st_mode) for path in made if path.stat().st_mode & 0o077}
    assert open_to_others == {}


def test_a_run_that_is_shared_can_be_read_by_the_group(workplace: Path) -> None:
    short = ("--run.steps", "2", "--lr.warmup_steps", "0")
    code, output = run_to_end(workplace, 1, "--run.name", "shared", *short, "--run.private", "false")
    assert code == 0, output
    run = workplace / "runs" / "shared"
    for path in [run, *run.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode & 0o027 == 0 and mode & 0o040, f"{path}: {oct(mode)}"


# ---- secrets


def test_no_file_and_no_word_of_a_run_has_the_secret(rich: tuple[Path, str]) -> None:
    run, output = rich
    assert CANARY not in output
    assert [str(path) for path in files_below(run) if CANARY.encode() in path.read_bytes()] == []


def test_an_error_that_carries_a_secret_is_told_without_it(workplace: Path) -> None:
    """The secret is what the error says: in its message, its traceback, the source line that the traceback shows."""
    said = "an exception of fault.inject"
    fault = ("--fault.inject.kind", "exception", "--fault.inject.rank", "0", "--fault.inject.step", "3")
    secrets = {"SOME_API_KEY": said, "HF_TOKEN": CANARY}
    code, output = run_to_end(workplace, 2, "--run.name", "told", *fault, variables=secrets)
    assert code == 1
    run = workplace / "runs" / "told"
    assert said not in output
    assert "[SOME_API_KEY redacted]" in output
    for name in ("attempts.jsonl", "logs/rank-00000.log"):
        assert "[SOME_API_KEY redacted]" in (run / name).read_text(), name
    assert [str(path) for path in files_below(run) if re.search(said.encode(), path.read_bytes())] == []


@pytest.mark.long
def test_a_job_of_the_local_executor_keeps_the_secret_too(workplace: Path) -> None:
    """Asked for by --export, it is in the environment of submitit's process and of every rank."""
    arguments = ["tiny.toml", "--nodes", "1", "--gpus-per-node", "2", "--local", "--time", "5", "--export", "HF_TOKEN"]
    options = ["--run.device", "cpu", "--run.name", "job", "--run.steps", "3", "--fault.inject.kind", "exception"]
    options += ["--fault.inject.step", "2", "--fault.inject.rank", "1"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "launchers" / "slurm.py"), *arguments, "--signal-delay-s", "60", *options],
        cwd=workplace,
        env=os.environ | {"HF_TOKEN": "an exception of fault.inject"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    run = workplace / "runs" / "job"
    found = files_below(run)
    assert any("slurm" in path.parts for path in found)
    assert b"[HF_TOKEN redacted]" in b"".join(path.read_bytes() for path in found)
    assert "an exception of fault.inject" not in done.stdout + done.stderr
    assert [str(path) for path in found if b"an exception of fault.inject" in path.read_bytes()] == []
    assert [str(path) for path in [run, *run.rglob("*")] if path.stat().st_mode & 0o077] == []


def test_which_variables_are_secrets_and_how_they_are_written() -> None:
    redact = redactor(
        {
            "HF_TOKEN": "hf_0123456789",
            "MY_PASSWORD": 'a"b\\c/d e',
            "AWS_SESSION": "aws-aws-aws",
            "DEPLOY_KEY": "-----BEGIN\nMIIEowIBAAKCAQEA\n-----END",
            "SHORT_KEY": "12345",
            "GOOGLE_APPLICATION_CREDENTIALS": str(ROOT),
            "HOME": "/home/somebody",
            "LONG_TOKEN": "hf_0123456789-and-more",
        }
    )
    assert redact("as hf_0123456789.") == "as [HF_TOKEN redacted]."
    assert redact("as hf_0123456789-and-more") == "as [LONG_TOKEN redacted]"
    assert redact(json.dumps({"x": 'a"b\\c/d e'})) == '{"x": "[MY_PASSWORD redacted]"}'
    assert redact(repr(['a"b\\c/d e'])) == "['[MY_PASSWORD redacted]']"
    assert redact("https://u:a%22b%5Cc%2Fd%20e@host") == "https://u:[MY_PASSWORD redacted]@host"
    assert redact("line MIIEowIBAAKCAQEA of it") == "line [DEPLOY_KEY redacted] of it"
    unchanged = f"12345 {ROOT} /home/somebody"
    assert redact(unchanged) == unchanged
    assert redact("aws-aws-aws") == "[AWS_SESSION redacted]"
    assert redactor({"HOME": "/home/somebody"})("/home/somebody") == "/home/somebody"
