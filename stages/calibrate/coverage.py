"""Which experts saw too few tokens for what was summed about them to mean much."""

from __future__ import annotations

from collections.abc import Sequence

from stages.calibrate.statistics import LayerStatistics

# A table of 61 layers and 256 experts must stay readable: this many layers and ids, then numbers.
_LAYERS, _IDS = 8, 24


def warnings(statistics: Sequence[LayerStatistics], minimum: int) -> list[str]:
    """Experts that received no calibration token, then those that received fewer than `minimum`.

    An expert is named once. At most `_LAYERS` layers are spelt out for each of the two.
    """
    none, few = [], []
    for each in statistics:
        counts = each.sums["selected"]
        if unused := [e for e, count in enumerate(counts) if count == 0]:
            none.append((each, unused))
        if scarce := [e for e, count in enumerate(counts) if 0 < count < minimum]:
            few.append((each, scarce))
    unweighted = "; in a merge they weigh nothing (calibrate on more or other text)"
    lines = _spelt_out(none, "none", unweighted)
    return lines + _spelt_out(few, f"fewer than {minimum}", "")


def shown(ids: Sequence[int]) -> str:
    """`[0-3, 7]`: ascending ids with runs drawn together, cut after `_IDS` of them."""
    runs: list[list[int]] = []
    for each in ids[:_IDS]:
        if runs and runs[-1][1] == each - 1:
            runs[-1][1] = each
        else:
            runs.append([each, each])
    words = [_run(first, last) for first, last in runs]
    more = [f"and {len(ids) - _IDS} more"] if len(ids) > _IDS else []
    return f"[{', '.join(words + more)}]"


def _run(first: int, last: int) -> str:
    if last - first < 2:
        return ", ".join(str(each) for each in range(first, last + 1))
    return f"{first}-{last}"


def _spelt_out(
    found: Sequence[tuple[LayerStatistics, list[int]]], received: str, consequence: str
) -> list[str]:
    lines = [
        f"layer {each.layer}: experts {shown(ids)} received {received} of {each.tokens:,}"
        f" calibration tokens{consequence}"
        for each, ids in found[:_LAYERS]
    ]
    if rest := found[_LAYERS:]:
        experts = sum(len(ids) for _, ids in rest)
        first, last = rest[0][0].layer, rest[-1][0].layer
        lines.append(
            f"{len(rest)} more layers, {first} to {last}: {experts:,} experts received {received}"
            " of the calibration tokens"
        )
    return lines
