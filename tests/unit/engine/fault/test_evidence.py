"""Who is behind, judged from what is known of each rank; and how a stack is read."""

import faulthandler
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from engine.fault.evidence import Finding, behind, examine, hang_fault, read_findings, write_evidence
from engine.fault.heartbeat import Beat
from engine.fault.stacks import fatal_error, main_thread, passes_on, waits_for_ranks

IN_COLLECTIVE = Finding(
    rank=0, host="n1", step=20, phase="step", silent_s=61.0, allowed_s=60.0, stopped=False, waits=True,
    place="engine/step.py:60 in train_step (distributed_c10d.py:3252 in all_reduce)", num_collectives=400,
    last_collective="gloo:all_reduce number 200 (not done)",
)  # fmt: skip


def ranks(*differences: dict[str, object]) -> list[Finding]:
    return [replace(IN_COLLECTIVE, rank=rank, **given) for rank, given in enumerate(differences)]  # pyright: ignore


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        (({}, {"stopped": True, "step": 21}, {"step": 19}), [1]),  # who is stopped can't help it
        (({"stopped": True, "step": 21}, {}, {"stopped": True, "step": 19}), [0, 2]),
        (({}, {"step": 19}, {"waits": False}), [1]),
        (({}, {"phase": "data", "waits": True}, {"waits": False}), [1]),
        (({"phase": "record"}, {}, {"phase": "evaluate"}), [1]),
        (({}, {"waits": False}, {"num_collectives": 399}), [1]),
        (({}, {"num_collectives": 399}, {}), [1]),
        (({}, {"waits": False}, {"waits": False}), [1, 2]),
        (({}, {}, {}), []),
        (({},), [0]),
    ],
)
def test_the_least_advanced_rank_is_behind(differences: tuple[dict[str, object], ...], expected: list[int]) -> None:
    assert [finding.rank for finding in behind(ranks(*differences))] == expected


def test_the_verdict_is_one_line() -> None:
    place = "models/llama.py:28 in forward"
    fault = hang_fault(ranks({}, {"waits": False, "place": place, "host": "n2"}, {}), "runs/x/stacks/now")
    assert fault.line() == (
        "no step for 61 s, 60 s are allowed: rank 1 is behind, in step 20 at models/llama.py:28 in forward, while "
        "others wait for it; its last collective: gloo:all_reduce number 200 (not done) (rank 1 on n2, step 20). The "
        "job was ended; runs/x/stacks/now has the stacks and the last collectives of the ranks. The same command "
        "continues from the last checkpoint. If steps may take so long, raise fault.hang_min_s, fault.step_timeout_s "
        "or fault.first_step_timeout_s"
    )
    stopped = hang_fault(ranks({}, {"stopped": True, "place": "", "last_collective": ""}), "f")
    assert stopped.what.endswith("rank 1 is behind, its process is stopped (SIGSTOP, or a debugger)")
    woken = hang_fault(ranks({}, {"stopped": True, "place": place, "last_collective": ""}), "f")
    assert woken.what.endswith(f"its process is stopped (SIGSTOP, or a debugger) near {place}")
    silent = hang_fault(ranks({}, {"waits": False, "place": "", "last_collective": ""}), "f")
    assert silent.what.endswith("rank 1 is behind, and its process answers nothing")
    late = {"waits": False, "place": place, "last_collective": ""}
    several = hang_fault(ranks(late, late, {}, late), "f")
    assert several.what.endswith(f"ranks 0, 1 and 3 are behind, in step 20 at {place}, while others wait for them")
    nobody = hang_fault(ranks({}, {}), "f")
    assert (nobody.rank, "all ranks stand at the same point, engine/step.py:60" in nobody.what) == (None, True)


def test_all_who_are_stopped_are_named() -> None:
    stopped = {"stopped": True, "place": "models/llama.py:28 in forward", "last_collective": ""}
    fault = hang_fault(ranks({**stopped, "step": 21}, {}, stopped), "f")
    assert fault.what.endswith(
        "ranks 0 and 2 are behind, their processes are stopped (SIGSTOP, or a debugger), rank 0 near "
        "models/llama.py:28 in forward"
    )
    assert fault.more["ranks"] == [0, 2]


