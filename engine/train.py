"""A run from its config to its last step: build it once, then step, record, evaluate if due, checkpoint if due.

The state of a run is the weights, the optimizer's moments and the step: the batch and the learning rate of a step are
functions of the step, so that whatever is killed continues from its last checkpoint as if nothing had happened.
"""

import gc
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from configs.errors import DataError, problem
from configs.load import config_to_dict
from configs.schema import Config
from engine.adapter_folder import write_adapter
from engine.counters import Counters, read_step
from engine.data.batches import Batch
from engine.evaluate import HeldoutLoss, evaluate
from engine.fault.record import Fault
from engine.fault.stop import reason_text
from engine.lr import lr_at
from engine.metrics import MemberEval, RankCosts, StepRecord
from engine.peaks import measured_gemm_tflops
from engine.recovery import compare_replicas, go_back, tell_skipped
from engine.run import Run
from engine.step import StepResult, part_of_rank, train_step
from parallel.context import imbalance, work
from parallel.fsdp import DTYPES
from parallel.mesh import Layout


@dataclass(slots=True)
class Outcome:
    """How a run ended, for whoever started it."""

    step: int
    last: StepRecord | None = None
    """The last logged step of this start of the run."""
    heldout: HeldoutLoss | None = None
    """The last evaluation of this start of the run."""
    stopped_by: int = 0
    """What asked the run to stop (engine/fault/stop.py); 0 where nothing did."""


def train(run: Run) -> Outcome:
    """Take the run from where it stands to its last step, or to where it was asked to stop; every rank calls it."""
    care, outcome = run.care, Outcome(run.step)
    care.sentinel.start()
    with _collected_at_fixed_steps(), care.requests.heeded():
        outcome.stopped_by = care.agreement.now()
        if run.step == 0 and run.config.eval.every_steps and not outcome.stopped_by:
            outcome.heldout = _evaluate(run, 0)
        going = not outcome.stopped_by
        while going:
            going = _train_steps(run, outcome)
        care.heart.beat(run.step, "checkpoint")
        with run.start_metrics().checkpointing():
            run.checkpointer.wait()
    outcome.step = run.step
    if run.step == run.config.run.steps:
        outcome.stopped_by = 0  # it came to its end by itself
    _conclude(run, outcome.stopped_by)
    if run.step == run.config.run.steps:
        _write_adapter(run)
    return outcome


def _conclude(run: Run, code: int) -> None:
    """Write down that the run was asked to stop, if it was; the file that asked has done its work."""
    if run.layout.rank > 0:
        return
    with suppress(OSError):
        run.folder.stop.unlink()
    if not code:
        return
    did = f"all ranks saved step {run.step}" if run.step else "nothing was to be saved"
    what, do = f"asked to stop by {reason_text(code)}", "The same command goes on"
    run.care.log.take(Fault(kind="stop", what=what, did=did, do=do, step=run.step, attempt=run.care.log.attempt),
                      said=False)  # fmt: skip


def _train_steps(run: Run, outcome: Outcome) -> bool:
    """Train until the run is done or asked to stop; True where it has gone back and is to be called again."""
    config, care, metrics = run.config, run.care, run.start_metrics()
    counters = Counters.starting_at(run.tokens_of_members or run.num_tokens, run.layout.device)
    with _batches(run) as batches:
        for step in range(run.step + 1, config.run.steps + 1):
            care.heart.beat(step, "data")
            care.injector.before_step(step)
            with metrics.waiting_for_data():
                microbatches = next(batches)
            care.heart.beat(step, "step")
            lr = lr_at(step - 1, config.lr, config.optim.lr, config.run.steps)
            max_norm = config.optim.max_grad_norm
            result = train_step(
                run.model, run.optimizer, run.forward_backward, microbatches, lr, max_norm, run.layout, care.guard
            )
            run.step = step
            counters.add(result)
            if step == run.first_step + 1:
                _first_step_done(run)
            _advance(run, step)
            if _due(step, config.metrics.every_steps, config) or step == 1:
                care.heart.beat(step, "record")
                outcome.last = _record(run, result, counters, lr, _cp_imbalance(run.layout, microbatches))
                care.stragglers.after_logged_step(step)
            elif run.progress is not None:
                run.progress.advance(step)
            _compare_if_due(run)
            now = None
            if _due(step, config.eval.every_steps, config) and not care.guard.trips:
                now = outcome.heldout = _evaluate(run, step)
            outcome.stopped_by = care.agreement.after_step()
            if outcome.stopped_by or _due(step, config.checkpoint.every_steps, config, always_last=True):
                care.heart.beat(step, "checkpoint")
                must = bool(outcome.stopped_by) or step == config.run.steps
                _checkpoint(run, counters, now, must=must)
            if care.guard.trips:
                go_back(run)
                return True
            if outcome.stopped_by:
                return False
            if step % config.metrics.gc_every_steps == 0:
                gc.collect()
    return False


