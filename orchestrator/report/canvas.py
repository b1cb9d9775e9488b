"""The look of every figure, and its export as deterministic SVG or PNG."""

import base64
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.text import Text

INK, MUTED, GRID, PAPER = "#1f2933", "#5f6c7b", "#d9dee5", "#fefefe"
BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE = (
    "#0072b2", "#d55e00", "#009e73", "#e69f00", "#56b4e9", "#aa4499",
)  # fmt: skip
# Okabe-Ito, plus one purple that is distinct from the blue for every common colour blindness.
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION)
LIGHT_COLOURS = frozenset((ORANGE, SKY))
# Page variables that replace a figure's colours, so that inline figures follow a dark page.
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", PAPER: "--paper", BLUE: "--blue"}
# Transparent at zero: the page shows through, whether it is light or dark.
HEAT = LinearSegmentedColormap.from_list("heat", [BLUE + "00", BLUE + "ff"])
HEAT.set_bad((0, 0, 0, 0))
SETTINGS = {
    "svg.hashsalt": "coalesce",
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
}
NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}


def new_figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def plain(axes: Axes, *, keep: tuple[str, ...] = ()) -> None:
    """No frame, quiet ticks."""
    for side, spine in axes.spines.items():
        spine.set_visible(side in keep)
        spine.set_color(GRID)
    axes.tick_params(length=0, colors=MUTED, labelsize=8)
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)


def title(axes: Axes, text: str, size: float = 10) -> None:
    axes.set_title(text, loc="left", color=INK, fontsize=size, fontweight="bold", pad=8)


def empty(message: str) -> Figure:
    figure = new_figure(9.6, 0.8)
    figure.text(0.01, 0.5, message, color=MUTED, va="center")
    return figure


@contextmanager
def _export_settings(figure: Figure) -> Iterator[None]:
    """A dollar sign in a name is no formula, and a missing glyph is no reason to fail."""
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with _export_settings(figure):
        figure.savefig(buffer, format="svg", transparent=True, metadata=NO_METADATA)
    text = buffer.getvalue()
    return text[text.index("<svg") :].strip()


def inline_svg(figure: Figure, name: str, label: str) -> str:
    """SVG for a page: own ids, page colours and fonts, and a label for screen readers."""
    text = re.sub(r'\b(id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg(figure))
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"(font: [^;\"']*?px) [^;\"]*", r"\1 var(--font)", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(f": {colour}", f": var({variable})")
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def png(figure: Figure, dpi: int = 160) -> bytes:
    buffer = io.BytesIO()
    with _export_settings(figure):
        figure.savefig(
            buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None}
        )
    return buffer.getvalue()


def svg_data_uri(figure: Figure) -> str:
    encoded = base64.b64encode(svg(figure).encode()).decode()
    return f"data:image/svg+xml;base64,{encoded}"
