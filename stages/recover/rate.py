"""The learning rate of every step."""

from __future__ import annotations

import math

from stages.recover.config import RecoverConfig


def rate_at(step: int, config: RecoverConfig) -> float:
    """The rate of a step from 0: a linear rise during warm-up, then the schedule.

    The first step is already above 0 and the last one still is.
    """
    if step < config.warmup:
        return config.learning_rate * (step + 1) / (config.warmup + 1)
    if config.schedule == "constant":
        return config.learning_rate
    gone = (step - config.warmup) / (config.steps - config.warmup)
    left = 1 - gone if config.schedule == "linear" else (1 + math.cos(math.pi * gone)) / 2
    return config.learning_rate * left
