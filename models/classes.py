"""Families whose classes are not part of transformers are made known to it before they are used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def prepare_classes(config: Mapping[str, Any]) -> None:
    """Lets transformers' Auto classes build what this config.json describes; no code is run that
    lies beside the weights. May be called repeatedly, and does nothing for families that
    transformers has itself."""
    if config.get("model_type") == "momentum_smoe":
        from models.momentum.registration import register

        register()
