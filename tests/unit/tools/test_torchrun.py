"""tools/torchrun.py: what is interrupted while nothing trains yet, and what is not to be interrupted at all."""

import os
import signal
import subprocess
import sys

from tests.runs import ROOT
from tools.torchrun import interrupted_by_signals

STARTING = """
import sys
from tools.torchrun import to_end
sys.exit(to_end([sys.executable, "-c", "print('up', flush=True); import signal; signal.pause()"]))
"""


def test_a_torchrun_without_ranks_has_nothing_to_save_and_is_ended() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STARTING], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=60)  # ends only when nobody holds the pipes any more
    assert (process.returncode, output, errors) == (130, "", "")


def test_what_nohup_protects_is_not_interrupted() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupted_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
