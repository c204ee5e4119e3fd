"""What several files of tests of layouts ask of the machine."""

import pytest
import torch

from configs.errors import ConfigError
from configs.schema import CompileConfig
from engine.compiler import check_compiler


@pytest.fixture
def compiler() -> None:
    """Skip on a machine without a C++ compiler, which torch.compile builds CPU kernels with."""
    try:
        check_compiler(CompileConfig(blocks=True), torch.device("cpu"))
    except ConfigError as error:
        pytest.skip(str(error))
