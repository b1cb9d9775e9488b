"""The sentences at the top of the page and of the card, made from the numbers alone."""

from dataclasses import dataclass
from typing import Any

from models.families import FAMILIES
from orchestrator.report import facts, wording
from orchestrator.report.facts import Variant, of_kind, part

_ENGINES = ("vLLM", "llama.cpp")
ARROW = " \N{RIGHTWARDS ARROW} "
NO_RECOVERY = (
    "All quality numbers are WITHOUT recovery training: no weight was trained on the model's loss"
    " or on another model's logits."
)
REFIT = (
    "Experts were fitted again to the outputs of the original layers on the calibration sample,"
    " layer by layer ({how}); the pruning baselines were not."
)


RECOVERY = (
    "The compressed model was TRAINED after its reduction ({what}, {steps} steps, {tokens} tokens)"
    ' on text and on the original\'s predictions; the row "before recovery" is without that. The'
    " pruning baselines were not trained."
)
_TRAINED = {"router": "router rows", "experts": "experts", "full": "all values"}


def trained_note(report: dict[str, Any]) -> str:
    """For the note under the table of quality."""
    if facts.table(report, "recover"):
        return "Overall; only the compressed model was trained after its reduction."
    return "Overall, without recovery training."


def no_recovery(report: dict[str, Any]) -> str:
    """What was and what was not done to the weights beside the reduction itself."""
    if training := facts.table(report, "recover"):
        return RECOVERY.format(
            what=_TRAINED.get(str(training.get("mode")), "values"),
            steps=wording.count(training.get("steps")),
            tokens=wording.count(training.get("tokens")),
        )
    if not facts.table(report, "refit"):
        return NO_RECOVERY
    steps = part(report, "method", "config", "refit", "polish", "steps")
    how = f"closed form, then {steps} gradient steps" if steps else "closed form"
    return f"{NO_RECOVERY} {REFIT.format(how=how)}"


@dataclass(frozen=True)
class Verdict:
    """`kind` is beats, loses, ties or unknown."""

    kind: str
    text: str


def experts_phrase(report: dict[str, Any]) -> str:
    before, after = (_span(facts.table(report, "experts", key)) for key in ("before", "after"))
    if not before:
        return ""
    change = before if after in ("", before) else f"{before}{ARROW}{after}"
    return ", ".join(_known(f"{change} experts per layer", _width_phrase(report)))


def _width_phrase(report: dict[str, Any]) -> str:
    wide, narrow = part(report, "width", "before"), part(report, "width", "after")
    if narrow in (None, wide):
        return ""
    by_layer = part(report, "width", "layers")
    narrow = (_span(by_layer) if isinstance(by_layer, dict) else "") or narrow
    return f"{wide}{ARROW}{narrow} neurons each"


