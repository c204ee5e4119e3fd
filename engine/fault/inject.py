"""Faults on purpose, by `[fault.inject]`: each is the real thing, done to this process or its files."""

from collections.abc import Callable

from configs.faults import InjectConfig


class Injector:
    """Does to this rank what the config asks for, at its step."""

    def __init__(self, config: InjectConfig) -> None:
        """Draw what is left to chance."""
        self._config = config

    def before_step(self, step: int) -> None:
        """Strike, if it is this step's turn."""

    def at_stage(self, stage: str) -> None:
        """Strike in a save, if it is its turn."""

    def around(self, forward_backward: Callable) -> Callable:
        """Return forward_backward with what poisons losses and gradients."""
        return forward_backward
