"""Model families. To add one: a new file with a `FAMILY`, and one line here."""

from __future__ import annotations

import difflib
from typing import Any

from models.errors import UnknownFamily
from models.families import mixtral, olmoe, qwen2_moe, qwen3_moe
from models.families.base import Family, layer_of

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (mixtral.FAMILY, olmoe.FAMILY, qwen2_moe.FAMILY, qwen3_moe.FAMILY)
}


def find_family(config: dict[str, Any]) -> Family:
    """The adapter for a checkpoint's config.json.

    Raises:
        UnknownFamily: with the nearest known model type.
    """
    model_type = str(config.get("model_type"))
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    near = difflib.get_close_matches(model_type, FAMILIES, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UnknownFamily(
        f"no adapter for model_type {model_type!r}; known: {', '.join(sorted(FAMILIES))}",
        f"{hint}docs/add-a-family.md says how to add one",
    )


__all__ = ["FAMILIES", "Family", "find_family", "layer_of"]
