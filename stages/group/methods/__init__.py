"""Deciding methods, one file each. A new one is a file, a config class and a line in each list."""

from __future__ import annotations

from stages.group.methods import (
    ean,
    frequency,
    hc_smoe,
    mc_smoe,
    merge_moe,
    mixed,
    msan,
    naee,
    random,
    ream,
    reap,
    stun,
    uncurl,
)
from stages.group.methods.base import Decide

DECIDE: dict[str, Decide] = {
    "mc_smoe": mc_smoe.decide,
    "uncurl": uncurl.decide,
    "hc_smoe": hc_smoe.decide,
    "ream": ream.decide,
    "merge_moe": merge_moe.decide,
    "frequency": frequency.decide,
    "reap": reap.decide,
    "ean": ean.decide,
    "msan": msan.decide,
    "stun": stun.decide,
    "naee": naee.decide,
    "mixed": mixed.decide,
    "random": random.decide,
}
