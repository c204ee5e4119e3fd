"""The adapter of a finished run as PEFT loads it: runs/NAME/adapter, or a folder for each of several below it.

Made from the run's last checkpoint, so that it is what tools/convert.py export writes, on every layout.
"""

import shutil
from pathlib import Path

from configs.adapters import AdapterConfig
from engine.saved_model import SavedAdapter, open_adapter
from models.peft_format import write_peft

KINDS = ("lora", "prompt", "prefix")
"""What PEFT has a format for."""


def write_adapter(checkpoints: Path, folder: Path, config: AdapterConfig) -> bool:
    """Write the newest checkpoint's adapter, in the place of an older one; say whether there is anything to write."""
    if config.kind not in KINDS:
        return False
    adapter = open_adapter(checkpoints)
    assert adapter is not None, "a run with an adapter saves it"
    if folder.exists():
        shutil.rmtree(folder)
    names = [member.name for member in config.members]
    for name, out in {name: folder / name for name in names}.items() or {"": folder}.items():
        _write(adapter.of(name), out)
    return True


def _write(adapter: SavedAdapter, out: Path) -> None:
    write_peft(out, adapter.model, adapter.config, adapter.tensors(), base_name=adapter.base or None)
