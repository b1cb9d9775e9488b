"""The report as one page that needs nothing beside itself."""

import re
from collections.abc import Callable
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from orchestrator.report import canvas, charts, facts, figures, maps, story, wording
from orchestrator.report.facts import Layer, Variant, part

Row = dict[str, Any]


def render_html(report: dict[str, Any]) -> str:
    """One self-contained page; every part of the report is optional."""
    environment = Environment(
        loader=PackageLoader("orchestrator.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("index.html.j2").render(_context(report)) + "\n"


def _context(report: dict[str, Any]) -> Row:
    found = facts.variants(report)
    return {
        "name": part(report, "run", "name") or "run",
        "headline": _unbroken(story.headline(report)),
        "verdict": story.verdict(report),
        "no_recovery": story.no_recovery(report),
        "trained": story.trained_note(report),
        "refit": _refit_rows(report),
        "tiles": _tiles(report),
        "variants": found,
        "overall": _overall_rows(found),
        "by_domain": _domain_rows(report, found),
        "sizes": _size_rows(report),
        "loading": story.loading(report),
        "format": part(report, "format") or "native",
        "layers": [_layer_row(layer) for layer in facts.layers(report)],
        "warnings": [str(text) for text in report.get("warnings") or []],
        "checks": _check_rows(report),
        "resources": _resource_rows(report),
        "starts": _start_rows(report),
        "provenance": _provenance(report),
        "config": _as_yaml(part(report, "method", "config")),
        "figures": _figures(report),
    }


def _unbroken(text: str) -> str:
    """No line break between a number and its unit."""
    return re.sub(r"(?<=\d) (?=(?:B|[kMGT]B|%))", "\N{NO-BREAK SPACE}", text)


def _tiles(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The numbers a reader looks for first: heading, value, detail."""
    size = facts.ratio(part(report, "bytes", "after"), part(report, "bytes", "before"))
    parameters = facts.table(report, "parameters")
    counts = [wording.count(parameters.get(key)) for key in ("before", "after")]
    weight = facts.ratio(parameters.get("after"), parameters.get("before"))
    work = facts.table(report, "flops_per_token")
    less = facts.ratio(work.get("after"), work.get("before"))
    compressed = facts.of_kind(facts.variants(report), "compressed")
    kl = compressed.kl.overall if compressed else None
    return [
        ("bytes kept", wording.percent(size), "of the original checkpoint"),
        ("parameters kept", wording.percent(weight), story.ARROW.join(counts)),
        ("FLOPs kept", wording.percent(less), "per token, in products with weights"),
        ("rise of log-perplexity", wording.nats(story.rise(report)), "nats per token"),
        ("KL divergence", wording.decimal(kl), "nats, original to compressed"),
    ]


def _overall_rows(found: list[Variant]) -> list[Row]:
    original = facts.of_kind(found, "original")
    best = _best(found, None)
    return [
        {
            "label": charts.caption(variant),
            "kind": variant.kind,
            "bytes": wording.size(variant.bytes),
            "best": variant is best,
            **_cell(variant, original, None),
        }
        for variant in found
    ]


def _cell(variant: Variant, original: Variant | None, domain: str | None) -> Row:
    value = variant.perplexity.of(domain)
    rise = None if original is None else facts.log_ratio(value, original.perplexity.of(domain))
    shown = None if variant is original else rise
    return {
        "perplexity": wording.perplexity(value),
        "rise": wording.nats(shown),
        "kl": wording.decimal(variant.kl.of(domain)),
    }


def _best(found: list[Variant], domain: str | None) -> Variant | None:
    """The best of everything that is smaller than the original."""
    known = [
        (value, variant)
        for variant in found
        if variant.kind != "original"
        and (value := wording.finite(variant.perplexity.of(domain))) is not None
    ]
    return min(known, key=lambda pair: pair[0])[1] if len(known) > 1 else None


def _domain_rows(report: dict[str, Any], found: list[Variant]) -> list[Row]:
    original = facts.of_kind(found, "original")
    rows = []
    for name in facts.domains(report):
        best = _best(found, name)
        cells = [_cell(v, original, name) | {"kind": v.kind, "best": v is best} for v in found]
        rows.append({"name": wording.domain(name), "cells": cells})
    return rows


def _size_rows(report: dict[str, Any]) -> list[Row]:
    sizes = facts.table(report, "bytes")
    wanted = [
        ("original", sizes.get("before")),
        ("requested", sizes.get("requested")),
        ("predicted", sizes.get("predicted")),
        ("achieved", sizes.get("after")),
    ]
    pruned = facts.table(report, "baseline_bytes")
    wanted += [(f"pruned: {wording.baseline(name)}", pruned[name]) for name in sorted(pruned)]
    return [
        {
            "label": label,
            "size": wording.size(value),
            "exact": wording.count(value),
            "share": wording.percent(facts.ratio(value, sizes.get("before"))),
        }
        for label, value in wanted
        if value is not None
    ]


def _layer_row(layer: Layer) -> Row:
    change = facts.ratio(layer.objective_after, layer.objective_before)
    return {
        "index": layer.index,
        "before": wording.count(layer.before),
        "after": wording.count(layer.after),
        "merged": len(layer.merged) if layer.groups else wording.MISSING,
        "largest": max(map(len, layer.groups), default=wording.MISSING),
        "dropped": len(layer.dropped) if layer.groups else wording.MISSING,
        "objective_before": wording.significant(layer.objective_before),
        "objective_after": wording.significant(layer.objective_after),
        "change": wording.percent(change),
        "groups": [", ".join(map(str, group)) for group in layer.groups],
        "dropped_ids": ", ".join(map(str, layer.dropped)),
    }


def _refit_rows(report: dict[str, Any]) -> list[Row]:
    """What the refit of every layer brought, on tokens that it did not see and on all."""
    found = facts.table(report, "refit")
    return [
        {
            "index": name,
            "strength": wording.MISSING if row.get("strength") is None else row["strength"],
            "held_out": _errors(row, "held_out"),
            "all": _errors(row, "error"),
            "tokens": wording.decimal(row.get("tokens_per_unknown")),
            "condition": wording.significant(row.get("condition")),
            "few": len(row.get("few_tokens") or []),
        }
        for name, row in sorted(found.items(), key=lambda pair: int(pair[0]))
    ]


def _errors(row: dict[str, Any], name: str) -> str:
    before, after = (wording.percent(row.get(f"{name}_{when}")) for when in ("before", "after"))
    return f"{before} \N{RIGHTWARDS ARROW} {after}"


def _check_rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    checks = facts.table(report, "gate", "checks")
    return [(wording.domain(name), *_check(checks[name])) for name in sorted(checks)]


def _check(value: Any) -> tuple[str, str]:
    """Outcome and detail; a check is a boolean, a text or a mapping with `passed` or `ok`."""
    details = dict(value) if isinstance(value, dict) else {}
    passed = details.pop("passed", details.pop("ok", None)) if details else value
    outcome = ("passed" if passed else "FAILED") if isinstance(passed, bool) else str(passed)
    return outcome, ", ".join(f"{key} {details[key]}" for key in sorted(details))


def _resource_rows(report: dict[str, Any]) -> list[Row]:
    return [
        {
            "stage": name,
            "seconds": wording.duration(part(report, "seconds", name)),
            "peak": wording.size(part(report, "peak_rss_bytes", name)),
            **_unit_cells(facts.table(report, "history", "stages", name)),
        }
        for name in facts.stages(report)
    ]


def _unit_cells(stage: Row) -> Row:
    """Number of units, the slowest of several, and what was lost on the way."""
    units, slowest = stage.get("units"), stage.get("slowest")
    lost = [f"{count} {cause}" for cause, count in sorted(facts.table(stage, "lost").items())]
    failed = stage.get("failed")
    several = bool(slowest) and units not in (None, 1)
    name, seconds = slowest if slowest and several else ("", None)
    return {
        "units": wording.count(units),
        "slowest": f"{name} {wording.duration(seconds)}" if name else "",
        "lost": ", ".join([*lost, *([f"{failed} failed"] if failed else [])]),
    }


def _start_rows(report: dict[str, Any]) -> list[Row]:
    """Every start of the run, if there was more than one."""
    starts = [each for each in part(report, "history", "starts") or [] if each]
    return [
        {
            "begun": each.get("begun") or wording.MISSING,
            "seconds": wording.duration(each.get("seconds")),
            "units": wording.count(each.get("units")),
            "ended": each.get("ended") or "wrote this report",
        }
        for each in (starts if len(starts) > 1 else [])
    ]


def _provenance(report: dict[str, Any]) -> list[tuple[str, str]]:
    run, model = facts.table(report, "run"), facts.table(report, "model")
    tokens = facts.table(report, "tokens")
    rows = [
        ("model", model.get("path")),
        ("family", wording.family(model["family"]) if model.get("family") else None),
        ("experts per token (top-k)", model.get("top_k")),
        ("parameters", wording.count(model["parameters"]) if model.get("parameters") else None),
        ("method", part(report, "method", "name")),
        ("calibration tokens", _tokens(tokens.get("calibration"))),
        ("evaluation tokens", _tokens(tokens.get("evaluation"))),
        ("created", run.get("created")),
        ("command", _command(run.get("command"))),
    ]
    rows += [
        (f"version of {key}", value) for key, value in sorted(facts.table(run, "versions").items())
    ]
    return [(label, str(value)) for label, value in rows if value not in (None, "")]


def _tokens(value: Any) -> str | None:
    if isinstance(value, dict):
        return ", ".join(
            f"{wording.domain(k)} {wording.count(n)}" for k, n in sorted(value.items())
        )
    return None if value is None else wording.count(value)


def _command(value: Any) -> str | None:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else value


def _as_yaml(config: Any) -> str:
    return yaml.safe_dump(config, sort_keys=True, allow_unicode=True) if config else ""


def _figures(report: dict[str, Any]) -> dict[str, Row | None]:
    """Inline figures by name; None where the report lacks the numbers."""
    has_groups = any(layer.groups for layer in facts.layers(report))
    wanted: list[tuple[str, object, Callable[[Row], Figure], str, str]] = [
        (
            "quality",
            facts.variants(report),
            figures.quality_figure,
            "Perplexity of every variant, overall and per domain",
            charts.quality_caption(report),
        ),
        ("sizes", charts.size_rows(report), figures.sizes_figure, "Bytes of the checkpoint", ""),
        (
            "routing",
            maps.routing_layers(report),
            figures.routing_figure,
            "Share of selections per expert and domain, one map per layer",
            maps.routing_caption(report),
        ),
        (
            "groups",
            has_groups,
            figures.group_figure,
            "Group of every expert in every layer",
            maps.group_caption(report),
        ),
        (
            "resources",
            facts.stages(report),
            figures.resources_figure,
            "Time and peak memory of every stage",
            "",
        ),
    ]
    return {
        name: _figure(name, draw(report), label, note) if known else None
        for name, known, draw, label, note in wanted
    }


def _figure(name: str, figure: Figure, label: str, note: str) -> Row:
    # Matplotlib has escaped the text inside, so that the markup is safe to insert as it is.
    return {"svg": Markup(canvas.inline_svg(figure, name, label)), "label": label, "note": note}
