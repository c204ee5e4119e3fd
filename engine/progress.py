"""What a person sees while a run goes on: one live line on a terminal, one plain line a logged step in a log.

Only rank 0 makes one, on the console that its launcher passes in; this file decides words and columns and nothing else.
It draws without a thread of its own (drawing costs the cores that train) and leaves the cursor visible, so that even a
killed run hands back a usable terminal. A console that goes away must not end a run of days: it is dropped.
"""

import math
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from engine.metrics import EvalRecord, StepRecord

_REDRAW_S = 0.25


def format_duration(seconds: float) -> str:
    """Write seconds as 42s, 12:34, 3:12:34 or 2d 03h; ? where unknown."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if whole < 60:
        return f"{whole}s"
    if hours == 0:
        return f"{minutes}:{whole % 60:02d}"
    if hours < 24:
        return f"{hours}:{minutes:02d}:{whole % 60:02d}"
    return f"{hours // 24}d {hours % 24:02d}h"


def format_count(value: float) -> str:
    """Write a rate in four figures at most: 812, 3,161, 45.2k, 1.20M."""
    if not math.isfinite(value):
        return "?"
    for limit, unit, digits in ((9_999.5, 1, 0), (99_950, 1e3, 1), (999_500, 1e3, 0), (9.995e6, 1e6, 2)):
        if value < limit:
            suffix = {1: "", 1e3: "k", 1e6: "M"}[unit]
            return f"{value / unit:,.{digits}f}{suffix}"
    return f"{value / 1e6:,.1f}M"


def format_utilisation(record: StepRecord) -> str:
    """Write MFU as a percentage, named `GEMM` where its peak is only the measured GEMM rate of this machine."""
    name = "GEMM" if record.peak_kind == "measured" else "MFU"
    return f"{name} {100 * record.mfu:.1f}%"


def format_step(record: StepRecord, steps: int, eta_s: float) -> str:
    """Write a logged step as one aligned line of a log; at its end each member's loss."""
    waiting = 100 * record.data_wait_s / record.step_time_s
    parts = [
        f"step {record.step:>{len(str(steps))}}/{steps}",
        f"loss {record.loss:.4f}",
        f"grad {record.grad_norm:8.3g}",
        f"lr {record.lr:.2e}",
        f"{format_count(record.tokens_per_s):>6} tok/s",
        f"{record.tflops_per_device:.4g} TFLOP/s",
        format_utilisation(record),
        f"{record.step_time_s:.3g} s/step",
        f"data {waiting:.1f}%",
        f"{record.memory_gib:.2f} GiB",
        f"eta {format_duration(eta_s)}",
    ]
    if record.checkpoint_stall_s > 0:
        parts.append(f"checkpoint {record.checkpoint_stall_s:.2g} s")
    return "  ".join(parts + [f"{name} {member.loss:.4f}" for name, member in (record.members or {}).items()])


def format_eval(record: EvalRecord, steps: int) -> str:
    """Write an evaluation as one line of a log; at its end each member's loss."""
    parts = [
        f"step {record.step:>{len(str(steps))}}/{steps}",
        f"held-out loss {record.heldout_loss:.4f}",
        f"perplexity {record.heldout_perplexity:.4g}",
        f"{record.heldout_tokens:,} tokens in {record.eval_s:.2g} s",
    ]
    if record.bits_per_byte is not None:
        parts.insert(2, f"{record.bits_per_byte:.4f} bits/byte")
    return "  ".join(parts + [f"{name} {member.heldout_loss:.4f}" for name, member in (record.members or {}).items()])


class ProgressDisplay:
    """The live line or the log of one run; a context manager, so that the terminal is whole again on every way out."""

    def __init__(self, console: Console, steps: int, step: int = 0) -> None:
        """Show progress towards `steps` from `step` steps done; nothing appears before `with`."""
        self._console, self._steps, self._step = console, steps, step
        self._first: StepRecord | None = None
        self._alive = True
        self._drawn_at = 0.0
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.completed}/{task.total}", style="bold"),
                BarColumn(bar_width=None),
                TextColumn("{task.description}", markup=False),
                console=console,
                auto_refresh=False,
                expand=True,
            )
            self._task = self._bar.add_task("", total=steps, completed=step)

    def __enter__(self) -> "ProgressDisplay":
        """Show the live line."""
        if self._bar is not None:
            self._bar.start()
            # rich hides the cursor while it draws; a run that is killed could not bring it back.
            self._console.show_cursor(True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the last state of the line above the prompt."""
        self.close()

    def show(self, record: StepRecord) -> None:
        """Show a logged step."""
        self._first = self._first or record
        self._step = record.step
        eta_s = self._eta_s(record)
        if self._bar is None:
            self._write_line(format_step(record, self._steps, eta_s))
            return
        description = (
            f"loss {record.loss:.4f}  {format_count(record.tokens_per_s)} tok/s  {format_utilisation(record)}"
            f"  eta {format_duration(eta_s)}"
        )
        self._draw(description)

    def advance(self, step: int) -> None:
        """Move the live line to `step` steps done between logged steps; a log stays silent."""
        self._step = step
        if self._bar is not None:
            self._draw()

    def show_eval(self, record: EvalRecord) -> None:
        """Show an evaluation, above the live line."""
        self.say(format_eval(record, self._steps))

    def say(self, text: str) -> None:
        """Write a note, above the live line."""
        if self._bar is None:
            self._write_line(text)
        elif self._alive:
            self._guard(lambda: self._console.print(escape(text), highlight=False, soft_wrap=True))

    def close(self) -> None:
        """Take the live line down; what was last shown stays as text."""
        if self._bar is not None and self._alive:
            self._guard(self._bar.stop)
            self._alive = False

    def _eta_s(self, record: StepRecord) -> float:
        """Seconds to the last step at the pace since the first shown step, evaluations and checkpoints included."""
        first = self._first
        left = self._steps - record.step
        if first is None or record.step <= first.step:  # less where the run has gone back
            return left * record.step_time_s
        return left * (record.time - first.time) / (record.step - first.step)

    def _draw(self, description: str | None = None) -> None:
        bar = self._bar
        if bar is None or not self._alive:
            return
        now = self._console.get_time()
        due = description is not None or now - self._drawn_at >= _REDRAW_S
        if due:
            self._drawn_at = now
        self._guard(lambda: bar.update(self._task, completed=self._step, description=description, refresh=due))

    def _write_line(self, text: str) -> None:
        if self._alive:
            self._guard(lambda: self._console.file.write(text + "\n"))
            self._guard(self._console.file.flush)

    def _guard(self, draw: Callable[[], object]) -> None:
        """Draw; a console that can't be written any more (a closed pipe, a lost terminal) is not written again."""
        try:
            draw()
        except (OSError, ValueError):
            self._alive = False
