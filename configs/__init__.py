"""What a run is.

Chapter one of the architecture, and the lowest room: it imports nothing of ours, so that every other room may be handed
a section of a config.

    schema.py   the sections, as frozen dataclasses; a docstring under each field; which fields a resumed run must keep
    adapters.py the section [adapter]
    load.py     TOML and dicts -> Config, strictly: unknown keys and wrong types, all of them at once
    fields.py   the schema, walked: key, type, default and docstring of every field
    ranges.py   the numbers that each field may hold
    targets.py  which modules and parameters an [adapter] section means
    check.py    fields that must agree, the layout, what a resumed run keeps; `resolve` fills in what is derived
    check_adapter.py  the same for [adapter]
    layout.py   what the degrees of a layout must satisfy, with those that work
    refusals.py combinations that don't run, as one table
    cli.py      the command line of a run: CONFIG, --section.field VALUE, --help
    errors.py   the tree of errors that a user can cause
    *.toml      presets: deviations from the defaults only, headed by the command that runs them

The way of a config: `cli.parse_command_line` -> `check.resolve(config, world_size)` -> the sections go to whoever needs
them. It happens before any process group exists, so that a mistake costs a second and not a queue's wait.
"""