def _advance(run: Run, step: int) -> None:
    """Note how far the run has come, for whoever asks after it was killed."""
    assert run.metrics is not None, "metrics start before the first step"
    if run.care.attempts is not None:
        run.care.attempts.advance(step, run.productive_s + run.metrics.productive_s())


def _first_step_done(run: Run) -> None:
    """Be less patient from here on, and say how long it took to get here."""
    _shorten_timeouts(run)
    if run.progress is not None and run.care.attempts is not None and run.first_step:
        run.progress.say(f"first step done {run.care.attempts.wall_s():.1f} s after the start")


def _write_adapter(run: Run) -> None:
    """Leave what was trained beside a base where others can load it; on rank 0."""
    folder = run.folder
    if run.layout.rank > 0:
        return
    if write_adapter(folder.checkpoints, folder.adapter, run.config.adapter) and run.progress is not None:
        run.progress.say(f"adapter, as PEFT loads it: {folder.adapter}")


def _due(step: int, every_steps: int, config: Config, *, always_last: bool = False) -> bool:
    """True at multiples of `every_steps` and at the last step; 0 means never, or at the last step only."""
    if step == config.run.steps and (every_steps or always_last):
        return True
    return every_steps > 0 and step % every_steps == 0


@contextmanager
def _batches(run: Run) -> Iterator[Iterator[list[Batch]]]:
    """Read each step's microbatches one step ahead, in a thread."""
    layout, steps = run.layout, range(run.step, run.config.run.steps)

    def read(step: int) -> list[Batch]:
        size = run.config.data.micro_batch_size
        with _reading(run, step + 1):
            batch_number = run.care.rollbacks.batch_of(step + 1)
            parts = run.data.microbatches(batch_number, layout.dp_rank, layout.dp_size, size)
            for batch in parts:
                batch.check(run.config.model.vocab_size)
        return [part_of_rank(batch, layout).to(layout.device) for batch in parts]

    def ahead() -> Iterator[list[Batch]]:
        pending = reader.submit(read, steps.start) if steps else None
        for step in steps:
            assert pending is not None, "a step is left, so its batch was asked for"
            ready = pending.result()
            pending = reader.submit(read, step + 1) if step + 1 < steps.stop else None
            yield ready

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as reader:
        yield ahead()


@contextmanager
def _reading(run: Run, step: int) -> Iterator[None]:
    """Say of which step the batch is that can't be read; it is read in a thread, ahead of the step."""
    try:
        yield
    except (DataError, OSError) as error:
        text = (
            str(error) if isinstance(error, DataError) else problem(error.filename or "data", "", str(error.strerror))
        )
        run.care.log.own("bad_batch", text.rstrip("."), "the run ended before the step", step=step, said=False)
        raise DataError(f"batch of step {step}: {text}") from error


@contextmanager
def _collected_at_fixed_steps() -> Iterator[None]:
    """Keep Python's garbage collector from stopping one rank at a time while the others wait."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def _cp_imbalance(layout: Layout, microbatches: Sequence[Batch]) -> float:
    """Count how unevenly the documents of a step share attention's work out among the ranks of cp."""
    degree, first = layout.degree("cp"), microbatches[0]
    if degree == 1 or first.documents is None:
        return 1.0
    counts = [work(batch.documents.shape[1], degree, batch.documents.cpu()) for batch in microbatches if
              batch.documents is not None]  # fmt: skip
    return imbalance([sum(of_rank) for of_rank in zip(*counts, strict=True)])


