"""Ranks that don't meet: who is missing is named within the time, and nothing of a former start is seen by the next.

Most tests call what each rank calls, in threads, with real stores and sockets; those about a whole run start processes.
"""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed import PrefixStore, Store, TCPStore

from configs.errors import LayoutError, RunError
from engine.fault.record import read_lines
from engine.fault.stop import STOP_FILE, StopRequests
from launchers.env import LOOPBACK_ADDRESS, Launch
from launchers.rendezvous import meet
from tests.runs import run_to_end, until

HOST = socket.gethostname()
LIMIT_S = 60.0


def launch(rank: int, port: int, world_size: int = 2, address: str = LOOPBACK_ADDRESS, *, agent: bool = True,
           restart_count: int = 0, ranks_of_node: int = 2) -> Launch:  # fmt: skip
    return Launch(
        started_by="torchrun",
        rank=rank,
        local_rank=rank % ranks_of_node,
        world_size=world_size,
        local_world_size=ranks_of_node,
        master_addr=address,
        master_port=port,
        agent_store=agent,
        restart_count=restart_count,
    )


class Rank(threading.Thread):
    """One rank that meets the others, and how that ended."""

    def __init__(self, place: Launch, timeout_s: float) -> None:
        super().__init__(daemon=True)
        self.place, self.timeout_s = place, timeout_s
        self.requests, self.recorded = StopRequests(), list[str]()
        self.store: Store | None = None
        self.stopped_by, self.error, self.took_s = 0, "", 0.0
        self.start()

    def run(self) -> None:
        began = time.monotonic()
        try:
            self.store, self.stopped_by = meet(self.place, self.timeout_s, self.requests, self.recorded.append)
        except RunError as error:
            self.error = str(error)
        self.took_s = time.monotonic() - began

    def end(self) -> "Rank":
        self.join(LIMIT_S)
        assert not self.is_alive(), "still waiting"
        return self


@pytest.fixture
def agent() -> Iterator[TCPStore]:
    """The store that torchrun's agent keeps."""
    yield TCPStore(LOOPBACK_ADDRESS, 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK_ADDRESS, 0))
        return probe.getsockname()[1]


@pytest.fixture
def listener() -> Iterator[int]:
    """A port that another program holds, which takes connections and says nothing."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        yield other.getsockname()[1]


def test_all_ranks_meet_and_nobody_waits_for_the_limit(agent: TCPStore) -> None:
    ranks = [Rank(launch(rank, agent.port), 300) for rank in range(2)]
    assert [(rank.end().error, rank.stopped_by, rank.recorded) for rank in ranks] == [("", 0, [])] * 2
    assert max(rank.took_s for rank in ranks) < LIMIT_S


def test_ranks_without_an_agent_meet_at_rank_0(free_port: int) -> None:
    late = [Rank(launch(rank, free_port, 3, agent=False), 60) for rank in (1, 2)]
    first = Rank(launch(0, free_port, 3, agent=False), 60)
    assert [rank.end().error for rank in (first, *late)] == ["", "", ""]


def test_every_rank_names_the_missing_ones_and_rank_0_records_it(agent: TCPStore) -> None:
    ranks = [Rank(launch(rank, agent.port, 6), 3) for rank in (0, 1, 2)]
    text = (
        f"rendezvous at 127.0.0.1:{agent.port}: 3 of 6 ranks met in 3 s; "
        f"missing rank 3 on {HOST}, rank 4 of node 2, rank 5 of node 2. "
        "Look at what they printed and at their nodes; where they only start slowly, raise fault.rendezvous_timeout_s."
    )
    assert [rank.end().error for rank in ranks] == [text] * 3
    assert [rank.recorded for rank in ranks] == [[text], [], []]


@pytest.mark.long
def test_a_rank_whose_time_runs_out_before_that_of_rank_0_leaves_the_record_to_it(agent: TCPStore) -> None:
    """Ranks of a cluster don't start at one moment, and each has its own time."""
    first, early = Rank(launch(0, agent.port, 3), 6), Rank(launch(1, agent.port, 3), 2)
    assert "2 of 3 ranks met in 2 s; missing rank 2 of node 1. " in early.end().error
    assert "2 of 3 ranks met in 6 s; missing rank 2 of node 1. " in first.end().error
    assert (early.recorded, first.recorded) == ([], [first.error])


def test_a_missing_rank_0_is_named_too(agent: TCPStore) -> None:
    rank = Rank(launch(1, agent.port), 3).end()
    assert f"1 of 2 ranks met in 3 s; missing rank 0 on {HOST}. " in rank.error
    assert rank.recorded == [rank.error]