def stacks_of_this_process() -> str:
    """What faulthandler writes while this thread stands here, with another one beside it."""
    done = threading.Event()
    beside = threading.Thread(target=done.wait)
    beside.start()
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        text = file.read()
    done.set()
    beside.join()
    return text


def test_findings_come_back_from_disk_as_they_were_made(tmp_path: Path) -> None:
    recorder = {
        "entries": [
            {"profiling_name": "gloo:all_gather", "collective_seq_id": 7, "retired": True, "time_created_ns": 2},
            {"profiling_name": "gloo:all_reduce", "collective_seq_id": 9, "retired": False, "time_created_ns": 1},
        ],
        "pg_status": {"0": {"last_enqueued_collective": "9"}, "1": {"last_enqueued_collective": "-1"}},
    }
    beat = Beat(step=4, phase="step", at=0.0, allowed_s=60.0, gone=False)
    answered = examine(2, "n2", beat, 61.23456, stopped=False, stacks=stacks_of_this_process(),
                       collectives={"gloo": recorder})  # fmt: skip
    silent = examine(3, "n2", beat, 61.0, stopped=True, stacks="", collectives={})
    assert answered.finding.place.startswith("tests/unit/engine/fault/test_evidence.py:")
    assert answered.finding.place.endswith(" in stacks_of_this_process")
    assert not answered.finding.waits
    assert (answered.finding.num_collectives, answered.finding.last_collective) == (
        9,
        "gloo:all_gather number 7 (done)",
    )
    assert (silent.finding.place, silent.finding.num_collectives) == ("", -1)
    write_evidence(tmp_path / "stacks", 2, [answered, silent])
    assert read_findings(tmp_path / "stacks") == {2: [answered.finding, silent.finding]}
    assert sorted(path.name for path in (tmp_path / "stacks").iterdir()) == [
        "node-00002.json", "rank-00002.json", "rank-00002.txt", "rank-00003.txt"
    ]  # fmt: skip
    assert read_findings(tmp_path / "nothing") == {}


def test_a_line_tells_whether_it_waits_for_other_ranks(tmp_path: Path) -> None:
    code = tmp_path / "code.py"
    lines = {
        "torch.ops._c10d_functional.wait_tensor.default(buf3)": True,  # as compiled code has it
        "work.wait()": True,
        "dist.all_reduce(total, group=group)": True,
        "self._wait_batch_p2p(ops)": True,
        "x = x.broadcast_to(shape)": False,
        "hidden = self.attention(hidden)": False,
        "time.sleep(self._config.seconds)": False,
    }
    code.write_text("\n".join(lines) + "\n")
    assert [waits_for_ranks(str(code), number) for number in range(1, len(lines) + 1)] == list(lines.values())
    assert waits_for_ranks("/site-packages/torch/distributed/distributed_c10d.py", 1)
    assert not waits_for_ranks(threading.__file__, 1)
    assert passes_on("/site-packages/torch/_ops.py") and not passes_on("/site-packages/torch/distributed/_tools.py")


def test_the_thread_that_died_is_the_one_that_is_marked() -> None:
    text = """Fatal Python error: Segmentation fault

Thread 0x00007f1 (most recent call first):
  File "/x/a.py", line 1 in first

Current thread 0x00007f2 (most recent call first):
  File "/x/b.py", line 2 in second
  File "/x/c.py", line 3 in third

Thread 0x00007f3 (most recent call first):
  File "/x/d.py", line 4 in main
"""
    assert fatal_error(text) == ("Segmentation fault", "/x/b.py:2 in second")
    assert [str(place) for place in main_thread(text)] == ["/x/d.py:4 in main"]
    assert fatal_error("Fatal Python error: Aborted\n") == ("Aborted", "")
    assert fatal_error("") == ("", "")
