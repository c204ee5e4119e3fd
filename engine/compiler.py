"""Whether torch.compile has what it needs, asked before a run builds anything."""

import importlib.util

import torch

from configs.errors import ConfigError, problem
from configs.schema import CompileConfig, Config

CONTEXT_COMPILES_FROM = "2.13"
"""torch 2.11 gets compiled attention over parts of a sequence wrong, or hangs; 2.12 was not tried."""


def check_compiled_context(config: Config) -> None:
    """Refuse compiled blocks under context parallelism where torch computes something else, silently."""
    if config.compile.blocks and config.parallel.cp > 1 and torch.__version__ < CONTEXT_COMPILES_FROM:  # as versions
        expected = f"can't run compiled blocks under torch {torch.__version__}"
        why = "compiled attention over parts of a sequence was seen to give other numbers under torch 2.11"
        do = f"Install torch {CONTEXT_COMPILES_FROM} or newer, or use compile.blocks = false, or parallel.cp = 1."
        raise ConfigError(problem("parallel.cp", config.parallel.cp, expected, why, do))


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
