"""What can go wrong with a run, and what is done about it.

record.py tells it (one line to the user, one JSON object into the run folder). stop.py agrees on the step after which a
run that was asked to stop does so. attempts.py keeps the history of a run's starts: lost steps, goodput, restarts that
lead nowhere. guard.py judges steps on the device and takes a run back. replicas.py compares what several ranks hold.
sentinel.py is the thread beside a rank, watchdog.py the process beside the ranks of a node: watch.py starts it,
heartbeat.py is what it watches, ending.py, stacks.py and evidence.py are what it understands. stragglers.py finds who
is slow. memory_snapshot.py says what filled the memory. inject.py makes all of it happen on purpose.
docs/reliability.md maps each fault to its reaction and its test.
"""
