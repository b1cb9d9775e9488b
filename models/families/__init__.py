"""Model families. To add one: a new file with a `FAMILY`, and one name in the list here."""

from __future__ import annotations

import difflib
from typing import Any

from models.errors import UnknownFamily
from models.families import (
    afmoe,
    deepseek_v2,
    deepseek_v3,
    ernie4_5_moe,
    glm4_moe,
    gpt_oss,
    granitemoe,
    hunyuan_v1_moe,
    jamba,
    lfm2_moe,
    minimax,
    minimax_m2,
    mixtral,
    momentum_smoe,
    nllb_moe,
    olmoe,
    phimoe,
    qwen2_moe,
    qwen3_moe,
    qwen3_next,
    switch_transformers,
)
from models.families.base import Family

_MODULES = (
    *(mixtral, minimax, minimax_m2, phimoe),
    *(qwen2_moe, qwen3_moe, qwen3_next, olmoe),
    *(deepseek_v2, deepseek_v3, glm4_moe, ernie4_5_moe),
    *(hunyuan_v1_moe, afmoe, lfm2_moe, jamba),
    *(granitemoe, gpt_oss, switch_transformers, nllb_moe),
    momentum_smoe,
)
FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}

# Model types that transformers knows and Coalesce does not take, and why.
REFUSED: dict[str, str] = {
    "dbrx": "its experts lie in flat [E*I, H] tensors that its code slices itself",
    "llama4": "its gates scale the inputs of experts, which the statistics do not describe",
    "llama4_text": "its gates scale the inputs of experts, which the statistics do not describe",
    "jetmoe": "its attention has experts too, and layers would have two routers",
}


def find_family(config: dict[str, Any]) -> Family:
    """The adapter for a checkpoint's config.json, with the depth of that model.

    Raises:
        UnknownFamily: with the reason, or the nearest known model type.
        CheckpointError: config.json does not say how many layers there are.
    """
    model_type = str(config.get("model_type"))
    if model_type in FAMILIES:
        return FAMILIES[model_type].bound(config)
    known = f"known: {', '.join(sorted(FAMILIES))}"
    if model_type in REFUSED:
        raise UnknownFamily(f"{model_type} is not supported: {REFUSED[model_type]}", known)
    near = difflib.get_close_matches(model_type, FAMILIES, n=1, cutoff=0.75)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UnknownFamily(
        f"no adapter for model_type {model_type!r}; {known}",
        f"{hint}docs/extending.md says how to add one",
    )


__all__ = ["FAMILIES", "REFUSED", "Family", "find_family"]
