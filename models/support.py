"""What can be done with which family: the matrix that `coalesce ls families` prints.

A test does everything that is claimed here, and sees refused what is not.
"""

from __future__ import annotations

from models.errors import UnsupportedFeature
from models.families import FAMILIES, REFUSED, Family

FEATURES = (
    "observe",  # routing statistics with the whole model in a worker
    "streaming",  # the same with one layer at a time
    "replicas",  # the same with the experts spread over several ranks
    "merge",  # groups of experts aligned and averaged
    "native",  # output with fewer experts that opens like the original
    "mapped",  # output with the original router and fewer experts behind it
    "expanded",  # output of the original size, every slot its group's expert
    "compress",  # experts stored as U V + S behind the original router
)
_UNMAPPED = "its decomposed experts could only be stored behind a map"
_ENCODER_DECODER = {
    "streaming": "its decoder layers also need the encoder's output; it is observed whole",
    "replicas": "its experts are called with dispatch masks; ranks exchange ids and gates",
    "mapped": "its experts have a capacity each, which those behind a map would have to share",
}


def reasons(family: Family) -> dict[str, str]:
    """Feature -> why this family does not have it; what is absent is supported."""
    structural = _ENCODER_DECODER if family.encoder_decoder else {}
    found = {**structural, **family.unsupported}
    if "mapped" in found:
        found["compress"] = f"{_UNMAPPED}, and {found['mapped']}"
    return {feature: found[feature] for feature in FEATURES if feature in found}


def matrix() -> dict[str, dict[str, str]]:
    """Model type -> feature -> `supported`, or `unsupported: ` and the reason."""
    known = {name: reasons(family) for name, family in FAMILIES.items()}
    known |= {name: dict.fromkeys(FEATURES, reason) for name, reason in REFUSED.items()}
    return {
        name: {feature: _cell(why.get(feature)) for feature in FEATURES}
        for name, why in sorted(known.items())
    }


def require(family: Family, feature: str) -> None:
    """Refuses what a family cannot have.

    Raises:
        UnsupportedFeature: with the reason.
    """
    why = reasons(family).get(feature)
    if why is not None:
        raise UnsupportedFeature(
            f"{family.model_type} does not have {feature}: {why}",
            "`coalesce ls families` shows what every family supports",
        )


def _cell(reason: str | None) -> str:
    return "supported" if reason is None else f"unsupported: {reason}"
