"""The private names of torch that the engine uses, in one list: each exists in the torch that is installed here.

torch promises nothing for these. A new version is tried with `make test-torch VERSION=...`; this file then says first
which names are gone. A scan of the sources fails on a private name that is missing from the list.
"""

import ast
import importlib
import tomllib
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for room in ("configs", "models", "parallel", "engine", "launchers", "tools")
    for path in sorted((ROOT / room).rglob("*.py"))
]

SEEN_IN = ("2.11.0", "2.13.0", "2.14.1")
"""The versions that every name of the list was seen in."""
TORCH_NAMES = {
    # The mesh of ranks (parallel/mesh.py).
    "torch.distributed.device_mesh.DeviceMesh._flatten",
    "torch.distributed.device_mesh.DeviceMesh._unflatten",
    # What a rank holds of a tensor (parallel/materialise.py, engine/fault/memory_snapshot.py).
    "torch.distributed.tensor.DTensor._local_tensor",
    "torch.distributed.tensor._utils.compute_local_shape_and_global_offset",
    # FSDP2: quantised parameters, and the end of a backward pass that it does not see (parallel/fsdp.py).
    "torch.distributed.fsdp._fully_shard._fsdp_param",
    "torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState._root_post_backward_final_callback",
    # Pipelines (engine/pipelined.py).
    "torch.distributed.pipelining._backward.stage_backward_input",
    "torch.distributed.pipelining._backward.stage_backward_weight",
    "torch.distributed.pipelining.schedules._PipelineScheduleRuntime",
    "torch.distributed.pipelining.schedules._PipelineScheduleRuntime._load_csv",
    "torch.distributed.pipelining.stage.PipelineStage._get_init_p2p_neighbors_ops",
    "torch._functorch.config.donated_buffer",
    # Collectives that autograd and the compiler see (parallel/tensor.py, parallel/context.py, engine/loss.py).
    "torch.ops._c10d_functional",
    "torch.distributed._symmetric_memory",
    "torch._inductor.config._micro_pipeline_tp",
    # Time limits and flight recorders (engine/train.py, engine/fault/watch.py).
    "torch.distributed.distributed_c10d._set_pg_timeout",
    "torch._C._distributed_c10d._dump_fr_trace_json",
    # The compiler that torch.compile would call (engine/compiler.py).
    "torch._inductor.cpp_builder.get_cpp_compiler",
    "torch._inductor.exc.InvalidCxxCompiler",
    # Kernels of attention and of the optimizers (models/attention_sdpa.py, engine/optim/).
    "torch.ops.aten._scaled_dot_product_flash_attention",
    "torch.ops.aten._scaled_dot_product_flash_attention_backward",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward",
    "torch._foreach_add_",
    "torch._foreach_lerp",
    "torch._foreach_lerp_",
    "torch._foreach_mul_",
    "torch._foreach_sign_",
}
OTHER_NAMES = {
    "os._exit",
    "sys._current_frames",
    "argparse._ArgumentGroup",
    # submitit, whose file of a job is written and whose jobs are asked to requeue (launchers/).
    "_num_tasks",
    "_requeue",
    "_usr_sig",
    "_make_submission_file_text",
    "_submitit_command_str",
}
"""Private names of others than torch."""


def find(name: str) -> Any:
    """Import the longest part of a dotted name that is a module, and look up the rest."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        return reduce(getattr, parts[count:], module)
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("name", sorted(TORCH_NAMES))
def test_the_name_is_there(name: str) -> None:
    assert find(name) is not None


def test_the_list_was_seen_at_both_ends_of_the_declared_range() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (declared,) = (Requirement(text) for text in dependencies if text.startswith("torch"))
    assert all(declared.specifier.contains(version) for version in SEEN_IN)
    (lowest,) = (part.version for part in declared.specifier if part.operator == ">=")
    (end,) = (Version(part.version) for part in declared.specifier if part.operator == "<")
    first, newest = Version(SEEN_IN[0]), Version(SEEN_IN[-1])
    assert first.release[:2] == Version(lowest).release[:2]
    assert (newest.major, newest.minor + 1) == end.release[:2]


def test_a_name_that_torch_has_not_is_found_out() -> None:
    for name in ("torch.distributed.device_mesh.DeviceMesh._bend", "torch.ops.aten._no_such_operator"):
        with pytest.raises(AttributeError):
            find(name)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _names_given(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def _private_names_used(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            yield node.attr, node.lineno
        elif isinstance(node, ast.ImportFrom):
            yield from (
                (part, node.lineno)
                for alias in node.names
                for part in f"{node.module}.{alias.name}".split(".")
                if _is_private(part)
            )
        elif isinstance(node, ast.Import):
            yield from (
                (part, node.lineno) for alias in node.names for part in alias.name.split(".") if _is_private(part)
            )


def test_no_private_name_is_used_that_the_list_has_not() -> None:
    trees = {path: ast.parse(path.read_text()) for path in SOURCES}
    ours = {name for tree in trees.values() for name in _names_given(tree)}
    listed = {part for name in TORCH_NAMES | OTHER_NAMES for part in name.split(".")}
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path, tree in trees.items()
        for name, line in _private_names_used(tree)
        if name not in ours | listed
    ]
    assert wrong == []
