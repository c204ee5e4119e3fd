"""The tests, and ranks.py, which runs them on several processes.

A package, so that `from tests.ranks import ranks` can't meet a `tests` folder that some wheel left in site-packages.
"""
