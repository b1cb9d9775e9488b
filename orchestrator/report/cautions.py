"""What a reader of the numbers should be told about the text: by domain, after evaluation."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from statistics import median
from typing import Any

from orchestrator.report import wording
from orchestrator.report.facts import log_ratio
from orchestrator.report.wording import finite
from stages.calibrate.coverage import shown
from stages.corpus import overlap
from stages.corpus.config import DedupConfig
from stages.unit import Done

# A domain rose much more than the others: by this factor of their median, and by so many nats more.
FACTOR, NATS = 2.0, 0.1
_TWO = ("original", "compressed")
# Domains that are spelt out in one line.
_NAMED = 12


def domain_rises(perplexity: Mapping[str, Any]) -> dict[str, float]:
    """Domain -> rise of its log-perplexity in nats; those without two finite numbers are left out.

    Args:
        perplexity: `original` and `compressed`, each with `domains`.
    """
    before, after = (perplexity.get(name, {}).get("domains", {}) for name in _TWO)
    found = {}
    for domain in sorted(before):
        rise = log_ratio(after.get(domain), before[domain])
        if rise is not None:
            found[domain] = rise
    return found


def uneven(rises: Mapping[str, float]) -> list[str]:
    """One line for every domain that lost much more than the others."""
    lines = []
    for domain, rise in rises.items():
        others = [value for name, value in rises.items() if name != domain]
        if not others:
            continue
        usual = median(others)
        if rise > FACTOR * usual and rise - usual > NATS:
            lines.append(
                f"the perplexity of {domain} rose by {wording.nats(rise)} nats, that of the other"
                f" domains by {wording.nats(usual)} (median)"
            )
    return lines


def uncalibrated(
    rises: Mapping[str, float], seen: Collection[str], task: Mapping[str, float] | None
) -> list[str]:
    """One line that names the evaluated domains that decided nothing, the worst first.

    Args:
        seen: domains of the calibration text.
        task: their weights; None: all count.
    """
    counted = {name for name in seen if task is None or task.get(name, 0) > 0}
    unseen = {name: rise for name, rise in rises.items() if name not in counted}
    if not unseen:
        return []
    worst = sorted(unseen, key=lambda name: (-unseen[name], name))
    named = [f"{name} ({wording.nats(unseen[name])})" for name in worst[:_NAMED]]
    more = [f"{len(worst) - _NAMED} more"] if len(worst) > _NAMED else []
    rest = [rises[name] for name in rises if name in counted]
    beside = f"; calibrated domains: {wording.nats(median(rest))} (median)" if rest else ""
    return [
        f"not calibrated on, rise of the log-perplexity in nats: {', '.join(named + more)}{beside}"
    ]


def unfitted(refit: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Layers whose refit had fewer tokens than unknowns, and those that it left as they were."""
    scarce = {
        layer: tokens
        for layer, each in refit.items()
        if (tokens := finite(each.get("tokens_per_unknown"))) is not None and tokens < 1
    }
    left = [int(layer) for layer, each in refit.items() if each.get("strength") is None]
    lines = []
    if scarce:
        lines.append(
            f"layers {shown(sorted(map(int, scarce)))}: the refit had fewer tokens than unknowns"
            f" ({min(scarce.values()):.2g} for each at least), the ridge fills in for the rest"
            " (raise calibrate.sample.tokens)"
        )
    if left:
        lines.append(
            f"layers {shown(sorted(left))}: the closed-form refit was not made, because it gained"
            " nothing on held-out tokens (raise calibrate.sample.tokens)"
        )
    return lines


def untrained(router: str) -> list[str]:
    """One line if the routers choose at random."""
    if router != "reinit":
        return []
    return [
        "the routers were drawn anew (export.router=reinit) and choose at random: train them before"
        " this checkpoint is used or judged"
    ]


def overlaps(done: Iterable[Done]) -> dict[str, dict[str, Any]]:
    """Domain -> how much of the calibration text is evaluated; empty: not compared."""
    for each in done:
        if found := each.result.get("overlap"):
            return dict(found)
    return {}


def cautions(
    perplexity: Mapping[str, Any],
    seen: Collection[str],
    task: Mapping[str, float] | None,
    shared: Mapping[str, Mapping[str, Any]],
    dedup: DedupConfig,
    refit: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """All lines, for the report's warnings."""
    rises = domain_rises(perplexity)
    return [
        *overlap.warnings(shared, dedup.share),
        *uncalibrated(rises, seen, task),
        *uneven(rises),
        *unfitted(refit),
    ]