def test_nobody_listens_where_rank_0_should(free_port: int) -> None:
    rank = Rank(launch(1, free_port, agent=False), 1).end()
    assert rank.error == (
        f"127.0.0.1:{free_port}: no rendezvous within 1 s (Connection refused). See that rank 0 has started, that "
        "MASTER_ADDR and MASTER_PORT are its own, and that no firewall is between."
    )


def test_a_stranger_on_the_port_does_not_hold_a_rank_for_ever(listener: int) -> None:
    """torch 2.13's TCPStore waits for such an answer without an end, whatever its time-out."""
    rank = Rank(launch(1, listener), 1).end()
    assert "no rendezvous within 1 s (something listens there that is not this run's store)" in rank.error


def test_a_port_in_use_is_said_at_once(listener: int) -> None:
    with pytest.raises(LayoutError) as caught:
        meet(launch(0, listener, agent=False), 300, StopRequests(), lambda text: None)
    assert str(caught.value) == (
        f"MASTER_PORT = {listener}: is in use by another process (rank 0 opens it on {HOST}). "
        "`ss -ltnp` shows who holds it; choose another port."
    )


def test_a_name_that_leads_nowhere() -> None:
    with pytest.raises(LayoutError, match=r"^MASTER_ADDR = 'no-such-host\.invalid': can't be resolved") as caught:
        meet(launch(1, 29500, address="no-such-host.invalid"), 300, StopRequests(), lambda text: None)
    assert f"on {HOST}: " in str(caught.value)


def test_a_store_that_goes_away_is_no_traceback(agent: TCPStore) -> None:
    """A store like torchrun's that ends with its process while the ranks wait."""
    code = (
        "from torch.distributed import TCPStore; import sys\n"
        "store = TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)\n"
        "print(store.port, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as keeper:
        assert keeper.stdout is not None
        port = int(keeper.stdout.readline())
        rank = Rank(launch(1, port), LIMIT_S)
        client = PrefixStore("ropewalk--0", TCPStore(LOOPBACK_ADDRESS, port))
        until(lambda: client.check(["rank-1"]))
        keeper.kill()
    assert f"rendezvous at 127.0.0.1:{port}: lost contact with the store while the ranks met" in rank.end().error


def test_a_stop_asked_of_one_waiting_rank_stops_all(agent: TCPStore) -> None:
    ranks = [Rank(launch(rank, agent.port, 3), LIMIT_S) for rank in (0, 1)]
    ranks[1].requests.note(STOP_FILE)
    assert [(rank.end().stopped_by, rank.error) for rank in ranks] == [(STOP_FILE, "")] * 2


def test_a_restart_at_the_same_store_sees_nothing_of_the_former_start(agent: TCPStore) -> None:
    assert [rank.end().error for rank in [Rank(launch(rank, agent.port), 60) for rank in (0, 1)]] == ["", ""]
    alone = Rank(launch(0, agent.port, restart_count=1), 3).end()
    assert "1 of 2 ranks met in 3 s; missing rank 1" in alone.error  # who met before is not taken to be here


def test_a_run_whose_rank_is_missing_ends_with_one_message_and_a_record(workplace: Path) -> None:
    three = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
    options = ("--run.name", "missing", "--data.global_batch_size", "6", "--fault.rendezvous_timeout_s", "5")
    code, output = run_to_end(workplace, 2, *options, variables=three)
    assert code == 1
    assert f": 2 of 3 ranks met in 5 s; missing rank 2 on {HOST}. " in output
    assert (output.count("error: "), output.count("Traceback")) == (1, 0), output
    (line,) = (workplace / "runs" / "missing" / "faults.jsonl").read_text().splitlines()
    fault = json.loads(line)
    assert (fault["kind"], fault["rank"], fault["did"]) == ("rendezvous", 0, "the run did not start")
    assert "missing rank 2" in fault["what"]


@pytest.mark.parametrize("wrong", ["port", "name"])
def test_a_run_that_has_no_place_to_meet_says_so_once(workplace: Path, listener: int, wrong: str) -> None:
    own = {"TORCHELASTIC_USE_AGENT_STORE": "False"}  # as under srun: rank 0 opens the store
    given, text = {
        "port": ({"MASTER_PORT": str(listener)}, f"MASTER_PORT = {listener}: is in use by another process "),
        "name": ({"MASTER_ADDR": "no-such-host.invalid"}, "MASTER_ADDR = 'no-such-host.invalid': can't be resolved "),
    }[wrong]
    options = ("--run.name", f"no-{wrong}", "--fault.rendezvous_timeout_s", "5")
    code, output = run_to_end(workplace, 2, *options, variables=own | given)
    assert code == 1
    assert f"error: {text}" in output
    assert (output.count("error: "), output.count("Traceback")) == (1, 0), output
    faults = read_lines(workplace / "runs" / f"no-{wrong}" / "faults.jsonl")
    assert any(fault["kind"] == "rendezvous" and fault["what"].startswith(text) for fault in faults)
