"""A run that asks for compilation where nothing can compile is refused in one message."""

from collections.abc import Iterator

import pytest
import torch
from torch._inductor import config as inductor
from torch._inductor import cpp_builder
from torch.torch_version import TorchVersion

from configs.errors import ConfigError
from configs.schema import CompileConfig
from engine.compiler import check_compiled_context, check_compiler
from tests.training import layout_config

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


def test_compiled_context_is_refused_where_torch_gets_it_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0"))
    with pytest.raises(ConfigError) as caught:
        check_compiled_context(layout_config(3, compile={"blocks": True}, parallel={"cp": 2}))
    assert caught.value.problems == [
        "parallel.cp = 2: can't run compiled blocks under torch 2.11.0 (compiled attention over parts of a sequence "
        "was seen to give other numbers under torch 2.11). Install torch 2.13 or newer, or use compile.blocks = false, "
        "or parallel.cp = 1."
    ]
    for blocks, cp, version in ((False, 2, "2.11.0"), (True, 1, "2.11.0"), (True, 2, "2.13.0"), (True, 2, "2.14.1")):
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        refused = False
        try:
            check_compiled_context(layout_config(3, compile={"blocks": blocks}, parallel={"cp": cp}))
        except ConfigError:
            refused = True
        assert not refused, (blocks, cp, version)
