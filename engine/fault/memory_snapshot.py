"""What a rank held when its memory ran out: a JSON file in the run's folder, and one line that says what to lower.

    runs/NAME/memory/rank-00000.json   the allocation that failed; weights, gradients and optimizer state by dtype; the
                                       largest live tensors; what the plan counted; what the system or CUDA says

Written by this module and not by torch's own dump, which is a pickle. Taken after the failure, so it must need little:
it counts storages and copies none. What the kernel kills leaves no snapshot; the watchdog tells of it.
"""

import errno
import gc
import json
import os
import re
import resource
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from configs.errors import RunError, problem
from configs.schema import Config
from engine.fault.record import FaultLog
from engine.folder import RunFolder
from engine.memory import GIB, device_bytes, held_bytes
from engine.run import Run
from parallel.fsdp import DTYPES

LARGEST = 20
ADVISED = 4
_HOST = re.compile(
    r"can't allocate memory|not enough memory|cannot allocate memory|std::bad_alloc|bad allocation", re.I
)
_ASKED = re.compile(r"allocate ([\d.]+) ?(bytes|[KMGTP]iB)", re.I)
_UNITS = {"bytes": 1, **{f"{prefix}ib": 1024 ** (power + 1) for power, prefix in enumerate("kmgtp")}}
_STATUS = ("VmPeak", "VmSize", "VmHWM", "VmRSS", "VmLck", "VmSwap", "RssAnon", "RssFile", "RssShmem")
_MEMINFO = ("MemTotal", "MemFree", "MemAvailable", "SwapTotal", "SwapFree", "Shmem", "CommitLimit", "Committed_AS")
_CGROUP = ("memory.max", "memory.high", "memory.current", "memory.peak", "memory.events")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an allocation failed, on the device or on the host."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _HOST.search(str(error)) is not None


def tell_out_of_memory(
    error: BaseException, config: Config, device: torch.device, ranks_on_node: int, log: FaultLog, run: Run | None
) -> RunError:
    """Write the snapshot and the fault; return the error that ends the run. `run` is there once it was built."""
    step = run.step + 1 if run is not None else None
    held = held_tensors(run) if run is not None else {}
    asked, free = asked_bytes(str(error)), free_bytes(device)
    content = {
        "time": time.time(),
        "rank": log.rank,
        "host": socket.gethostname(),
        "step": step,
        "error": str(error),
        "asked_bytes": asked,
        "free_bytes": free,
        "planned": _planned(config, device, ranks_on_node),
        "held_bytes": held,
        "largest_tensors": largest_tensors(run),
        "host_memory": host_memory(),
        "cuda": _cuda(device),
    }
    file = _write(
        RunFolder(config.run).path / "memory" / f"rank-{log.rank:05d}.json",
        log.redact(json.dumps(content, default=str)),
    )
    size = f"allocating {_gib(asked)}" if asked else "an allocation"
    what = f"{size} on {device.type} failed with {_gib(free)} free"
    do = f"Try in this order: {', '.join(advice(config, device.type))}"
    log.own("out_of_memory", what, "the run ends", do, step=step, file=file, said=False,
            asked_bytes=asked, free_bytes=free, held_bytes=held)  # fmt: skip
    where = f"rank {log.rank} on {socket.gethostname()}" + (f", step {step}" if step else ", while it was built")
    parts = [f"{name} {_gib(sum(kinds.values()))}" for name, kinds in held.items()] + ([file] if file else [])
    return RunError(problem(where, "", f"out of memory: {what}", "; ".join(parts), f"{do}."))


def asked_bytes(text: str) -> int | None:
    """Read from an allocator's message how much was asked for."""
    found = _ASKED.search(text)
    return int(float(found[1]) * _UNITS[found[2].lower()]) if found else None


