"""The rows as a picture: size against the rise of the log-perplexity, with and without recovery."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev

from benchmarks.paper.cells import RECOVERED, ROWS
from benchmarks.paper.tables import Found, of, rises


def draw(found: Found, path: Path) -> None:
    """One panel per model; bars span one standard deviation over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(each["model"] for each in found["cells"]))
    figure, axes = plt.subplots(1, len(models), figsize=(5 * len(models), 3.6), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        for label, cells, marker in (("as made", ROWS, "o"), ("recovered", RECOVERED, "s")):
            names = [name for name in cells if name != "full"]
            sizes = [of(found, model, cells[name])[0]["parameters"] / 1e6 for name in names]
            values = [rises(found, model, cells[name]) for name in names]
            bars = [stdev(each) if len(each) > 1 else 0.0 for each in values]
            means = [mean(each) for each in values]
            axis.errorbar(sizes, means, bars, fmt=marker, capsize=3, label=label)
            for name, size, height in zip(names, sizes, means, strict=True):
                axis.annotate(name, (size, height), xytext=(4, 4), textcoords="offset points")
        axis.set(title=model, xlabel="parameters, M", ylabel="rise of log-perplexity, nats")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
