"""Whether torch.compile has what it needs, asked before a run builds anything."""

import importlib.util

import torch

from configs.errors import ConfigError, problem
from configs.schema import CompileConfig


def check_compiler(config: CompileConfig, device: torch.device) -> None:
    """Refuse compiled blocks or a compiled loss where kernels can't be built: no C++ compiler, or no Triton."""
    asked = [f"compile.{name}" for name in ("blocks", "loss") if getattr(config, name)]
    if not asked:
        return
    where = " and ".join(asked)
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            why = "torch.compile builds GPU kernels with it"
            raise ConfigError(problem(where, True, "Triton is not installed", why, "Install triton, or use false."))
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        why = "torch.compile builds CPU kernels with one"
        do = "Install g++ or clang++, or use false."
        raise ConfigError(problem(where, True, "no C++ compiler found", why, do)) from None
