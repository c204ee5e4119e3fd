"""tools/memory.py: figures that a person can check by hand, and the layout's share."""

from pathlib import Path

import pytest

from tools import memory

PRESET = str(Path(__file__).resolve().parents[3] / "configs" / "llama-3.1-8b-lora.toml")


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    assert memory.main([PRESET, *argv]) == 0
    return capsys.readouterr().out.splitlines()


def test_lora_holds_its_base_in_16_bits_and_16_bytes_for_each_trained_parameter(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, *_, last = printed(capsys)
    # Rank 16: 4096 + 4096, 4096 + 1024 twice, 4096 + 4096, 4096 + 14336 three times; 32 layers.
    trained = 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    assert first.startswith(f"training {trained:,} of ")
    held = 2 * 8_030_261_248 + 16 * trained
    assert last == (
        f"a rank holds {held / 2**30:.2f} GiB without activations "
        f"({held / 8_030_261_248:.3g} bytes a parameter of the model, summed over all ranks)"
    )


def test_ranks_share_a_sharded_base_and_a_full_training_has_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--ranks", "8")[-1].startswith("a rank holds 2.08 GiB")
    assert printed(capsys, "--adapter.kind", "none", "--model.init_from", "") == [
        "training all 8,030,261,248 parameters",
        "a rank holds 119.66 GiB without activations (16 bytes a parameter of the model, summed over all ranks)",
    ]


def test_no_ranks_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert memory.main([PRESET, "--ranks", "0"]) == 2
    assert capsys.readouterr().err == "error: --ranks = 0: must be at least 1.\n"
