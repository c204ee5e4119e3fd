"""A rank that runs out of memory ends with one line that says what to lower, and a snapshot in JSON of what it held.

Real allocations that fail: one that no machine can give, on one of two ranks, and a step of a model that is too large
for the address space that its process is allowed.
"""

import errno
import json
import re
import resource
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.check import resolve
from configs.load import load_config
from engine.fault.memory_snapshot import advice, asked_bytes, free_bytes, host_memory, is_out_of_memory
from engine.fault.record import read_lines
from tests.runs import run_to_end

ALLOWED_BYTES = 3 << 29
"""What a process may map beyond what it has when it starts: enough for a tiny run, and not for 2 GiB at once."""


def cramp() -> None:
    """Let this process map little more than it has."""
    size = host_memory()["status"]["VmSize"] + ALLOWED_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def snapshot_of(run: Path, rank: int) -> dict[str, Any]:
    return json.loads((run / "memory" / f"rank-{rank:05d}.json").read_text())


@pytest.mark.long
def test_one_rank_of_two_asks_for_what_no_machine_has(workplace: Path) -> None:
    # Its turn to speak comes later than the other rank's silence is a hang: it is none.
    fault = ("--fault.inject.kind", "out_of_memory", "--fault.inject.rank", "1", "--fault.inject.step", "12",
             "--fault.hang_min_s", "4")  # fmt: skip
    code, output = run_to_end(workplace, 2, "--run.name", "asked", *fault)
    assert code == 1
    assert f"error: rank 1 on {socket.gethostname()}, step 12: out of memory: allocating 1073741824.00 GiB " in output
    assert "runs/asked/memory/rank-00001.json). Try in this order: " in output
    assert "Traceback" not in output, output
    run = workplace / "runs" / "asked"
    assert sorted(path.name for path in (run / "memory").iterdir()) == ["rank-00001.json"]
    assert "hang: " not in output
    (fault_line,) = (entry for entry in read_lines(run / "faults.jsonl") if entry["kind"] == "out_of_memory")
    assert (fault_line["rank"], fault_line["step"]) == (1, 12)
    assert fault_line["file"] == "runs/asked/memory/rank-00001.json"
    snapshot = snapshot_of(run, 1)
    assert (snapshot["rank"], snapshot["step"], snapshot["asked_bytes"]) == (1, 12, 1 << 60)
    # 13,520 numbers of fp32 over two ranks, and AdamW's two moments of each beside its count of steps.
    assert snapshot["held_bytes"]["weights"] == {"float32": 4 * 13520 // 2}
    moments = snapshot["held_bytes"]["optimizer"]["float32"]
    assert 0 <= moments - 2 * 4 * 13520 // 2 <= 4 * 50
    assert snapshot["planned"]["state_bytes"] == 4 * 4 * 13520 // 2
    # The log has all of it.
    assert "DefaultCPUAllocator" in (run / "logs" / "rank-00001.log").read_text()


def test_a_step_too_large_for_the_process(workplace: Path) -> None:
    """The first product of the feed-forward: 8192 sequences of 16 tokens, 8192 wide, in bf16."""
    wide = ("--data.global_batch_size", "8192", "--model.ffn_dim", "8192", "--model.dim", "64")
    code, output = run_to_end(workplace, 1, "--run.name", "cramped", *wide, limits=cramp)
    assert code == 1
    asked = 8192 * 16 * 8192 * 2
    found = re.search(r"error: rank 0 on \S+, step 1: out of memory: allocating (\S+) GiB on cpu failed with", output)
    assert found is not None and float(found[1]) == asked / 2**30, output
    assert "Try in this order: recompute.mode full (now none), data.micro_batch_size 4096 (now 8192)" in output
    assert (output.count("error: "), output.count("Traceback")) == (1, 0), output
    snapshot = snapshot_of(workplace / "runs" / "cramped", 0)
    assert snapshot["asked_bytes"] == asked > snapshot["free_bytes"]
    assert snapshot["host_memory"]["status"]["VmSize"] > ALLOWED_BYTES // 2
    largest = snapshot["largest_tensors"]
    assert [8192, 16, 64] in [entry["shape"] for entry in largest]  # the activations that were there already
    assert any(entry["name"].startswith("layers.") for entry in largest)
    assert [entry["bytes"] for entry in largest] == sorted((entry["bytes"] for entry in largest), reverse=True)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("Connection closed by peer"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_what_is_the_end_of_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has a total capacity of 139.80 GiB", 22011707392),
        ("CUDA out of memory. Tried to allocate 512.00 MiB. GPU 0", 512 << 20),
        ("can't allocate memory: you tried to allocate 400 bytes. Error code 12", 400),
        ("Unable to allocate 2.00 TiB for an array with shape (1,)", 2 << 40),
        ("std::bad_alloc", None),
    ],
)
def test_how_much_was_asked_for(text: str, asked: int | None) -> None:
    assert asked_bytes(text) == asked


def test_what_is_free_is_no_more_than_the_machine_has() -> None:
    assert 0 < free_bytes(torch.device("cpu")) <= host_memory()["meminfo"]["MemTotal"]


def test_the_advice_begins_with_what_frees_most(workplace: Path) -> None:
    def advised(*options: str, device: str = "cpu") -> list[str]:
        return advice(resolve(load_config(workplace / "tiny.toml", list(options)), 1), device)

    wide = ("--model.dim", "1024", "--model.ffn_dim", "4096")
    assert advised("--data.seq_len", "64", "--data.global_batch_size", "512", "--model.vocab_size", "300")[0] == (
        "recompute.mode full (now none)"
    )
    assert advised("--model.vocab_size", "128000", "--objective.chunk_tokens", "100000",
                   "--data.global_batch_size", "64", "--data.seq_len", "64")[0] == (
        "objective.chunk_tokens 2048 (now 100000)"
    )  # fmt: skip
    large = (*wide, "--model.num_layers", "64", "--data.global_batch_size", "1")
    assert advised(*large)[0] == "twice the ranks for parallel.dp_shard (now 1)"
    assert advised(*large, device="cuda")[0] == "parallel.cpu_offload true (now false)"
    assert "recompute.mode full (now none)" not in " ".join(advised("--recompute.mode", "full"))
