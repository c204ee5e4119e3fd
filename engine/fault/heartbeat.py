"""A rank's heartbeat: where it is, for the processes and threads that watch it."""


class Heart:
    """Where this rank is."""

    def __init__(self) -> None:
        """Start before the first step."""
        self.step, self.phase = 0, "start"

    def beat(self, step: int, phase: str) -> None:
        """Say that this rank is now in `phase` (data, step, record, evaluate, checkpoint) of a step."""
        self.step, self.phase = step, phase