def _record(run: Run, result: StepResult, counters: Counters, lr: float, cp_imbalance: float) -> StepRecord:
    """Read the device, once, and write the record of a logged step."""
    assert run.metrics is not None, "metrics start before the first step"
    members, peak = run.config.adapter.members, run.config.optim.lr
    names = [member.name for member in members]
    read = read_step(result, counters, [lr * (one.lr or peak) / peak for one in members] or [lr], run.care.guard)
    goodput = run.care.attempts.goodput() if run.care.attempts is not None else 0.0
    costs = run.metrics.rank_costs(run.step, cp_imbalance, goodput)
    worst = RankCosts(*run.layout.max_over_ranks(list(astuple(costs))))
    if worst.gemm_share > 1:
        _measure_gemm_again(run)
    run.tokens_of_members = [step.num_tokens for step in read.steps if names]
    run.num_tokens = sum(step.num_tokens for step in read.steps)
    each = dict(zip(names, read.steps, strict=True)) if names else None
    record = run.metrics.record(run.step, read.loss, read.grad_norm, read.lr, run.num_tokens, worst, each)
    if run.progress is not None:
        run.progress.show(record)
        for steps in read.empty_steps(names):
            run.progress.say(f"{steps} up to step {run.step} had no target and changed nothing")
    tell_skipped(run, read.skipped)
    counters.empty.zero_()
    return record


def _measure_gemm_again(run: Run) -> None:
    """A step that outran the GEMM rate proves that the machine was disturbed when the rate was measured."""
    assert run.metrics is not None, "metrics start before the first step"
    dtype, budget_s = DTYPES[run.config.precision.compute], run.config.metrics.gemm_seconds
    with run.metrics.excluded():
        run.metrics.raise_gemm_rate(measured_gemm_tflops(run.layout.device, dtype, budget_s=budget_s))


def _heldout_batches(run: Run, step: int) -> Iterator[Batch]:
    """Read the held-out batches; each of them is a sign of life."""
    for batch in run.heldout():
        run.care.heart.beat(step, "evaluate")
        yield part_of_rank(batch, run.layout).to(run.layout.device)


def _evaluate(run: Run, step: int) -> HeldoutLoss:
    """Measure the held-out loss; left out of the step time."""
    metrics = run.metrics or run.start_metrics()
    begin = time.perf_counter()
    with metrics.excluded():
        found = evaluate(run.model, run.forward, _heldout_batches(run, step), run.layout)
    took = time.perf_counter() - begin
    each = {
        member.name: MemberEval(heldout_loss=one.loss, bits_per_byte=one.bits_per_byte, heldout_tokens=one.num_tokens)
        for member, one in zip(run.config.adapter.members, found.members, strict=True)
    }
    record = metrics.record_eval(step, found.loss, found.bits_per_byte, found.num_tokens, took, each or None)
    if run.progress is not None:
        run.progress.show_eval(record)
    return found


def _checkpoint(run: Run, counters: Counters, heldout: HeldoutLoss | None, *, must: bool) -> None:
    """Save the state after this step; the step waits for the copy to the host only.

    A save that fails is told and tried again when the next is due; one that `must` be ends the run. Where too many bad
    steps have come in a row nothing is saved: the run goes back.
    """
    assert run.metrics is not None, "metrics start before the first step"
    with run.metrics.checkpointing():
        names = [member.name for member in run.config.adapter.members]
        guard = run.care.guard
        tell_skipped(run, guard.read())
        if guard.trips:
            return
        compare_replicas(run)
        meta = {
            "step": run.step,
            "num_tokens": int(counters.num_tokens.sum()),
            "config": config_to_dict(run.config),
            "layout": {
                "world_size": run.layout.world_size,
                "mesh": dict(zip(run.layout.axes, run.layout.shape, strict=True)),
            },
            "data": run.data.fingerprints,
            "tokenizer": run.data.tokenizer_hash,
            "versions": {"torch": torch.__version__},
            "productive_s": run.productive_s + run.metrics.productive_s(),
            **run.care.state(),
        }
        if run.base:
            meta["base"] = run.base
        if names:
            meta["num_tokens_of"] = dict(zip(names, counters.num_tokens.tolist(), strict=True))
        loss = None if heldout is None else heldout.loss
        folder, first_bad = run.data.tokenizer_folder, guard.first_bad
        run.checkpointer.save(run.step, run.model, run.optimizer, meta, folder, loss, must=must, keep_before=first_bad)


def _compare_if_due(run: Run) -> None:
    """Compare what several ranks hold, between checkpoints, which do so themselves."""
    assert run.metrics is not None, "metrics start before the first step"
    if _due(run.step, run.config.fault.replica_check_steps, run.config):
        with run.metrics.checkpointing():
            compare_replicas(run)


def _shorten_timeouts(run: Run) -> None:
    """From here on a silent rank is noticed soon; the first step may compile and wait for slow starters.

    The checkpoint's own group keeps its patience: a slow disk is no silent rank.
    """
    limit = timedelta(seconds=run.config.fault.step_timeout_s)
    for group in run.layout.groups:
        dist.distributed_c10d._set_pg_timeout(limit, group)  # pyright: ignore
