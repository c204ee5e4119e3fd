"""What a person sees: plain lines in a log, a live line on a real pseudo-terminal, and a clean terminal afterwards."""

import io
import math
import os
import pty
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from rich.console import Console

from engine.metrics import EvalRecord, MemberEval, MemberStep, StepRecord
from engine.progress import ProgressDisplay, format_count, format_duration

RECORD = StepRecord(
    step=120,
    loss=3.45678,
    perplexity=31.7,
    grad_norm=0.8123,
    lr=3e-4,
    num_tokens=983_040,
    tokens_per_s=3161.4,
    positions_per_s=3161.4,
    num_devices=2,
    tflops_per_device=0.32104,
    mfu=0.1875,
    mfu_causal=0.17,
    gemm_share=0.1875,
    step_time_s=2.591,
    data_wait_s=0.00259,
    checkpoint_stall_s=0.0,
    wall_s=25.91,
    memory_gib=2.104,
    memory_kind="rss",
    goodput=0.9,
    cp_imbalance=1.0,
    peak_tflops=1.712,
    peak_kind="measured",
    gemm_tflops=1.712,
    time=1000.0,
)
EVALUATION = EvalRecord(
    step=200,
    heldout_loss=2.5,
    heldout_perplexity=12.182,
    bits_per_byte=1.23456,
    heldout_tokens=32_768,
    eval_s=4.2,
    time=0.0,
)


def log_of(*records: StepRecord | EvalRecord | str, steps: int = 2000) -> list[str]:
    """The lines that a log gets."""
    stream = io.StringIO()
    with ProgressDisplay(Console(file=stream, width=40), steps) as progress:
        for record in records:
            if isinstance(record, StepRecord):
                progress.show(record)
            elif isinstance(record, EvalRecord):
                progress.show_eval(record)
            else:
                progress.say(record)
    return stream.getvalue().splitlines()


def test_a_log_gets_one_line_a_logged_step_whatever_its_width() -> None:
    assert log_of(RECORD) == [
        "step  120/2000  loss 3.4568  grad    0.812  lr 3.00e-04   3,161 tok/s  0.321 TFLOP/s  GEMM 18.8%"
        "  2.59 s/step  data 0.1%  2.10 GiB  eta 1:21:11"
    ]


def test_lines_of_a_log_are_aligned() -> None:
    first, second = log_of(replace(RECORD, step=1, grad_norm=12.3, tokens_per_s=812.0), RECORD)
    assert first.index("GEMM") == second.index("GEMM")


def test_utilisation_is_called_mfu_only_against_a_real_peak() -> None:
    assert "  MFU 18.8%  " in log_of(replace(RECORD, peak_kind="datasheet"))[0]
    assert "  MFU 18.8%  " in log_of(replace(RECORD, peak_kind="configured"))[0]
    assert "MFU" not in log_of(RECORD)[0]


def test_checkpoint_stall_is_said_when_there_was_one() -> None:
    assert log_of(replace(RECORD, checkpoint_stall_s=0.512))[0].endswith("  checkpoint 0.51 s")


def test_eta_follows_the_pace_since_the_first_shown_step() -> None:
    later = replace(RECORD, step=130, time=1100.0)  # 10 steps in 100 s: evaluations and checkpoints are in there too
    assert log_of(RECORD, later, steps=230)[1].endswith("eta 16:40")


def test_non_finite_values_are_shown_as_they_are() -> None:
    line = log_of(replace(RECORD, loss=math.nan, grad_norm=math.inf))[0]
    assert "loss nan  grad      inf  " in line


def test_notes_and_evaluations_in_a_log() -> None:
    note = "resumed from [checkpoints/step-00000100], a note much longer than the console is wide"
    assert log_of(note, EVALUATION, replace(EVALUATION, bits_per_byte=None)) == [
        note,
        "step  200/2000  held-out loss 2.5000  1.2346 bits/byte  perplexity 12.18  32,768 tokens in 4.2 s",
        "step  200/2000  held-out loss 2.5000  perplexity 12.18  32,768 tokens in 4.2 s",
    ]


