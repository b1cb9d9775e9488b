"""What the numbers of a report say. Pure: a report in, small frozen records out.

Every part of a report may be missing. The first expert of a group is its representative.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from orchestrator.report.wording import as_float, baseline, finite

STAGES = (
    "verify", "corpus", "calibrate", "inputs", "subsample", "probe", "reduce", "group", "decide",
    "align", "merge", "carry", "transform", "export", "baselines", "teach", "recover", "evaluate",
    "report",
)  # fmt: skip
# Where a kind of variant is not called by its name.
_LABELS = {"unrecovered": "before recovery"}
EQUAL_BYTES = 0.02
TIE_NATS = 0.005


@dataclass(frozen=True)
class Score:
    """One number overall and per domain."""

    overall: float | None = None
    domains: dict[str, float | None] = field(default_factory=dict)

    def of(self, domain: str | None) -> float | None:
        return self.overall if domain is None else self.domains.get(domain)


@dataclass(frozen=True)
class Variant:
    """One evaluated model: the original, the compressed one (also before it was trained, where it
    was), or a pruning baseline."""

    name: str
    kind: str
    label: str
    bytes: float | None
    perplexity: Score
    kl: Score


@dataclass(frozen=True)
class Layer:
    """One decoder layer before and after."""

    index: int
    before: int | None
    after: int | None
    groups: list[list[int]]
    dropped: list[int]
    objective_before: float | None
    objective_after: float | None

    @property
    def merged(self) -> list[list[int]]:
        return [group for group in self.groups if len(group) > 1]


def part(source: Any, *keys: str) -> Any:
    """The value under nested keys, or None as soon as one is missing."""
    for key in keys:
        if not isinstance(source, dict):
            return None
        source = source.get(key)
    return source


def table(source: Any, *keys: str) -> dict[str, Any]:
    found = part(source, *keys)
    return found if isinstance(found, dict) else {}


def _score(source: Any) -> Score:
    domains = {str(key): as_float(value) for key, value in sorted(table(source, "domains").items())}
    return Score(as_float(part(source, "overall")), domains)


def _variant(report: dict[str, Any], name: str, kind: str, size: Any) -> Variant:
    where = ("baselines", name) if kind == "baseline" else (name,)
    label = baseline(name) if kind == "baseline" else _LABELS.get(kind, name)
    ppl, kl = (_score(part(report, key, *where)) for key in ("perplexity", "kl"))
    return Variant(name, kind, label, as_float(size), ppl, kl)


def variants(report: dict[str, Any]) -> list[Variant]:
    """Original, compressed, the same before it was trained, then baselines from the best to the
    worst; only those evaluated."""
    found = [
        _variant(report, "original", "original", part(report, "bytes", "before")),
        _variant(report, "compressed", "compressed", part(report, "bytes", "after")),
        _variant(report, "unrecovered", "unrecovered", part(report, "bytes", "after")),
    ]
    names = sorted(table(report, "perplexity", "baselines"))
    sizes = table(report, "baseline_bytes")
    pruned = [_variant(report, name, "baseline", sizes.get(name)) for name in names]
    pruned.sort(key=lambda variant: (_rank(variant), variant.name))
    return [each for each in found if _evaluated(each)] + pruned


def _evaluated(variant: Variant) -> bool:
    return variant.perplexity.overall is not None or bool(variant.perplexity.domains)


def _rank(variant: Variant) -> float:
    value = finite(variant.perplexity.overall)
    return math.inf if value is None else value


def of_kind(found: Iterable[Variant], kind: str) -> Variant | None:
    return next((variant for variant in found if variant.kind == kind), None)


def domains(report: dict[str, Any]) -> list[str]:
    return sorted({name for variant in variants(report) for name in variant.perplexity.domains})


def log_ratio(value: float | None, reference: float | None) -> float | None:
    """Rise of the log-perplexity in nats."""
    high, low = finite(value), finite(reference)
    if high is None or low is None or high <= 0 or low <= 0:
        return None
    return math.log(high / low)


def ratio(value: Any, reference: Any) -> float | None:
    top, bottom = finite(value), finite(reference)
    return top / bottom if top is not None and bottom else None


def same_bytes(variant: Variant, reference: Variant) -> bool:
    share = ratio(variant.bytes, reference.bytes)
    return share is not None and abs(share - 1) <= EQUAL_BYTES


def best_baseline(found: list[Variant], compressed: Variant) -> Variant | None:
    """The best baseline of equal size; where none has equal size, the best of all."""
    pruned = [v for v in found if v.kind == "baseline" and finite(v.perplexity.overall) is not None]
    fair = [variant for variant in pruned if same_bytes(variant, compressed)]
    return min(fair or pruned, key=_rank, default=None)


def layers(report: dict[str, Any]) -> list[Layer]:
    names = {name for key in ("experts", "groups", "align") for name in _layer_keys(report, key)}
    return [_layer(report, name) for name in sorted(names, key=int)]


def _layer_keys(report: dict[str, Any], key: str) -> list[str]:
    source = table(report, key, "before") if key == "experts" else table(report, key)
    return [name for name in source if name.isdecimal()]


def _layer(report: dict[str, Any], name: str) -> Layer:
    groups = [list(group) for group in part(report, "groups", name) or [] if group]
    before, after = (part(report, "experts", key, name) for key in ("before", "after"))
    seen = {expert for group in groups for expert in group}
    dropped = [expert for expert in range(before or 0) if expert not in seen] if groups else []
    align = table(report, "align", name)
    objectives = (as_float(align.get(f"objective_{when}")) for when in ("before", "after"))
    return Layer(int(name), before, after, groups, dropped, *objectives)


def expert_order(layer: Layer | None, experts: int) -> list[int]:
    """Column order in which the members of a group stand side by side, dropped experts last."""
    groups = layer.groups if layer else []
    order = [expert for group in groups for expert in group if 0 <= expert < experts]
    known = set(order)
    return order + [expert for expert in range(experts) if expert not in known]


def stages(report: dict[str, Any]) -> list[str]:
    """Stages with a time or a memory peak, in the order in which they run."""
    names = set(table(report, "seconds")) | set(table(report, "peak_rss_bytes"))
    known = {name: position for position, name in enumerate(STAGES)}
    return sorted(names, key=lambda name: (known.get(name, len(STAGES)), name))


def spread(items: list[Any], limit: int) -> list[Any]:
    """At most `limit` items: the first, the last and evenly spaced ones between."""
    if len(items) <= limit:
        return items
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]
