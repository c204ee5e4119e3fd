"""Records, the stopwatch, metrics.jsonl and TensorBoard files read back with TensorBoard's own reader."""

import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs.errors import DataError, RunError
from configs.schema import ModelConfig
from engine.metrics import (
    MemberEval,
    MemberStep,
    Metrics,
    RankCosts,
    Yardstick,
    peak_memory_gib,
    perplexity,
    yardstick,
)
from engine.metrics_log import JsonLines, TensorBoard, read_metrics, truncate_after
from engine.peaks import Peak, PeakKind
from engine.stopwatch import Throughput

CPU = torch.device("cpu")
YARD = Yardstick(
    flops_per_token=8e9,
    flops_per_token_causal=6e9,
    positions_per_step=8_000,
    num_devices=4,
    peak=Peak(tflops=16.0, kind="datasheet", name="NVIDIA Test"),
    gemm_tflops=10.0,
)


class Clock:
    """A clock that a test sets forward."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def metrics_with(path: Path | None, clock: Clock | None = None, step: int = 0, num_tokens: int = 0) -> Metrics:
    """Metrics that write to `path`, or nowhere."""
    sinks = (JsonLines(path),) if path else ()
    return Metrics(YARD, CPU, step=step, num_tokens=num_tokens, sinks=sinks, clock=clock or Clock())


def write_steps(path: Path, steps: Iterator[int] | range) -> None:
    """Append a step line for each of `steps` and an eval line for each even one."""
    clock = Clock()
    metrics = metrics_with(path, clock, step=steps[0] - 1 if isinstance(steps, range) else 0)
    for step in steps:
        clock.now += 1
        metrics.record(step, 1.0 / step, 0.1, 0.2, 10 * step)
        if step % 2 == 0:
            metrics.record_eval(step, 0.5, 0.25, 100, 1.0)
    metrics.close()


def test_rates_of_an_interval_follow_their_formulas() -> None:
    clock = Clock()
    metrics = metrics_with(None, clock, step=10, num_tokens=50_000)
    with metrics.waiting_for_data():
        clock.now += 1.0
    metrics.add_data_wait(0.5)
    clock.now += 9.0
    with metrics.excluded():
        clock.now += 30.0
    with metrics.checkpointing():
        clock.now += 3.0
    record = metrics.record(15, 2.0, 0.7, 1e-3, 50_000 + 40_000)
    # 43 s, of which 30 s evaluation and 3 s checkpoint: 5 steps and 40,000 tokens in 10 s on 4 devices.
    assert record.wall_s == 43.0
    assert record.checkpoint_stall_s == 3.0
    assert record.step_time_s == 2.0
    assert record.data_wait_s == 0.3
    assert record.tokens_per_s == 4_000.0
    assert record.tflops_per_device == pytest.approx(4_000 * 8e9 / 4 / 1e12)  # 8 TFLOP/s
    assert record.mfu == pytest.approx(8 / 16)
    assert record.mfu_causal == pytest.approx(6 / 16)
    assert record.gemm_share == pytest.approx(8 / 10)
    assert record.perplexity == math.exp(2.0)
    assert (record.num_tokens, record.lr, record.grad_norm) == (90_000, 1e-3, 0.7)
    assert (record.peak_tflops, record.peak_kind, record.gemm_tflops, record.num_devices) == (
        16.0,
        "datasheet",
        10.0,
        4,
    )


@pytest.mark.parametrize(("kind", "peak_after"), [("datasheet", 16.0), ("measured", 20.0)])
def test_a_gemm_rate_below_the_step_is_raised(kind: PeakKind, peak_after: float) -> None:
    clock = Clock()
    yard = replace(YARD, peak=replace(YARD.peak, kind=kind))
    metrics = Metrics(yard, CPU, clock=clock)
    clock.now += 1.0
    assert metrics.record(1, 1.0, 1.0, 1.0, 8_000).gemm_share == pytest.approx(16 / 10)
    assert metrics.rank_costs(2).gemm_share == pytest.approx(16 / 10)  # what tells the run to measure again
    metrics.raise_gemm_rate(5.0)  # slower still: the known one stays
    metrics.raise_gemm_rate(20.0)
    clock.now += 1.0
    record = metrics.record(2, 1.0, 1.0, 1.0, 16_000)
    assert record.gemm_share == pytest.approx(16 / 20)
    assert (record.gemm_tflops, record.peak_tflops) == (20.0, peak_after)


def test_work_is_counted_by_positions_and_not_by_targets() -> None:
    clock = Clock()
    metrics = metrics_with(None, clock)
    clock.now += 2.0
    record = metrics.record(1, 1.0, 1.0, 1.0, 3_000)  # most positions are prompts
    assert (record.tokens_per_s, record.positions_per_s) == (1_500.0, 4_000.0)
    assert record.tflops_per_device == pytest.approx(4_000 * 8e9 / 4 / 1e12)


def test_each_interval_starts_from_nothing() -> None:
    clock = Clock()
    metrics = metrics_with(None, clock)
    with metrics.excluded():
        clock.now += 5.0
    metrics.add_data_wait(1.0)
    clock.now += 4.0
    metrics.record(1, 1.0, 1.0, 1.0, 100)
    clock.now += 2.0
    record = metrics.record(3, 1.0, 1.0, 1.0, 300)
    assert (record.wall_s, record.step_time_s, record.data_wait_s, record.tokens_per_s) == (2.0, 1.0, 0.0, 100.0)


def test_a_block_that_raises_is_still_counted() -> None:
    clock = Clock()
    throughput = Throughput(0, 0, clock)
    with pytest.raises(KeyError), throughput.waiting_for_data():
        clock.now += 2.0
        raise KeyError
    clock.now += 1.0
    assert throughput.lap(1, 1).data_wait_s == 2.0


def test_two_records_of_one_step_are_a_bug() -> None:
    throughput = Throughput(3, 0, Clock())
    with pytest.raises(AssertionError, match="a lap at step 3 needs at least one step since step 3"):
        throughput.lap(3, 0)


def test_costs_over_ranks_replace_the_ranks_own() -> None:
    clock = Clock()
    metrics = metrics_with(None, clock)
    metrics.add_data_wait(0.25)
    clock.now += 1.0
    own = metrics.rank_costs(1)
    assert own.data_wait_s == 0.25
    record = metrics.record(1, 1.0, 1.0, 1.0, 100, RankCosts(0.75, 123.0, 0.0))
    assert (record.data_wait_s, record.memory_gib) == (0.75, 123.0)


def test_yardstick_counts_both_conventions() -> None:
    model = ModelConfig(vocab_size=32, dim=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, ffn_dim=16)
    yard = yardstick(model, 128, 1_024, 2, Peak(tflops=1.0, kind="measured", name="x"), 1.0)
    matmul_params = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16) + 8 * 32
    attention = 12 * 2 * 2 * 4 * 128
    assert yard.flops_per_token == 6 * matmul_params + attention
    assert yard.flops_per_token_causal == 6 * matmul_params + attention / 2


def test_floats_come_back_with_the_same_bits(tmp_path: Path) -> None:
    path, clock = tmp_path / "m.jsonl", Clock()
    metrics = metrics_with(path, clock)
    values = [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308, float(torch.tensor(2.7182817, dtype=torch.float32))]
    for step, value in enumerate(values, start=1):
        clock.now += 1.0
        metrics.record(step, value, value, value, step)
    metrics.close()
    for entry, value in zip(read_metrics(path), values, strict=True):
        assert entry["loss"].hex() == entry["grad_norm"].hex() == entry["lr"].hex() == value.hex()


def test_non_finite_numbers_are_null_and_named(tmp_path: Path) -> None:
    path, clock = tmp_path / "m.jsonl", Clock()
    metrics = metrics_with(path, clock)
    clock.now += 1.0
    metrics.record(1, math.nan, math.inf, 0.1, 10)
    clock.now += 1.0
    metrics.record(2, 1e4, 1.0, 0.1, 20)
    metrics.close()

    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is not JSON")

    first, second = (json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines())
    assert (first["loss"], first["perplexity"], first["grad_norm"]) == (None, None, None)
    assert first["non_finite"] == {"loss": "nan", "perplexity": "nan", "grad_norm": "inf"}
    assert second["non_finite"] == {"perplexity": "inf"}
    back = read_metrics(path)
    assert math.isnan(back[0]["loss"]) and back[0]["grad_norm"] == math.inf and "non_finite" not in back[0]


def test_lines_are_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    path, clock = tmp_path / "run" / "m.jsonl", Clock()
    metrics = metrics_with(path, clock)
    clock.now += 1.0
    metrics.record(1, 1.0, 1.0, 0.1, 10)
    (entry,) = read_metrics(path)
    assert (entry["kind"], entry["step"], entry["num_tokens"]) == ("step", 1, 10)
    metrics.close()
    metrics.close()


def test_an_evaluation_is_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    metrics = metrics_with(path)
    metrics.record_eval(0, 2.0, None, 640, 0.5)
    metrics.close()
    (entry,) = read_metrics(path)
    assert entry.pop("time") > 1.7e9
    assert entry == {
        "kind": "eval",
        "step": 0,
        "heldout_loss": 2.0,
        "heldout_perplexity": math.exp(2.0),
        "bits_per_byte": None,
        "heldout_tokens": 640,
        "eval_s": 0.5,
    }


def test_members_have_records_and_charts_of_their_own(tmp_path: Path) -> None:
    path, clock = tmp_path / "m.jsonl", Clock()
    metrics = Metrics(YARD, CPU, sinks=(JsonLines(path), TensorBoard(tmp_path / "board")), clock=clock)
    clock.now += 1.0
    steps = {
        "a": MemberStep(loss=1.5, grad_norm=2.0, lr=0.1, num_tokens=10),
        "b-1": MemberStep(loss=math.nan, grad_norm=math.inf, lr=0.2, num_tokens=20),
    }
    metrics.record(1, math.nan, math.inf, 0.15, 30, members=steps)
    metrics.record_eval(1, 2.0, None, 9, 0.1, {"a": MemberEval(heldout_loss=2.0, bits_per_byte=None, heldout_tokens=9)})
    metrics.close()
    step = json.loads(path.read_bytes().splitlines()[0])
    assert step["members"]["b-1"] == {"loss": None, "grad_norm": None, "lr": 0.2, "num_tokens": 20}
    assert step["non_finite"]["members.b-1.loss"] == "nan"
    step, evaluation = read_metrics(path)
    assert step["members"]["a"] == {"loss": 1.5, "grad_norm": 2.0, "lr": 0.1, "num_tokens": 10}
    assert math.isnan(step["members"]["b-1"]["loss"]) and step["members"]["b-1"]["grad_norm"] == math.inf
    assert math.isnan(step["loss"]) and "non_finite" not in step
    assert evaluation["members"] == {"a": {"heldout_loss": 2.0, "bits_per_byte": None, "heldout_tokens": 9}}
    found = scalars(tmp_path / "board")
    assert found["train/loss/a"] == [(1, 1.5)] and found["heldout/loss/a"] == [(1, 2.0)]
    assert found["train/lr/b-1"] == [(1, pytest.approx(0.2))] and "heldout/bits_per_byte/a" not in found


def test_the_flops_of_members_are_the_mean_of_their_single_runs() -> None:
    model = ModelConfig(dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_dim=96, vocab_size=100)
    peak = Peak(tflops=1.0, kind="measured", name="x")
    trained = [{"layers.0.self_attn.q_proj.lora_A.weight": (rank, 64)} for rank in (4, 12)]
    alone = [yardstick(model, 128, 1_024, 1, peak, 1.0, [one]) for one in trained]
    both = yardstick(model, 128, 1_024, 1, peak, 1.0, trained)
    assert both.flops_per_token == (alone[0].flops_per_token + alone[1].flops_per_token) / 2
    assert both.flops_per_token_causal == (alone[0].flops_per_token_causal + alone[1].flops_per_token_causal) / 2


def test_truncation_keeps_lines_up_to_the_step_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_steps(path, range(1, 7))
    lines = path.read_bytes().splitlines(keepends=True)
    assert truncate_after(path, 4) == 3
    assert path.read_bytes() == b"".join(line for line in lines if json.loads(line)["step"] <= 4)
    write_steps(path, range(5, 8))
    assert [(entry["kind"], entry["step"]) for entry in read_metrics(path)] == [
        ("step", 1), ("step", 2), ("eval", 2), ("step", 3), ("step", 4), ("eval", 4), ("step", 5), ("step", 6),
        ("eval", 6), ("step", 7),
    ]  # fmt: skip
    assert [file.name for file in tmp_path.iterdir()] == ["m.jsonl"]


@pytest.mark.parametrize("tail", [b'{"kind": "step", "step": 3, "lo', b"\0\0\0\0", b'{"step": 2}', b'"x"\n', b"\0\n"])
def test_truncation_drops_a_torn_end(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "m.jsonl"
    write_steps(path, range(1, 4))
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert truncate_after(path, 100) == 1
    assert path.read_bytes() == whole


def test_truncation_leaves_a_fitting_file_and_no_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    assert truncate_after(path, 3) == 0
    assert not path.exists()
    write_steps(path, range(1, 4))
    before = path.stat()
    assert truncate_after(path, 3) == 0
    assert path.stat().st_ino == before.st_ino


def test_reading_skips_a_torn_last_line_and_refuses_a_broken_one(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_steps(path, range(1, 2))
    path.write_bytes(path.read_bytes() + b'{"step": 2, "lo')
    assert [entry["step"] for entry in read_metrics(path)] == [1]
    path.write_bytes(b"oops\n" + path.read_bytes())
    with pytest.raises(DataError) as caught:
        read_metrics(path)
    assert str(caught.value) == (
        f"{path}, line 1 = 'oops\\n': must be a JSON object with a step (only the last line can be torn by a crash)."
        " Remove the line, or the file."
    )


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "m.jsonl"
    with pytest.raises(RunError) as caught:
        JsonLines(path)
    reason = os.strerror(20) if sys.platform == "linux" else str(caught.value).split("'")[1]
    assert str(caught.value) in {
        f"{path} = {text!r}: must be writable. Free space or set run.dir elsewhere." for text in (reason, "File exists")
    }


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_one_message() -> None:
    metrics = metrics_with(Path("/dev/full"))
    with pytest.raises(RunError) as caught:
        metrics.record_eval(0, 1.0, None, 1, 0.0)
    assert str(caught.value) == (
        "/dev/full = 'No space left on device': must be writable. Free space or set run.dir elsewhere."
    )
    with pytest.raises(RunError):
        metrics.close()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read every scalar of a TensorBoard folder as TensorBoard shows it."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}


def run_into_tensorboard(folder: Path, first: int, last: int, loss: float, resumed_step: int | None) -> None:
    """Log steps first..last with one loss, and an evaluation at the last."""
    clock = Clock()
    board = TensorBoard(folder, resumed_step)
    metrics = Metrics(YARD, CPU, step=first - 1, sinks=(board,), clock=clock)
    for step in range(first, last + 1):
        clock.now += 1.0
        metrics.record(step, loss, 0.5, 1e-3, 100 * step)
    metrics.record_eval(last, loss, 1.25, 10, 0.1)
    metrics.close()


def test_tensorboard_shows_the_records(tmp_path: Path) -> None:
    run_into_tensorboard(tmp_path, 1, 3, 2.0, None)
    found = scalars(tmp_path)
    assert found["train/loss"] == [(1, 2.0), (2, 2.0), (3, 2.0)]
    assert found["heldout/bits_per_byte"] == [(3, 1.25)]
    assert found["speed/mfu"] == [(step, pytest.approx(found["speed/mfu"][0][1])) for step in (1, 2, 3)]
    assert {"train/grad_norm", "train/lr", "speed/tokens_per_s", "memory/peak_gib", "time/data_wait_s"} <= set(found)


def test_tensorboard_replaces_what_lies_past_the_resumed_step(tmp_path: Path) -> None:
    run_into_tensorboard(tmp_path, 1, 5, 2.0, None)
    run_into_tensorboard(tmp_path, 4, 6, 1.0, 3)
    found = scalars(tmp_path)
    assert found["train/loss"] == [(1, 2.0), (2, 2.0), (3, 2.0), (4, 1.0), (5, 1.0), (6, 1.0)]
    assert found["heldout/loss"] == [(6, 1.0)]


def test_perplexity_overflows_to_infinity() -> None:
    assert perplexity(1.0) == math.e
    assert perplexity(1e4) == math.inf


def test_peak_memory_is_of_this_process_and_grows() -> None:
    before, kind = peak_memory_gib(CPU)
    block = bytearray(os.urandom(1)) * (256 * 2**20)
    after, _ = peak_memory_gib(CPU)
    assert kind == "rss"
    assert after >= before and after > len(block) / 2**30
    assert after == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, rel=0.5)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_not_inherited_from_the_launcher() -> None:
    code = """if True:
        import subprocess, sys
        block = bytearray(b"x") * (1000 * 2**20)
        child = "from engine.metrics import *; import torch; print(peak_memory_gib(torch.device('cpu'))[0])"
        print(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True).stdout)
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.05 < float(result.stdout) < 0.9