def test_each_members_loss_stands_at_the_end_of_a_line() -> None:
    steps = {name: MemberStep(loss=loss, grad_norm=1.0, lr=0.1, num_tokens=1) for name, loss in (("a", 3.1), ("b", 4))}
    assert log_of(replace(RECORD, members=steps))[0].endswith("eta 1:21:11  a 3.1000  b 4.0000")
    heldout = {"a": MemberEval(heldout_loss=2.25, bits_per_byte=None, heldout_tokens=5)}
    assert log_of(replace(EVALUATION, members=heldout))[0].endswith("32,768 tokens in 4.2 s  a 2.2500")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1:00"),
        (754, "12:34"),
        (11_554, "3:12:34"),
        (183_600, "2d 03h"),
        (math.nan, "?"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (812.4, "812"),
        (9_999.4, "9,999"),
        (45_210, "45.2k"),
        (123_456, "123k"),
        (999_600, "1.00M"),
        (12_345_678, "12.3M"),
        (3.2e9, "3,200.0M"),
        (math.inf, "?"),
    ],
)
def test_counts(value: float, text: str) -> None:
    assert format_count(value) == text


def test_a_console_that_goes_away_does_not_end_the_run() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    stream = os.fdopen(write_end, "w")
    with ProgressDisplay(Console(file=stream), 2000) as progress:
        progress.show(RECORD)
        progress.show(RECORD)
        progress.say("note")
    with pytest.raises(BrokenPipeError):
        stream.close()


# The training loop of the tests on a terminal: it shows two records and a note, then waits to be interrupted.
LOOP = """if True:
    import sys, time
    from rich.console import Console
    from engine.progress import ProgressDisplay
    from tests.unit.engine.test_progress import EVALUATION, RECORD, replace
    try:
        with ProgressDisplay(Console(), 2000, 100) as progress:
            progress.say("corpus [bold]prepared")
            progress.show(RECORD)
            for step in range(121, 130):
                progress.advance(step)
            progress.show_eval(EVALUATION)
            progress.show(replace(RECORD, step=130, loss=2.25, time=1100.0))
            if "wait" in sys.argv:
                print("READY")
                while True:
                    time.sleep(0.01)
    except KeyboardInterrupt:
        sys.exit(130)
"""


class Terminal:
    """A child process on a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        """Start the loop."""
        self.master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "24"}
        command = [sys.executable, "-c", LOOP, *arguments]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
        )
        os.close(slave)
        self.text = ""

    def read_until(self, word: str | None) -> str:
        """Read until a word appears, or to the end; return all text so far."""
        deadline = time.monotonic() + 60
        while word is None or word not in self.text:
            assert select.select([self.master], [], [], max(deadline - time.monotonic(), 0))[0], self.text
            try:
                data = os.read(self.master, 4096)
            except OSError:  # Linux: the other side is closed
                data = b""
            if not data:
                break
            self.text += data.decode()
        return self.text

    def end(self) -> int:
        """Read the rest and return the exit code."""
        self.read_until(None)
        os.close(self.master)
        return self.process.wait(timeout=30)


SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"


def test_a_terminal_gets_a_live_line_with_notes_above_it() -> None:
    terminal = Terminal()
    assert terminal.end() == 0
    text = terminal.text
    assert "corpus [bold]prepared" in text
    assert "held-out loss 2.5000" in text
    assert "130/2000" in text and "loss 2.2500  3,161 tok/s  GEMM 18.8%  eta 5:11:40" in text
    assert text.endswith((SHOW_CURSOR, "\n"))
    # The last frame stands in a line of its own, below everything that was said.
    assert text.rindex("held-out") < text.rindex("loss 2.2500") < text.rindex("\n")


def test_ctrl_c_leaves_the_terminal_clean() -> None:
    terminal = Terminal("wait")
    shown = terminal.read_until("READY")
    # Even before it ends the cursor is visible, so a killed run leaves a usable terminal too.
    assert shown.rindex(SHOW_CURSOR) > shown.rindex(HIDE_CURSOR)
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130
    assert "Traceback" not in terminal.text
    assert terminal.text.rindex(SHOW_CURSOR) > terminal.text.rindex(HIDE_CURSOR)
    rest = terminal.text[terminal.text.rindex("eta") :]
    assert "\n" in rest