def free_bytes(device: torch.device) -> int:
    """Count what an allocation could still take: on the device, or within the host's and this process's limits."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    memory = host_memory()
    bounds = [memory["meminfo"].get("MemAvailable", 0)]
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        bounds.append(soft - memory["status"].get("VmSize", 0))
    limit, current = (memory["cgroup"].get(f"memory.{name}", "") for name in ("max", "current"))
    if limit.isdigit() and current.isdigit():
        bounds.append(int(limit) - int(current))
    return max(0, min(bounds))


def held_tensors(run: Run) -> dict[str, dict[str, int]]:
    """Count the bytes of weights, gradients and optimizer state on this rank, by dtype."""
    weights = list(run.model.parameters())
    states = (value for state in run.optimizer.state.values() for value in state.values())
    return {
        "weights": _by_dtype(weights),
        "gradients": _by_dtype(weight.grad for weight in weights if weight.grad is not None),
        "optimizer": _by_dtype(value for value in states if isinstance(value, Tensor)),
    }


def largest_tensors(run: Run | None) -> list[dict[str, Any]]:
    """List the largest storages that Python still reaches; autograd keeps more, which it alone knows."""
    named = run.model.named_parameters() if run is not None else ()
    names = {_storage(weight): name for name, weight in named if _storage(weight)}
    found: dict[int, tuple[int, Tensor]] = {}
    for item in gc.get_objects():
        # type(): isinstance would ask lazy objects of libraries, which then load themselves.
        if issubclass(type(item), Tensor) and not isinstance(item, DTensor) and (address := _storage(item)):
            found[address] = (item.untyped_storage().nbytes(), item)
    largest = sorted(found.items(), key=lambda entry: -entry[1][0])[:LARGEST]
    return [
        {"bytes": size, "shape": list(item.shape), "dtype": _dtype(item), "device": str(item.device),
         "name": names.get(address, "")}
        for address, (size, item) in largest
    ]  # fmt: skip


def host_memory() -> dict[str, Any]:
    """Read what Linux says of this process, the machine and the control group, in bytes; empty elsewhere."""
    group = Path("/sys/fs/cgroup")
    with suppress(OSError):
        own = re.search(r"^0::/(.*)$", Path("/proc/self/cgroup").read_text(), re.M)
        # In a container the path may be the host's; the group seen as the root is then one's own.
        if own and (group / own[1] / "memory.max").exists():
            group = group / own[1]
    return {
        "status": _table(Path("/proc/self/status"), _STATUS),
        "meminfo": _table(Path("/proc/meminfo"), _MEMINFO),
        "cgroup": {name: text for name in _CGROUP if (text := _text(group / name))},
    }


def advice(config: Config, device_type: str) -> list[str]:
    """List what to change, what would free most first; the sizes behind the order are estimates."""
    data, model, parallel = config.data, config.model, config.parallel
    micro = data.micro_batch_size or data.global_batch_size // (parallel.dp_replicate * max(1, parallel.dp_shard))
    tokens, layers = micro * data.seq_len // parallel.cp, -(-model.num_layers // parallel.pp)
    size = DTYPES[config.precision.compute].itemsize
    # What a block keeps of a token: its inputs, norms, queries, keys, values, and thrice the feed-forward's width.
    block, inputs = (8 * model.dim + 4 * model.ffn_dim) // parallel.tp, model.dim // parallel.tp
    kept = {"none": block, "selective": block // 2, "full": inputs}[config.recompute.mode]
    activations, unit = tokens * layers * kept * size, tokens * layers * size
    chunk = min(config.objective.chunk_tokens, tokens)
    logits = 2 * 4 * chunk * model.vocab_size // parallel.tp
    held = held_bytes(config)
    found = [(logits // 2, f"objective.chunk_tokens {max(1, chunk // 2)} (now {config.objective.chunk_tokens})")]
    if micro > 1:
        found.append((activations // 2, f"data.micro_batch_size {micro // 2} (now {micro})"))
    else:
        found.append((activations // 2, f"parallel.cp {2 * parallel.cp} (now {parallel.cp})"))
    if config.recompute.mode != "full":
        found.append((unit * (kept - inputs), f"recompute.mode full (now {config.recompute.mode})"))
    found.append((held.state // 2, f"twice the ranks for parallel.dp_shard (now {parallel.dp_shard})"))
    if device_type == "cuda" and not parallel.cpu_offload:
        found.append((held.state, "parallel.cpu_offload true (now false)"))
    if parallel.accumulate == "unsharded" and config.adapter.kind == "none":
        found.append((held.whole, "parallel.accumulate sharded (now unsharded)"))
    return [text for _, text in sorted(found, key=lambda entry: -entry[0])][:ADVISED]


def _planned(config: Config, device: torch.device, ranks_on_node: int) -> dict[str, int]:
    held = held_bytes(config)
    of_rank = device_bytes(device, ranks_on_node)
    return {"state_bytes": held.state, "whole_gradients_bytes": held.whole, "memory_of_rank_bytes": of_rank}


def _cuda(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {}
    return {"summary": torch.cuda.memory_summary(device), "segments": torch.cuda.memory_snapshot()}


def _by_dtype(tensors: Iterable[Tensor]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    seen = set()
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if _storage(local) not in seen:
            seen.add(_storage(local))
            sizes[_dtype(local)] = sizes.get(_dtype(local), 0) + local.untyped_storage().nbytes()
    return sizes


def _storage(tensor: Tensor) -> int:
    """Give the address of a tensor's memory; 0 where it has none that can be asked for."""
    try:
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        return local.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError, ReferenceError):  # fake, sparse, freed
        return 0


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _table(path: Path, names: Iterable[str]) -> dict[str, int]:
    lines = re.findall(r"^(\w+):\s+(\d+) kB$", _text(path), re.M)
    return {name: 1024 * int(value) for name, value in lines if name in names}


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _write(path: Path, text: str) -> str:
    """Write the file whole; return its path, or nothing where that failed: the error itself is worth more."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError:
        return ""
    return str(path)


def _gib(size: int | None) -> str:
    return f"{(size or 0) / GIB:.2f} GiB"
