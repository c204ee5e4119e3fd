"""One training meets twelve kills at drawn moments of steps and saves, and ends bit for bit as if there had been none.

The faults are those of `[fault.inject] kind = "random"`, as a user would rehearse them: the same seed, the same kills.
`make rehearse` does it with more kinds and more kills, under torchrun.
"""

import signal
from multiprocessing import connection
from pathlib import Path

import pytest

from configs.faults import InjectConfig
from engine.fault.plan import plan_faults
from engine.fault.record import read_lines
from tests.runs import LIMIT_S, Processes, assert_same_end, make_workplace, run_to_end

KILLS, LAST, SEED = 12, 48, 10


@pytest.mark.long
def test_twelve_random_kills_change_nothing(tmp_path: Path) -> None:
    plan = plan_faults(InjectConfig(kind="random", count=KILLS, kinds=("kill", "kill_in_save"), seed=SEED), LAST, 2)
    assert {(planned.kind, planned.rank) for planned in plan} == {
        ("kill", 0), ("kill", 1), ("kill_in_save", 0), ("kill_in_save", 1)
    }, "the seed is chosen for all of them"  # fmt: skip
    workplace = make_workplace(tmp_path)
    command = ["--run.steps", str(LAST), "--checkpoint.every_steps", "3"]
    code, output = run_to_end(workplace, 2, "--run.name", "whole", *command)
    assert code == 0, output
    run = workplace / "runs" / "killed"
    chaos = ["--fault.inject.kind", "random", "--fault.inject.count", str(KILLS), "--fault.inject.seed", str(SEED)]
    chaos += ["--fault.inject.kinds", '["kill", "kill_in_save"]', "--run.name", "killed"]
    for number in range(KILLS + 1):
        # In turns: a save in the background and one that the step waits for.
        mode = ("--checkpoint.asynchronous", "false" if number % 2 else "true")
        with Processes(workplace, 2, *command, *chaos, *mode) as start:
            connection.wait([rank.sentinel for rank in start.ranks], timeout=LIMIT_S)
            if not any(rank.exitcode == 0 for rank in start.ranks):
                start.send(signal.SIGKILL)  # a node takes all of its ranks along
            codes = start.join()
            assert -signal.SIGKILL in codes or codes == [0, 0], start.output()
        if codes == [0, 0]:
            break
    struck = read_lines(run / "injected.jsonl")
    assert sorted(entry["planned"]["number"] for entry in struck) == list(range(KILLS))
    assert_same_end(run, workplace / "runs" / "whole")
