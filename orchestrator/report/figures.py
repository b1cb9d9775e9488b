"""Every figure of the report, and the one picture that sums it up."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from orchestrator.report import canvas, charts, facts, maps, story, wording
from orchestrator.report.charts import quality_figure, resources_figure, sizes_figure
from orchestrator.report.maps import group_figure, routing_figure

__all__ = [
    "group_figure", "overview_figure", "quality_figure", "resources_figure", "routing_figure",
    "sizes_figure",
]  # fmt: skip


def overview_figure(report: dict[str, Any]) -> Figure:
    """Sizes, quality and the routing of one layer in one wide picture."""
    figure = canvas.new_figure(12, 3.7)
    parts = [draw for known, draw in (
        (charts.size_rows(report), _sizes),
        (_measured(report), _quality),
        (maps.routing_layers(report), _routing),
    ) if known]  # fmt: skip
    figure.suptitle(
        _heading(report), x=0.008, ha="left", color=canvas.INK, fontsize=13, fontweight="bold"
    )
    widths = [{_sizes: 1.0, _quality: 1.05, _routing: 1.15}[draw] for draw in parts]
    for draw, axes in zip(parts, _row(figure, widths), strict=True):
        draw(axes, report)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08, wspace=0.04)
    return figure


def _row(figure: Figure, widths: list[float]) -> list[Axes]:
    if not widths:
        return []
    return list(figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0])


def _measured(report: dict[str, Any]) -> bool:
    found = charts.shown_variants(report)
    return any(wording.finite(variant.perplexity.overall) for variant in found)


def _heading(report: dict[str, Any]) -> str:
    return wording.clip(story.subject(report), 100)


def _sizes(axes: Axes, report: dict[str, Any]) -> None:
    charts.draw_sizes(axes, charts.size_rows(report))
    axes.set_xlim(0, axes.get_xlim()[1] * 1.14)
    canvas.title(axes, "checkpoint size")


def _quality(axes: Axes, report: dict[str, Any]) -> None:
    shown = charts.shown_variants(report)
    charts.draw_quality(axes, shown, [None])
    axes.set_yticks(range(len(shown)), [wording.clip(charts.caption(v), 22) for v in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    for label, variant in zip(axes.get_yticklabels(), shown, strict=True):
        label.set(color=canvas.INK, fontweight="normal")
        if variant.kind == "compressed":
            label.set_fontweight("bold")
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.08 * (high - low))
    trained = bool(facts.table(report, "recover"))
    how = "one trained after the reduction" if trained else "no recovery training"
    axes.set_xlabel(f"lower is better, {how}", fontsize=8.5)
    canvas.title(axes, "perplexity (pruned at equal bytes)" if _fair(report) else "perplexity")


def _fair(report: dict[str, Any]) -> bool:
    found = facts.variants(report)
    compressed = facts.of_kind(found, "compressed")
    pruned = [variant for variant in found if variant.kind == "baseline"]
    return (
        compressed is not None
        and bool(pruned)
        and all(facts.same_bytes(variant, compressed) for variant in pruned)
    )


def _routing(axes: Axes, report: dict[str, Any]) -> None:
    name = _busiest(report)
    domains, grid = maps.shares_of(report, name)
    layers = {str(layer.index): layer for layer in facts.layers(report)}
    top = float(np.nanmax(grid)) if np.isfinite(grid).any() else 1.0
    maps.draw_routing(axes, domains, grid, layers.get(name), top or 1.0)
    canvas.title(axes, f"who uses which expert (layer {name})")
    merged = layers[name].merged if name in layers else []
    label = "experts, a bar joins those that were merged" if merged else "experts"
    axes.set_xlabel(label, fontsize=8.5)


def _busiest(report: dict[str, Any]) -> str:
    """The layer whose largest group is largest: it shows best what merging did."""
    sizes = {str(x.index): max(map(len, x.groups), default=0) for x in facts.layers(report)}
    return max(maps.routing_layers(report), key=lambda name: (sizes.get(name, 0), -int(name)))
