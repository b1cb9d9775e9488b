"""Tables and a figure of the momentum benchmark, from its results into a page.

    python -m benchmarks.momentum_table docs/results/momentum.json --page docs/momentum.md \
        --figure docs/images/momentum.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.momentum_cell import RATES
from benchmarks.pages import show_or_put

MARKS = ("<!-- momentum: begin -->\n", "<!-- momentum: end -->\n")
NAMES = {
    "smoe": "SMoE",
    "momentum": "heavy ball",
    "adam": "AdamSMoE",
    "robust": "Robust",
}
Cells = Sequence[Mapping[str, Any]]
_PERCENT = [f"{100 * rate:g}" for rate in RATES]


def tables(results: Mapping[str, Any]) -> str:
    """All tables, as Markdown."""
    cells, rate = results["cells"], results["learning_rate"]
    usual = [cell for cell in cells if cell["learning_rate"] == rate]
    splits = list(results["setup"]["size"]["splits"])
    made = results["machine"]
    by_counts = "; ".join(
        f"{split}: single tokens {each['single']:,.0f}, pairs {each['pairs']:,.0f}"
        for split, each in results["counted"].items()
    )
    parts = [
        f"{len(cells)} of {results['planned']} models, transformers {made['transformers']}, torch"
        f" {made['torch']}, one thread each. Behind ±: the seed that is farthest from the mean."
    ]
    parts.append(f"\nPerplexity per word by counts of the training split alone, {by_counts}.")
    parts += [_perplexities(usual, split) for split in splits]
    parts += [_differences(usual, splits), _rates(cells), _layers(usual)]
    return "\n".join(part for part in parts if part) + "\n"


def _perplexities(cells: Cells, split: str) -> str:
    head = ["block", "layers", "variant", "seeds", *(f"{p} %" for p in _PERCENT), "per token, 0 %"]
    rows = []
    for (style, layers, variant), some in _groups(cells, "style", "layers", "variant"):
        figures = [
            _spread(c["text"][split][p]["perplexity_per_word"] for c in some) for p in _PERCENT
        ]
        token = _spread(c["text"][split]["0"]["perplexity_per_token"] for c in some)
        rows.append([style, layers, NAMES[variant], len(some), *figures, token])
    return _table(f"Perplexity per word, {split}, by the share of replaced words", head, rows)


def _differences(cells: Cells, splits: Sequence[str]) -> str:
    """Against the SMoE of the same style, depth and seed; below zero is better."""
    head = ["block", "layers", "variant", "seeds"]
    head += [f"{split}, {p} %" for split in splits for p in _PERCENT]
    plain = {_key(cell): cell for cell in cells if cell["variant"] == "smoe"}
    rows = []
    for (style, layers, variant), some in _groups(cells, "style", "layers", "variant"):
        pairs = [(each, plain[_key(each)]) for each in some if _key(each) in plain]
        if variant == "smoe" or not pairs:
            continue
        found = []
        for split in splits:
            for p in _PERCENT:
                gaps = [_nats(ours, split, p) - _nats(theirs, split, p) for ours, theirs in pairs]
                found.append(_signed(gaps))
        rows.append([style, layers, NAMES[variant], len(pairs), *found])
    return _table("Nats per word, less those of SMoE on the same seed", head, rows)


def _rates(cells: Cells) -> str:
    """One seed and depth at every learning rate."""
    others = {(c["layers"], c["seed"]) for c in cells} & {
        (c["layers"], c["seed"]) for c in cells if c["learning_rate"] != cells[0]["learning_rate"]
    }
    some = [c for c in cells if (c["layers"], c["seed"]) in others and c["variant"] in NAMES]
    some = [c for c in some if c["variant"] in ("smoe", "momentum")]
    rows = [
        [style, layers, f"{rate:g}", NAMES[variant], _spread(_clean(c) for c in group)]
        for (style, layers, rate, variant), group in _groups(
            some, "style", "layers", "learning_rate", "variant"
        )
    ]
    if not rows:
        return ""
    head = ["block", "layers", "learning rate", "variant", "perplexity per word"]
    return _table("Other learning rates: one seed, clean, first split", head, rows)


def _layers(cells: Cells) -> str:
    """Load and norms per layer, means over seeds."""
    head = ["block", "layers", "variant", "figure", "by layer, from the first"]
    names = {"load_entropy": "entropy of load / ln E", "output_norm": "mean norm of u"}
    rows = []
    deepest = [c for c in cells if c["layers"] == cells[0]["layers"]]
    for (style, layers, variant), some in _groups(deepest, "style", "layers", "variant"):
        for figure, title in names.items():
            values = [mean(c["layers_seen"][i][figure] for c in some) for i in range(layers)]
            rows.append(
                [style, layers, NAMES[variant], title, " ".join(f"{v:.2f}" for v in values)]
            )
    return _table("Load and output norms on clean text", head, rows)


def _key(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    return cell["style"], cell["layers"], cell["seed"], cell["learning_rate"]


def _nats(cell: Mapping[str, Any], split: str, percent: str) -> float:
    return float(cell["text"][split][percent]["nats_per_word"])


def _clean(cell: Mapping[str, Any]) -> float:
    return float(next(iter(cell["text"].values()))["0"]["perplexity_per_word"])


def _groups(cells: Cells, *names: str) -> list[tuple[tuple[Any, ...], list[Mapping[str, Any]]]]:
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for cell in cells:
        found.setdefault(tuple(cell[name] for name in names), []).append(cell)
    order = list(NAMES)
    return sorted(
        found.items(),
        key=lambda item: [order.index(v) if v in NAMES else v for v in item[0]],
    )


def _spread(values: Iterable[float]) -> str:
    """Mean, and the largest distance of a seed to it."""
    some = list(values)
    middle = mean(some)
    digits = 0 if middle >= 100 else 1
    off = max(abs(value - middle) for value in some)
    return f"{middle:,.{digits}f}" + (f" ± {off:,.{digits}f}" if len(some) > 1 else "")


def _signed(values: Sequence[float]) -> str:
    middle = mean(values)
    off = max(abs(value - middle) for value in values)
    return f"{middle:+.3f}" + (f" ± {off:.3f}" if len(values) > 1 else "")


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [f"\n{title}:\n", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(each) for each in row) + " |" for row in rows]
    return "\n".join(lines)


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Training losses, output norms and load by layer, of all seeds of the first depth."""
    from matplotlib.figure import Figure

    cells = results["cells"]
    rate, depth = results["learning_rate"], cells[0]["layers"]
    some = [c for c in cells if (c["learning_rate"], c["layers"]) == (rate, depth)]
    styles = list(dict.fromkeys(c["style"] for c in some))
    figure = Figure(figsize=(10, 3.2 * len(styles)), layout="constrained")
    axes = figure.subplots(len(styles), 3, squeeze=False)
    for row, style in zip(axes, styles, strict=True):
        for place, title in zip(
            row, ("training loss", "mean norm of u", "entropy of load"), strict=True
        ):
            place.set_title(f"{style}, {depth} layers: {title}")
        for (_, variant), group in _groups(
            [c for c in some if c["style"] == style], "style", "variant"
        ):
            _lines(row, variant, group)
        row[0].legend()
    figure.savefig(path, dpi=100)


def _lines(row: Any, variant: str, cells: Cells) -> None:
    curves = [
        [mean(values) for values in zip(*(c["training"] for c in cells), strict=True)],
        _by_layer(cells, "output_norm"),
        _by_layer(cells, "load_entropy"),
    ]
    for axes, curve in zip(row, curves, strict=True):
        axes.plot(curve, label=NAMES[variant], marker=".")


def _by_layer(cells: Cells, figure: str) -> list[float]:
    layers = range(cells[0]["layers"])
    return [mean(c["layers_seen"][i][figure] for c in cells) for i in layers]


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description="Tables and a figure of benchmarks.momentum.")
    parser.add_argument("results", type=Path)
    parser.add_argument("--page", type=Path, help="put the tables between the marks of this page")
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    results = json.loads(args.results.read_text())
    show_or_put(tables(results), args.page, MARKS)
    if args.figure is not None:
        draw(results, args.figure)


if __name__ == "__main__":
    main()
