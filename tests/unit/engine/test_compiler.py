"""A run that asks for compilation where nothing can compile is refused in one message."""

from collections.abc import Iterator

import pytest
import torch
from torch._inductor import config as inductor
from torch._inductor import cpp_builder

from configs.errors import ConfigError
from configs.schema import CompileConfig
from engine.compiler import check_compiler

CPU = torch.device("cpu")


@pytest.fixture
def no_compiler() -> Iterator[None]:
    cpp_builder.cpp_compiler_search.cache_clear()
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        yield
    cpp_builder.cpp_compiler_search.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_a_missing_compiler_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        check_compiler(CompileConfig(blocks=True, loss=True), CPU)
    assert str(caught.value) == (
        "compile.blocks and compile.loss = True: no C++ compiler found (torch.compile builds CPU kernels with one). "
        "Install g++ or clang++, or use false."
    )


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize(("blocks", "loss"), [(False, False), (True, False), (False, True)])
def test_a_run_that_compiles_nothing_needs_no_compiler(blocks: bool, loss: bool) -> None:
    problems = []
    try:
        check_compiler(CompileConfig(blocks=blocks, loss=loss), CPU)
    except ConfigError as error:
        problems = error.problems
    assert bool(problems) == (blocks or loss)
