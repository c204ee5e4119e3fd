"""A sound config in a folder of its own, for tests to spoil."""

from pathlib import Path

import pytest

SOUND = """
[run]
steps = 20
[model]
vocab_size = 512
dim = 64
num_layers = 2
num_heads = 4
ffn_dim = 192
[data]
seq_len = 64
global_batch_size = 8
[[data.stores]]
path = "data/x"
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = Path("x.toml")
    path.write_text(SOUND)
    return path
