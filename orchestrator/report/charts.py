"""Figures over variants and stages: quality, sizes, time and memory."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from orchestrator.report import canvas, facts, wording
from orchestrator.report.canvas import BLUE, COLOURS, GRID, INK, MUTED
from orchestrator.report.facts import Variant, part

MAX_DOMAINS = 12
MAX_BASELINES = 5
WIDE = 8.0
MARKERS = {"original": "s", "compressed": "o", "unrecovered": "v", "baseline": "D"}


def colours(shown: list[Variant]) -> dict[str, str]:
    """Ink for the original, blue for the compressed model, the other hues for baselines."""
    pruned = [variant.name for variant in shown if variant.kind == "baseline"]
    hues = dict(zip(pruned, COLOURS[1:] * len(pruned), strict=False))
    fixed = {"original": INK, "compressed": BLUE, "unrecovered": MUTED}
    return {v.kind + v.name: fixed.get(v.kind) or hues[v.name] for v in shown}


def shown_variants(report: dict[str, Any]) -> list[Variant]:
    found = facts.variants(report)
    pruned = [variant for variant in found if variant.kind == "baseline"]
    return [v for v in found if v.kind != "baseline"] + pruned[:MAX_BASELINES]


def shown_domains(report: dict[str, Any]) -> list[str | None]:
    return [None, *facts.spread(facts.domains(report), MAX_DOMAINS)]


def quality_caption(report: dict[str, Any]) -> str:
    parts = ["Lower is better. The line starts at the original model."]
    if len(facts.domains(report)) > MAX_DOMAINS:
        parts.append(f"Showing {MAX_DOMAINS} of {len(facts.domains(report))} domains.")
    total = len(facts.table(report, "perplexity", "baselines"))
    if total > MAX_BASELINES:
        parts.append(f"Showing the best {MAX_BASELINES} of {total} baselines.")
    return " ".join(parts)


def quality_figure(report: dict[str, Any]) -> Figure:
    """Perplexity of every variant, overall and per domain."""
    shown, names = shown_variants(report), shown_domains(report)
    names = [n for n in names if any(wording.finite(v.perplexity.of(n)) for v in shown)]
    if not names:
        return canvas.empty("No finite perplexity in this report.")
    rows = len(names) * (len(shown) + 1)
    figure = canvas.new_figure(9.6, 0.9 + 0.17 * rows)
    axes = figure.subplots()
    draw_quality(axes, shown, names)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(shown) if len(shown) < 6 else 4,
        frameon=False,
        labelcolor=INK,
        fontsize=8,
        handletextpad=0.3,
        columnspacing=1.6,
    )
    return figure


def draw_quality(axes: Axes, shown: list[Variant], names: list[str | None]) -> None:
    block, hues = len(shown) + 1, colours(shown)
    original = facts.of_kind(shown, "original")
    for position, name in enumerate(names):
        start = wording.finite(original.perplexity.of(name)) if original else None
        for row, variant in enumerate(shown):
            first = position == 0
            y = position * block + row
            _dot(axes, variant, variant.perplexity.of(name), start, y, hues, first)
    centres = [position * block + (block - 2) / 2 for position in range(len(names))]
    labels = ["overall" if n is None else wording.clip(wording.domain(n), 22) for n in names]
    axes.set_yticks(centres, labels)
    axes.set_ylim(len(names) * block - 1.1, -0.9)
    _value_axis(axes, [wording.finite(v.perplexity.of(n)) for v in shown for n in names])
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set(color=INK, fontweight="bold" if name is None else "normal")
    edges = [position * block - 1 for position in range(1, len(names))]
    axes.hlines(edges, 0, 1, transform=axes.get_yaxis_transform(), color=GRID, linewidth=0.8)


def _dot(
    axes: Axes,
    variant: Variant,
    value: float | None,
    start: float | None,
    y: float,
    hues: dict[str, str],
    first: bool,
) -> None:
    colour = hues[variant.kind + variant.name]
    shown = wording.finite(value)
    axes.scatter(
        [shown if shown is not None else np.nan],
        [y],
        s=30,
        color=colour,
        zorder=3,
        marker=MARKERS[variant.kind],
        linewidths=0,
        label=wording.clip(caption(variant), 20) if first else None,
    )
    if shown is None:
        return
    if start is not None:
        axes.hlines(y, start, shown, color=colour, linewidth=1.4, alpha=0.55)
    bold = "bold" if variant.kind == "compressed" else "normal"
    # The label stands beyond the line, so that a variant better than the original reads as well.
    better = start is not None and shown < start
    axes.annotate(
        wording.perplexity(shown),
        (shown, y),
        xytext=(-7 if better else 7, -0.5),
        textcoords="offset points",
        va="center",
        ha="right" if better else "left",
        fontsize=7.5,
        color=INK,
        fontweight=bold,
    )


def caption(variant: Variant) -> str:
    return f"pruned: {variant.label}" if variant.kind == "baseline" else variant.label


def _value_axis(axes: Axes, values: list[float | None]) -> None:
    known = [value for value in values if value is not None and value > 0]
    canvas.plain(axes)
    wide = bool(known) and max(known) / min(known) > WIDE
    if wide:
        axes.set_xscale("log")
        axes.set_xlim(min(known) / 1.15, max(known) * (max(known) / min(known)) ** 0.09)
    elif known:
        pad = max(max(known) - min(known), 0.05 * max(known))
        axes.set_xlim(min(known) - 0.09 * pad, max(known) + 0.14 * pad)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("perplexity (log scale)" if wide else "perplexity")
    if wide:
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_locator(LogLocator(subs=_log_ticks(known)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _log_ticks(known: list[float]) -> tuple[float, ...]:
    """1, 2 and 5 of every decade where few decades are shown."""
    return (1.0, 2.0, 5.0) if max(known) / min(known) < 500 else (1.0,)


def size_rows(report: dict[str, Any]) -> list[tuple[str, float, str]]:
    """Label, bytes and colour of every size that is known."""
    wanted = (
        ("original", "before", MUTED),
        ("requested", "requested", GRID),
        ("predicted", "predicted", canvas.SKY),
        ("compressed", "after", BLUE),
    )
    sizes = facts.table(report, "bytes")
    return [
        (label, value, colour)
        for label, key, colour in wanted
        if (value := wording.finite(sizes.get(key))) is not None
    ]


def sizes_figure(report: dict[str, Any]) -> Figure:
    rows = size_rows(report)
    if not rows:
        return canvas.empty("No sizes in this report.")
    figure = canvas.new_figure(9.6, 0.5 + 0.3 * len(rows))
    draw_sizes(figure.subplots(), rows)
    return figure


def draw_sizes(axes: Axes, rows: list[tuple[str, float, str]]) -> None:
    total = rows[0][1] if rows[0][0] == "original" else None
    _bars(axes, rows, [_sized(value, total) for _, value, _ in rows])


def _sized(value: float, total: float | None) -> str:
    share = facts.ratio(value, total)
    extra = f"  ({wording.percent(share)})" if share is not None and value != total else ""
    return wording.size(value) + extra


def _bars(axes: Axes, rows: list[tuple[str, float, str]], texts: list[str]) -> None:
    """Horizontal bars, the value written at the end of each."""
    values = [value for _, value, _ in rows]
    axes.barh(range(len(rows)), values, color=[colour for *_, colour in rows], height=0.62)
    for row, (value, text) in enumerate(zip(values, texts, strict=True)):
        axes.annotate(
            text,
            (value, row),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=INK,
        )
    axes.set_yticks(range(len(rows)), [wording.clip(label, 22) for label, *_ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, (max(values) or 1) * 1.28)
    axes.set_xticks([])
    canvas.plain(axes)
    for label in axes.get_yticklabels():
        label.set_color(INK)


def resources_figure(report: dict[str, Any]) -> Figure:
    """Seconds and peak memory of every stage, side by side."""
    names = facts.stages(report)
    columns = (
        ("time", "seconds", wording.duration, BLUE),
        ("peak memory", "peak_rss_bytes", wording.size, canvas.GREEN),
    )
    if not names:
        return canvas.empty("No time or memory in this report.")
    figure = canvas.new_figure(9.6, 0.7 + 0.26 * len(names))
    for position, (heading, key, text, colour) in enumerate(columns):
        axes = figure.add_subplot(1, 2, position + 1)
        # Where a stage has no number, its bar has no length and its label is a dash.
        values = [wording.finite(part(report, key, name)) for name in names]
        rows = [(n, v or 0.0, colour) for n, v in zip(names, values, strict=True)]
        _bars(axes, rows, [text(value) for value in values])
        canvas.title(axes, heading, 9)
    return figure
