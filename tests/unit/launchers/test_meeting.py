"""Nodes that meet in a folder: who is missing has a name, a busy port is passed over, and who falls silent is found."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from configs.errors import RankFailure, RunError
from launchers import meeting
from launchers.meeting import Presence, free_port

HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")


def test_all_tasks_learn_the_first_nodes_port(tmp_path: Path) -> None:
    """Two tasks a node; the later ones only wait."""
    with socket.socket() as busy, ThreadPoolExecutor() as pool:
        busy.bind(("", 0))
        port = busy.getsockname()[1]
        given = [(node, port if first else None) for node in range(3) for first in (False, True)]
        met = [pool.submit(Presence(tmp_path, HOSTS, node).meet, start, 30.0) for node, start in given]
        found = {future.result() for future in met}
    assert len(found) == 1
    assert found.pop() > port


def test_a_port_is_free_only_when_no_interface_holds_it() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.2", 0))
        port = busy.getsockname()[1]
        assert free_port(port) > port
    assert free_port(port) == port


def test_missing_nodes_are_named(tmp_path: Path) -> None:
    with pytest.raises(RankFailure) as error:
        Presence(tmp_path, HOSTS, 1).meet(20000, 0.0)
    assert str(error.value) == (
        "rendezvous: 1 of 3 nodes joined in 0 s; missing 127.0.0.1, 127.0.0.3. See the logs of the missing nodes, if "
        "they wrote any, and `sinfo -R`; --sbatch exclude=NODE goes without one."
    )


def test_a_first_node_whose_name_leads_nowhere_is_named(tmp_path: Path) -> None:
    hosts = ("nowhere.invalid", "127.0.0.2")
    with ThreadPoolExecutor() as pool:
        met = [pool.submit(Presence(tmp_path, hosts, node).meet, 20000, 30.0) for node in range(2)]
        errors = [future.exception() for future in met]
    for host, error in zip(hosts, errors, strict=True):
        assert isinstance(error, RunError)
        assert str(error).startswith(f"rendezvous: nowhere.invalid: can't be resolved on {host}: ")


def test_a_node_that_stands_still_is_silent_and_one_that_left_or_lives_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "SILENCE_S", 0.3)
    nodes = [Presence(tmp_path, HOSTS, node) for node in range(3)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda node: node.meet(20000, 30.0), nodes))
    nodes[0].leave()
    assert nodes[1].silent() == ["127.0.0.3"]
    assert not nodes[1].decides([])
    assert nodes[1].decides(["127.0.0.1", "127.0.0.3"])
    done = threading.Event()

    def live() -> None:
        while not done.is_set():
            nodes[2].beat()

    monkeypatch.setattr(meeting, "SILENCE_S", 30.0)  # it returns with the first beat
    with ThreadPoolExecutor() as pool:
        pool.submit(live)
        try:
            assert nodes[1].silent() == []
        finally:
            done.set()
