"""Requests to stop: which signals are noted, and when Ctrl-C ends the process."""

import signal

import pytest

from engine.fault.stop import INTERRUPT, SIGNALS_FROM, STOP_FILE, TIME_LIMIT, StopRequests, reason_text


def test_ctrl_c_before_training_ends_the_process_at_once() -> None:
    """Whole runs are interrupted in tests/fault/test_run_kill.py."""
    before = signal.getsignal(signal.SIGINT)
    requests = StopRequests()
    with pytest.raises(KeyboardInterrupt), requests.installed():
        signal.raise_signal(signal.SIGINT)
    assert requests.interrupted
    assert signal.getsignal(signal.SIGINT) is before


def test_the_first_ctrl_c_of_a_training_is_a_request_and_the_second_ends_it() -> None:
    requests = StopRequests()
    with requests.installed(), requests.heeded():
        signal.raise_signal(signal.SIGINT)
        assert (requests.code, requests.interrupted) == (INTERRUPT, False)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert requests.interrupted


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_other_signals_are_noted_at_any_time_and_any_number_of_times(signum: signal.Signals) -> None:
    requests = StopRequests()
    with requests.installed():
        for _ in range(2):
            signal.raise_signal(signum)
    assert requests.code == SIGNALS_FROM + signum
    assert reason_text(requests.code) == signum.name


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    """As for a script's background job."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        requests = StopRequests()
        with requests.installed(), requests.heeded():
            signal.raise_signal(signal.SIGINT)
        assert requests.code == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_every_reason_has_a_name() -> None:
    assert [reason_text(code) for code in (STOP_FILE, TIME_LIMIT)] == ["the stop file", "fault.time_limit_s"]
