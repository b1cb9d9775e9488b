"""A sweep as a table for the terminal, as sweep.json, and as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from rich.table import Table

from models.atomic import write_bytes
from orchestrator.estimate import human
from orchestrator.report import canvas
from orchestrator.run_folder import RunFolder
from orchestrator.sweep.points import Point

CAPTION = (
    "Predicted error: squared error of a layer's output over its energy on the sampled tokens,"
    " before any refit; mean over layers, and the worst layer. It is no perplexity: layers differ"
    " in what they mean for the model, and errors of several layers add up in ways that are not"
    " predicted."
)
_MARKERS = "osD^vP*X<>hd"


def table(points: Sequence[Point]) -> Table:
    """One row per pair."""
    measured = any(point.measured for point in points)
    shown = Table(title="Sweep", caption=CAPTION, caption_justify="left")
    names = ["method", "budget", "format", "experts", "width", "bytes", "smaller by", "error"]
    names += ["worst layer"] + (["perplexity", "original"] if measured else [])
    for name in names:
        shown.add_column(name, justify="left" if name in ("method", "format") else "right")
    for point in points:
        if point.refused is not None:
            shown.add_row(point.label, point.budget, "-", *["-"] * (len(names) - 3))
            continue
        row = [point.label, point.budget, point.format, _range(point.experts)]
        row += [_range(point.widths), human(point.bytes), f"{point.reduction:.1%}"]
        row += [_error(point.mean_error), _worst(point)]
        if measured:
            found = point.measured or {}
            row += [_number(found.get(name)) for name in ("perplexity", "original")]
        shown.add_row(*row)
    return shown


def refusals(points: Sequence[Point]) -> list[str]:
    """Why pairs have no numbers, a line each."""
    return [f"{p.label} {p.budget}: {p.refused}" for p in points if p.refused is not None]


def write(folder: RunFolder, points: Sequence[Point]) -> Path:
    """sweep.json, sweep.png and sweep.svg beside the run; the picture's path is returned."""
    found = {"schema": 1, "note": CAPTION, "points": [point.as_json() for point in points]}
    text = json.dumps(found, indent=2, allow_nan=False) + "\n"
    write_bytes(folder.sweep.with_suffix(".json"), text.encode())
    drawn = figure(points)
    write_bytes(folder.sweep.with_suffix(".svg"), canvas.svg(drawn).encode())
    picture = folder.sweep.with_suffix(".png")
    write_bytes(picture, canvas.png(drawn))
    return picture


def figure(points: Sequence[Point]) -> Figure:
    """Predicted error against bytes; beside it, what was measured of the points that were built."""
    known = [point for point in points if point.refused is None and point.mean_error is not None]
    built = [point for point in known if _rise(point) is not None]
    if not known:
        return canvas.empty("No pair has a predicted error.")
    drawn = canvas.new_figure(12 if built else 8, 4.6)
    rows = drawn.subplots(1, 2 if built else 1, squeeze=False)[0]
    _lines(rows[0], known, [point.mean_error for point in known], joined=True)
    if all((point.mean_error or 0) > 0 for point in known):
        rows[0].set_yscale("log")
        rows[0].yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        rows[0].yaxis.set_minor_locator(NullLocator())
        rows[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    canvas.title(rows[0], "predicted error of layer outputs, mean over layers, before refit")
    if built:
        _lines(rows[1], built, [_rise(point) for point in built], joined=False)
        canvas.title(rows[1], "measured rise of log-perplexity, nats per token")
    rows[0].legend(frameon=False, fontsize=7.5, labelcolor=canvas.INK, ncols=2)
    return drawn


def _lines(
    axes: Axes, points: Sequence[Point], values: Sequence[float | None], *, joined: bool
) -> None:
    names = list(dict.fromkeys(point.label for point in points))
    for index, name in enumerate(names):
        some = sorted(
            (point.bytes / 1e6, value or 0.0)
            for point, value in zip(points, values, strict=True)
            if point.label == name
        )
        axes.plot(
            *zip(*some, strict=True),
            label=name,
            color=canvas.COLOURS[index % len(canvas.COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=5,
            linewidth=1.2 if joined else 0,
        )
    axes.set_xlabel("bytes of weights, MB")
    axes.grid(color=canvas.GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    canvas.plain(axes)


def _rise(point: Point) -> float | None:
    found = point.measured or {}
    if "perplexity" not in found:
        return None
    return math.log(found["perplexity"]) - math.log(found["original"])


def _range(values: object) -> str:
    assert isinstance(values, dict)
    low, high = min(values.values()), max(values.values())
    if not high:
        return "all"
    return str(low) if low == high else f"{low} to {high}"


def _worst(point: Point) -> str:
    return "-" if point.worst is None else f"{point.worst[1]:.3g} (layer {point.worst[0]})"


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
