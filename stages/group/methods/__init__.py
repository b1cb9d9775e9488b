"""Deciding methods, one file each. A new one is a file, a config class and a line in each list."""

from __future__ import annotations

from stages.group.methods import frequency, mc_smoe, reap
from stages.group.methods.base import Decide

DECIDE: dict[str, Decide] = {
    "mc_smoe": mc_smoe.decide,
    "frequency": frequency.decide,
    "reap": reap.decide,
}
