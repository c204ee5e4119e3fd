"""User commands around a run: prepare a corpus, convert, generate, benchmark, and the quickstart.

Each is thin over the rooms of the engine, has --help, prints for people, and turns errors that a user can cause into
one message and an exit code. No file here bears the name of a standard module: a script's folder comes first on
sys.path.
"""
