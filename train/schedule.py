"""The learning rate's path: up in a line, then constant, in a line to 0, along a cosine, or held and then down.

Steps are counted from 0.  The rise takes ceil(warmup * steps) of them and its first one is not 0.
Names and paths are those of transformers' schedulers, whose rise begins at 0; "wsd" is warm-up, stable, decay
(MiniCPM, arXiv:2404.06395; the fall as a line, Hägele et al., arXiv:2405.18392).
"""

import math

SCHEDULES = ("cosine", "linear", "constant", "wsd")


def learning_rate(
    step: int, steps: int, peak: float, warmup: float, schedule: str = "cosine", decay: float = 0.2
) -> float:
    """The rate of step `step` (from 0) of `steps`.

    `warmup` is the share of steps that rise; `decay` the share that fall at the end of "wsd", at least one step.

    Raises ValueError for a schedule that is not one of SCHEDULES.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r}: one of {', '.join(SCHEDULES)}")
    rise = math.ceil(warmup * steps)
    if step < rise:
        return peak * (step + 1) / rise
    if schedule == "constant":
        return peak
    if schedule == "wsd":
        fall = max(1, math.ceil(decay * steps))
        return peak * min(1.0, (steps - step) / fall)
    done = (step - rise) / max(1, steps - rise)
    return peak * (1 - done) if schedule == "linear" else peak * 0.5 * (1 + math.cos(math.pi * done))
