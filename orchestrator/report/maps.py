"""Figures over the grid of layers and experts: routing and groups."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.transforms import ScaledTranslation
from numpy.typing import NDArray

from orchestrator.report import canvas, facts, wording
from orchestrator.report.canvas import COLOURS, INK, LIGHT_COLOURS, MUTED, PAPER, VERMILLION
from orchestrator.report.facts import Layer

MAX_PANELS = 12
MAX_ROWS = 128
MAX_DOMAINS = 16
FEW_EXPERTS = 32
Shares = NDArray[np.float64]


def routing_layers(report: dict[str, Any]) -> list[str]:
    routing = facts.table(report, "routing")
    return sorted((n for n in routing if n.isdecimal() and _domains(routing[n])), key=int)


def _domains(layer: Any) -> list[str]:
    return sorted(name for name, shares in (layer or {}).items() if shares)


def routing_caption(report: dict[str, Any]) -> str:
    """What was left out of the routing figure, if anything."""
    total = len(routing_layers(report))
    if total <= MAX_PANELS:
        return ""
    return (
        f"Showing {MAX_PANELS} of {total} layers: the first, the last and evenly spaced ones "
        f"between. report.json holds all of them."
    )


def shares_of(report: dict[str, Any], name: str) -> tuple[list[str], Shares]:
    """Domains and their rows, padded with NaN where a domain lists fewer experts."""
    layer = facts.table(report, "routing", name)
    names = facts.spread(_domains(layer), MAX_DOMAINS)
    width = max(len(layer[domain]) for domain in names)
    grid = np.full((len(names), width), np.nan)
    for row, domain in enumerate(names):
        values = [wording.as_float(share) for share in layer[domain]]
        grid[row, : len(values)] = [np.nan if value is None else value for value in values]
    return names, grid


def routing_figure(report: dict[str, Any]) -> Figure:
    """One small heat map per layer, all with the same colour scale."""
    shown = facts.spread(routing_layers(report), MAX_PANELS)
    if not shown:
        return canvas.empty("No routing statistics in this report.")
    grids = {name: shares_of(report, name) for name in shown}
    top = _top([grid for _, grid in grids.values()])
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    height = 0.95 + 0.19 * max(len(names) for names, _ in grids.values())
    figure = canvas.new_figure(9.6, rows * height + 0.55)
    figure.set_layout_engine("constrained", wspace=0.035, hspace=0.06)
    axes = figure.subplots(rows, columns, squeeze=False)
    layers = {str(layer.index): layer for layer in facts.layers(report)}
    for position, cell in enumerate(axes.flat):
        if position >= len(shown):
            cell.set_visible(False)
            continue
        name = shown[position]
        image = draw_routing(cell, *grids[name], layers.get(name), top)
        canvas.title(cell, f"layer {name}", 9)
        if position % columns:
            cell.set_yticklabels([])
    _colour_bar(figure, image, axes.ravel().tolist())
    return figure


def _top(grids: list[Shares]) -> float:
    """End of the colour scale: a few outliers must not wash out all the rest."""
    values = np.concatenate([grid[np.isfinite(grid)] for grid in grids])
    return (float(np.quantile(values, 0.995)) if values.size else 0.0) or 1.0


def _colour_bar(figure: Figure, image: AxesImage, axes: list[Axes]) -> None:
    bar = figure.colorbar(
        image, ax=axes, location="bottom", fraction=0.03, aspect=60, pad=0.02, extend="max"
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, colors=MUTED, labelsize=7)
    bar.ax.xaxis.set_major_formatter(lambda value, _: wording.percent(value))
    bar.set_label("share of a domain's expert selections", color=MUTED, fontsize=8)


def draw_routing(
    axes: Axes, domains: list[str], grid: Shares, layer: Layer | None, top: float
) -> AxesImage:
    """Rows are domains, columns are experts; the members of a group stand side by side."""
    experts = grid.shape[1]
    order = facts.expert_order(layer, experts)
    image = axes.imshow(
        grid[:, order], cmap=canvas.HEAT, vmin=0, vmax=top, aspect="auto", interpolation="none"
    )
    axes.set_yticks(range(len(domains)), [wording.clip(wording.domain(d), 18) for d in domains])
    canvas.plain(axes, keep=("left", "right", "top", "bottom"))
    axes.tick_params(axis="x", labelsize=6, pad=7)
    few = experts <= FEW_EXPERTS
    axes.set_xticks(range(experts) if few else [], [str(e) for e in order] if few else [])
    if not few:
        axes.set_xlabel(f"{experts} experts, ordered by group", fontsize=7, labelpad=10)
    if layer is not None and layer.groups:
        _mark_groups(axes, layer, experts)
    return image


def _mark_groups(axes: Axes, layer: Layer, experts: int) -> None:
    """Gaps between groups, a bracket under every group of two or more, red for dropped."""
    few = experts <= FEW_EXPERTS
    sizes = [len(group) for group in layer.groups]
    starts = np.concatenate([[0], np.cumsum(sizes)]) - 0.5
    if few and layer.merged:
        axes.vlines(
            starts[1:-1] if sum(sizes) >= experts else starts[1:],
            -0.5,
            axes.get_ylim()[0],
            color=PAPER,
            linewidth=2,
        )
    inset = 0.14 if few else 0.0
    merged = [(a + inset, b - inset) for a, b in pairwise(starts) if b - a > 1]
    # Without gaps between the columns, two colours in turn keep neighbouring groups apart.
    for colour, turn in ((INK, merged[::2]), (INK if few else MUTED, merged[1::2])):
        _brackets(axes, turn, colour)
    if sum(sizes) < experts:
        _brackets(axes, [(starts[-1] + inset, experts - 0.5 - inset)], VERMILLION)


def _brackets(axes: Axes, spans: list[tuple[float, float]], colour: str) -> None:
    if not spans:
        return
    left, right = zip(*spans, strict=True)
    figure = axes.get_figure()
    assert figure is not None
    below = ScaledTranslation(0, -4 / 72, figure.dpi_scale_trans)
    lines = axes.hlines([0.0] * len(spans), left, right, color=colour, linewidth=1.8)
    lines.set(transform=axes.get_xaxis_transform() + below, clip_on=False)


def group_figure(report: dict[str, Any]) -> Figure:
    """Layer by expert grid in the colour of the group; full colour is the representative."""
    layers = facts.spread([x for x in facts.layers(report) if x.groups], MAX_ROWS)
    if not layers:
        return canvas.empty("No groups in this report.")
    experts = max(max(x.before or 0, 1 + max(map(max, x.groups))) for x in layers)
    if experts > FEW_EXPERTS:
        layers = [_by_size(layer) for layer in layers]
    row = 0.27 if experts <= FEW_EXPERTS else 0.11
    figure = canvas.new_figure(9.6, max(1.6, 0.7 + row * len(layers)))
    axes = figure.subplots()
    axes.imshow(
        np.stack([_group_row(layer, experts) for layer in layers]),
        aspect="auto",
        interpolation="none",
    )
    canvas.plain(axes)
    _grid_ticks(axes, layers, experts)
    if experts <= FEW_EXPERTS:
        _write_groups(axes, layers, experts)
    return figure


def _group_row(layer: Layer, experts: int) -> NDArray[np.float64]:
    """RGBA: grey for an expert kept alone, a colour per merged group, nothing for dropped ones."""
    row = np.zeros((experts, 4))
    ranked = {id(group): rank for rank, group in enumerate(layer.merged)}
    for group in layer.groups:
        rank = ranked.get(id(group))
        colour = "#9aa5b1" if rank is None else COLOURS[rank % len(COLOURS)]
        row[group] = to_rgba(colour, 0.35)
        row[group[0]] = to_rgba(colour, 0.3 if rank is None else 1.0)
    return row if experts <= FEW_EXPERTS else row[facts.expert_order(layer, experts)]


def _by_size(layer: Layer) -> Layer:
    """Largest group first: hundreds of scattered cells would be mere noise."""
    return replace(layer, groups=sorted(layer.groups, key=len, reverse=True))


def _grid_ticks(axes: Axes, layers: list[Layer], experts: int) -> None:
    step = -(-len(layers) // 16)
    rows = range(0, len(layers), step)
    axes.set_yticks(rows, [f"layer {layers[row].index}" for row in rows])
    columns = range(0, experts, 1 if experts <= FEW_EXPERTS else max(1, experts // 16))
    axes.set_xticks(columns, [str(column) for column in columns])
    few = experts <= FEW_EXPERTS
    axes.set_xlabel("expert" if few else "experts of the layer, largest group first")
    if experts <= FEW_EXPERTS:
        axes.set_xticks(np.arange(experts + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(len(layers) + 1) - 0.5, minor=True)
        axes.grid(which="minor", color=PAPER, linewidth=2)
        axes.tick_params(which="minor", length=0)


def _write_groups(axes: Axes, layers: list[Layer], experts: int) -> None:
    """Each expert of a merged group carries the id of its representative, dropped ones a cross."""
    for row, layer in enumerate(layers):
        for rank, group in enumerate(layer.merged):
            _label(axes, group[0], row, str(group[0]), _on(rank), "bold")
            for expert in group[1:]:
                _label(axes, expert, row, str(group[0]), INK, "normal")
        for expert in layer.dropped:
            if expert < experts:
                _label(axes, expert, row, "\N{MULTIPLICATION SIGN}", VERMILLION, "bold")


def _on(rank: int) -> str:
    """White on dark hues, black on light ones; the ink of the page would change with the page."""
    return "#000000" if COLOURS[rank % len(COLOURS)] in LIGHT_COLOURS else "#ffffff"


def _label(axes: Axes, x: float, y: float, text: str, colour: str, weight: str) -> None:
    axes.text(x, y, text, color=colour, fontsize=7, ha="center", va="center", fontweight=weight)


def group_caption(report: dict[str, Any]) -> str:
    layers = facts.layers(report)
    parts = [
        "Full colour: the representative; the same colour, lighter: experts merged into it; "
        "grey: an expert that stands alone."
    ]
    if any(layer.dropped for layer in layers):
        parts.append("Empty: dropped.")
    if any(len(layer.merged) > len(COLOURS) for layer in layers):
        parts.append("Colours repeat within a layer.")
    if len([layer for layer in layers if layer.groups]) > MAX_ROWS:
        parts.append(f"Showing {MAX_ROWS} evenly spaced layers.")
    return " ".join(parts)
