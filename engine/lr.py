"""The learning rate as a pure function of the step, so that resuming needs no scheduler state.

Steps count from 0. Warmup gives step s the rate peak * (s + 1) / warmup_steps: the first step already moves and the
last step of the warmup has the peak. The decays start from there and reach min_ratio * peak at the last step exactly.
These are the curves of transformers' schedules with linear warmup, taken one step later, so that no step is spent at
learning rate 0.
"""

import math

from configs.schema import LrConfig


def lr_at(step: int, config: LrConfig, peak: float, steps: int) -> float:
    """Return the learning rate of step `step` (0 is the first) of a run of `steps` steps; `peak` is optim.lr."""
    assert step >= 0, f"step {step} is before the first"
    warmup = config.warmup_steps
    if step < warmup:
        return peak * ((step + 1) / warmup)
    if config.schedule == "constant":
        return peak
    last = steps - 1
    # The step that has the peak and from which the decay is measured.
    top = last - config.decay_steps if config.schedule == "wsd" else max(warmup - 1, 0)
    if step <= top or (config.schedule == "wsd" and config.decay_steps == 0):
        return peak
    progress = min((step - top) / max(last - top, 1), 1.0)
    remaining = 0.5 * (1.0 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1.0 - progress
    return peak * (config.min_ratio + (1.0 - config.min_ratio) * remaining)