def _span(counts: dict[str, Any]) -> str:
    known = [value for value in counts.values() if value is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    return f"{low}" if low == high else f"{low} to {high}"


def subject(report: dict[str, Any]) -> str:
    """Which model, and how small it became."""
    family = wording.family(part(report, "model", "family"))
    names = (family, _layers_phrase(report), experts_phrase(report))
    return ": ".join(_known(", ".join(_known(*names)), _bytes_phrase(report)))


def headline(report: dict[str, Any]) -> str:
    """One sentence: which model, how small it became, how well it still reads."""
    result = ", ".join(_known(subject(report), _quality_phrase(report)))
    return "; ".join(_known(result, _baselines_phrase(report))) + "."


def _known(*texts: str) -> list[str]:
    return [text for text in texts if text]


def _layers_phrase(report: dict[str, Any]) -> str:
    number = part(report, "model", "layers")
    return f"{number} layer{'' if number == 1 else 's'}" if number else ""


def _bytes_phrase(report: dict[str, Any]) -> str:
    before, after = part(report, "bytes", "before"), part(report, "bytes", "after")
    share = facts.ratio(after, before)
    if share is None:
        return ""
    return f"{wording.size(before)}{ARROW}{wording.size(after)} ({wording.percent(share)})"


def _quality_phrase(report: dict[str, Any]) -> str:
    found = facts.variants(report)
    shown = [of_kind(found, kind) for kind in ("original", "compressed")]
    values = [wording.perplexity(each.perplexity.overall) for each in shown if each]
    return f"perplexity {ARROW.join(values)}" if len(values) == 2 else ""


def _baselines_phrase(report: dict[str, Any]) -> str:
    found = facts.variants(report)
    compressed = of_kind(found, "compressed")
    pruned = [variant for variant in found if variant.kind == "baseline"]
    if not pruned or compressed is None:
        return ""
    fair = all(facts.same_bytes(variant, compressed) for variant in pruned)
    where = "at the same bytes" if fair else "(bytes differ or are unknown, see the table)"
    values = (f"{v.label} {wording.perplexity(v.perplexity.overall)}" for v in pruned)
    return f"plain pruning {where}: {', '.join(values)}"


def verdict(report: dict[str, Any]) -> Verdict:
    """Whether the compressed model is better than the best pruning of the same size."""
    found = facts.variants(report)
    compressed = of_kind(found, "compressed")
    if compressed is None:
        return Verdict("unknown", "The compressed model was not evaluated.")
    if wording.finite(compressed.perplexity.overall) is None:
        return Verdict("unknown", "The perplexity of the compressed model is not a finite number.")
    rival = facts.best_baseline(found, compressed)
    if rival is None:
        return Verdict(
            "unknown",
            "No pruning baseline was evaluated: nothing here says whether "
            "plain pruning would have done better.",
        )
    return _compare(compressed, rival)


def _compare(compressed: Variant, rival: Variant) -> Verdict:
    gap = facts.log_ratio(compressed.perplexity.overall, rival.perplexity.overall)
    ours, theirs = (wording.perplexity(v.perplexity.overall) for v in (compressed, rival))
    where, numbers = _size_phrase(compressed, rival), f"perplexity {ours} against {theirs}"
    if gap is None or abs(gap) < facts.TIE_NATS:
        return Verdict(
            "ties",
            f"The compressed model ties with the best pruning baseline, "
            f"{rival.label}, {where}: {numbers}.",
        )
    kind, word = ("beats", "lower") if gap < 0 else ("loses", "higher")
    verb = "beats" if gap < 0 else "loses to"
    return Verdict(
        kind,
        f"The compressed model {verb} the best pruning baseline, {rival.label}, "
        f"{where}: {numbers} ({abs(gap):.3f} nats {word}).",
    )


def _size_phrase(compressed: Variant, rival: Variant) -> str:
    share = facts.ratio(rival.bytes, compressed.bytes)
    if share is None:
        return "whose bytes were not recorded"
    if facts.same_bytes(rival, compressed):
        return "at equal bytes"
    return f"which has {wording.percent(share)} of its bytes"


def rise(report: dict[str, Any]) -> float | None:
    """Nats by which the compressed model is worse than the original."""
    found = facts.variants(report)
    values = [
        v.perplexity.overall if (v := of_kind(found, kind)) else None
        for kind in ("compressed", "original")
    ]
    return facts.log_ratio(*values)


def brings_code(report: dict[str, Any]) -> bool:
    """True for a family that transformers does not have itself."""
    family = FAMILIES.get(str(part(report, "model", "family")))
    return family is not None and bool(family.code)


def loading(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows (program, opens, how) for the format of this checkpoint."""
    if part(report, "format") == "mapped":
        return [
            (
                "transformers",
                "yes",
                "with the modeling file beside the weights "
                "(trust_remote_code=True) or with Coalesce installed",
            ),
            ("vLLM", "no", "its kernels have no expert map; use the native format"),
            ("llama.cpp", "no", "its converter has no expert map; use the native format"),
        ]
    if brings_code(report):
        how = "with the code beside the weights (trust_remote_code=True) or with Coalesce installed"
        others = "the family's classes are not part of it; not tried by this run"
        return [("transformers", "yes", how), *((n, "unknown", others) for n in _ENGINES)]
    return [
        ("transformers", "yes", "plain from_pretrained, unmodified; tried by this run"),
        ("vLLM", "expected", "same names and config keys as the original; not tried by this run"),
        (
            "llama.cpp",
            "expected",
            "same names and config keys as the original; not tried by this run",
        ),
    ]
