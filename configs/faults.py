"""`[fault]`: when a run stops, what it does about bad steps and silent ranks, and the faults of a rehearsal."""

from dataclasses import dataclass, field
from typing import Literal

from configs.fields import fixed

InjectKind = Literal[
    "none",
    "random",
    "kill",
    "kill_in_save",
    "sigterm",
    "sigusr1",
    "sigusr2",
    "sigint",
    "stop_file",
    "exception",
    "out_of_memory",
    "hang",
    "freeze",
    "straggle",
    "nan_loss",
    "nan_grad",
    "spike",
    "flip_parameter",
    "flip_checkpoint",
    "truncate_checkpoint",
    "remove_checkpoint_file",
    "swap_checkpoint_files",
    "disk_full",
    "read_only_disk",
    "slow_disk",
    "corrupt_batch",
    "truncate_store",
]

RANDOM_KINDS: tuple[str, ...] = (
    "kill",
    "kill_in_save",
    "sigterm",
    "sigusr1",
    "sigusr2",
    "sigint",
    "stop_file",
    "exception",
    "out_of_memory",
    "hang",
    "freeze",
    "straggle",
    "flip_checkpoint",
    "truncate_checkpoint",
    "remove_checkpoint_file",
    "swap_checkpoint_files",
    "disk_full",
    "read_only_disk",
    "slow_disk",
    "corrupt_batch",
)
"""The kinds after which a run, started again, still ends with the weights of an undisturbed one."""

SaveStage = Literal[
    "before_shards", "in_shard", "between_shards", "before_manifest", "before_rename", "after_rename"
]  # fmt: skip


LEADER_STAGES: tuple[SaveStage, ...] = ("before_manifest", "before_rename", "after_rename")
"""Stages of a save that only rank 0 gets to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InjectConfig:
    """A fault that is made to happen, for rehearsals and tests. Each happens once in the life of the run folder."""

    kind: InjectKind = "none"
    """Which fault; docs/reliability.md says what each does. random: `count` faults of `kinds`, drawn by the seed."""
    rank: int = 0
    """Where it happens; -1 draws the rank by the seed."""
    step: int = 0
    """The step in which it happens, or the first one after it that a start comes to; 0 draws it by the seed."""
    stage: SaveStage = "in_shard"
    """Where in a save kill_in_save strikes; from before_manifest on only rank 0 gets there."""
    seconds: float = 1.0
    """How long a straggler or a slow disk takes, each time."""
    steps: int = 1
    """How many steps in a row nan_loss, nan_grad, spike and straggle last, and how many saves a bad disk fails."""
    repeat: bool = False
    """Let it happen again whenever the step comes again, as a fault of the program would."""
    seed: int = 0
    """Draws what is left to chance; independent of run.seed."""
    count: int = 0
    """Faults that `random` draws over the run's steps."""
    kinds: tuple[str, ...] = ()
    """What `random` draws from; empty takes every kind after which a run still ends with the weights of an
    undisturbed one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultConfig:
    """When a run stops, what it does about bad steps, and how long it waits for a silent rank."""

    first_step_timeout_s: int = 1800
    """Seconds a collective or a part of the start may take before the first step is done, and a save at any time."""
    step_timeout_s: int = 300
    """Seconds a collective or a step may take after that, whatever was learned of the run."""
    rendezvous_timeout_s: int = 300
    """Seconds that all ranks have to meet at the start."""
    watchdog: bool = True
    """Have a process beside the ranks of each node that ends the job when a step doesn't end; on Linux only."""
    hang_factor: float = 20.0
    """A step that takes this many times the median step hangs; hang_min_s and step_timeout_s are the bounds."""
    hang_min_s: float = 60.0
    """A step that takes less never hangs, unless step_timeout_s is less still."""
    time_limit_s: int = 0
    """Save and stop when the run has been going for so long since its start; 0 has no limit."""
    max_fruitless_starts: int = 3
    """Automatic restarts in a row from the same step after which the run is not started again; 0 never gives up."""
    skip_limit: int = 3
    """Bad steps in a row that are skipped; one more, and the run goes back to a checkpoint before the first of them."""
    rollback_limit: int = 2
    """Times that the run goes back, skips the data of the bad steps and tries on, before it ends; 0 never goes back."""
    spike_threshold: float = 0.0
    """A loss or gradient norm this many robust deviations above the window's median is a bad step; 0 judges only what
    isn't finite."""
    spike_window: int = fixed(64)
    """Steps that the spike test looks back on; it says nothing before half of them are done."""
    replica_check_steps: int = 0
    """Steps between comparisons of the state that several ranks hold; 0 compares before each checkpoint only."""
    straggler_factor: float = 1.2
    """A rank that takes this many times the median rank's own time is a straggler."""
    straggler_windows: int = 3
    """Logged steps in a row before a straggler is named."""
    inject: InjectConfig = field(default_factory=InjectConfig)
    """Faults for rehearsals."""
