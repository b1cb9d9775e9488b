"""The rows as a picture: the rise of the log-perplexity as made and recovered."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev

from benchmarks.paper.cells import RECOVERED, ROWS
from benchmarks.paper.tables import Found, of, rises


def draw(found: Found, path: Path) -> None:
    """One panel per model; lines span one standard deviation over seeds to both sides."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(each["model"] for each in found["cells"]))
    figure, axes = plt.subplots(1, len(models), figsize=(5 * len(models), 3.6), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        names = list(RECOVERED)
        for shift, label, cells in ((-0.2, "as made", ROWS), (0.2, "recovered", RECOVERED)):
            values = [rises(found, model, cells[name]) for name in names]
            lines = [stdev(each) if len(each) > 1 else 0.0 for each in values]
            places = [number + shift for number in range(len(names))]
            axis.bar(places, [mean(each) for each in values], 0.4, yerr=lines, label=label)
        sizes = [of(found, model, ROWS[name])[0]["parameters"] / 1e6 for name in names]
        labels = [f"{name}\n{size:.2f} M" for name, size in zip(names, sizes, strict=True)]
        axis.set_xticks(range(len(names)), labels)
        axis.set(title=model, ylabel="rise of log-perplexity, nats")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
