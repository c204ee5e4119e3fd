"""Which jobs are queued again, from what the files of a run and of the job say."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launchers.requeue import Ending, History, Limits, Standing, Verdict, judge

LIMITS = Limits(requeue=True, max_requeues=2, max_fruitless_starts=3, signal_from_s=100.0)
SIGNALLED = Ending(attempt=1, began_at=0, first_signal_s=20.0)


@pytest.fixture
def history(tmp_path: Path) -> History:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "job").mkdir()
    return History(tmp_path / "run", tmp_path / "job")


def save(history: History, step: int) -> None:
    (history._checkpoints / f"step-{step:08d}").mkdir()


def end(history: History, reason: str, attempt: int = 1) -> None:
    line = {"event": "end", "attempt": attempt, "reason": reason}
    with history._attempts.open("a") as file:
        file.write(json.dumps(line) + "\n")


def test_a_signalled_job_that_saved_is_queued_again_and_the_cause_named(history: History) -> None:
    end(history, "SIGUSR2")
    save(history, 7)
    assert judge(history, LIMITS, Standing(), SIGNALLED) == Verdict(True, 0, "signalled")
    assert judge(history, LIMITS, Standing(preempted=True), SIGNALLED) == Verdict(True, 0, "preempted")
    late = replace(SIGNALLED, first_signal_s=100.0)
    assert judge(history, LIMITS, Standing(), late) == Verdict(True, 0, "time limit")
    lost = replace(SIGNALLED, first_signal_s=None, lost="n3")
    assert judge(history, LIMITS, Standing(), lost) == Verdict(True, 0, "lost n3")


@pytest.mark.parametrize(
    ("reason", "standing", "signalled", "expected"),
    [
        ("done", Standing(), True, Verdict(False, 0, "the run is done")),
        ("the stop file", Standing(), False, Verdict(False, 0, "the run was stopped by the stop file")),
        ("SIGTERM", Standing(ending="SLURM is ending it"), True, Verdict(False, 0, "SLURM is ending it")),
    ],
)
def test_what_ended_as_it_should_is_not(
    history: History, reason: str, standing: Standing, signalled: bool, expected: Verdict
) -> None:
    end(history, reason)
    ending = SIGNALLED if signalled else replace(SIGNALLED, first_signal_s=None)
    assert judge(history, LIMITS, standing, ending) == expected


def test_no_requeue_leaves_a_job_that_failed(history: History) -> None:
    save(history, 7)
    verdict = judge(history, replace(LIMITS, requeue=False), Standing(preempted=True), SIGNALLED)
    assert verdict == Verdict(False, 1, "preempted, and --no-requeue")


def test_time_outs_are_counted_and_preemptions_are_free(history: History) -> None:
    for step, why in enumerate(["time limit", "preempted", "preempted", "time limit"], 1):
        save(history, step)
        history.add_requeue(why, step - 1)
    save(history, 9)
    late = replace(SIGNALLED, began_at=4, first_signal_s=200.0)
    verdict = judge(history, LIMITS, Standing(), late)
    assert verdict == Verdict(False, 1, "its time was up more than --max-requeues = 2 times")
    assert judge(history, LIMITS, Standing(preempted=True), late).requeue


def test_starts_without_a_newer_checkpoint_come_to_an_end(history: History) -> None:
    save(history, 40)
    history.add_requeue("preempted", 0)  # began at 0 and came to 40
    first = replace(SIGNALLED, began_at=40)
    for _ in range(2):
        assert judge(history, LIMITS, Standing(preempted=True), first).requeue
        history.add_requeue("preempted", 40)
    assert judge(history, LIMITS, Standing(preempted=True), first) == Verdict(
        False,
        1,
        "the last 3 starts all began at step 40 and saved nothing newer (fault.max_fruitless_starts); mend the cause, "
        "then submit again",
    )
    assert judge(history, replace(LIMITS, max_fruitless_starts=0), Standing(preempted=True), first).requeue
    save(history, 41)
    assert judge(history, LIMITS, Standing(preempted=True), first).requeue


def test_what_is_not_yet_a_checkpoint_does_not_count(history: History) -> None:
    (history._checkpoints / ".tmp-step-00000009").mkdir()
    (history._checkpoints / "step-00000008.bad").mkdir()
    assert history.newest_step() == 0
    save(history, 3)
    assert history.newest_step() == 3


def test_lines_that_lack_something_are_left_out(history: History) -> None:
    odd = ["{}", "[]", "null", "torn {", '{"event": "end"}', '{"event": "end", "attempt": "9", "reason": "done"}']
    odd += ['{"event": "end", "attempt": 1, "reason": null}', '{"why": 5, "from_step": 0}', '{"why": "preempted"}']
    end(history, "SIGUSR2", attempt=1)
    end(history, "done", attempt=2)
    history.add_requeue("preempted", 0)
    for path in (history._attempts, history._requeues):
        with path.open("a") as file:
            file.write("\n".join(odd) + "\n")
    assert history.last_attempt() == 2
    assert [history.ended_by(attempt) for attempt in (1, 2, 9)] == ["SIGUSR2", "done", ""]
    assert (history.num_requeues(), history.num_requeues("preempted"), history.fruitless_starts(0)) == (1, 1, 2)


def test_a_history_that_is_no_file_is_empty(history: History) -> None:
    history._attempts.mkdir()
    history._requeues.mkdir()
    assert (history.last_attempt(), history.ended_by(1), history.num_requeues()) == (0, "", 0)
    assert history.fruitless_starts(0) == 1
