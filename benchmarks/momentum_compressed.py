"""What a MomentumSMoE loses by compression, beside an SMoE trained on the same batches.

    python -m benchmarks.momentum --out OUT --workers 2
    python -m benchmarks.momentum_compressed --out OUT \
        --results docs/results/momentum_compressed.json
    python -m benchmarks.momentum_compressed --table docs/results/momentum_compressed.json \
        --page docs/momentum.md

Reads the six-layer models that `benchmarks.momentum` left in OUT. Every reduced model is a normal
run with an observation of its own model's, measured on held-out text of the domain that the models
learned. Without recovery. A run that has its report is not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.momentum import LEARNING_RATE, PAIR, WHOLE, Setup
from benchmarks.momentum_cell import Cell, Place
from benchmarks.momentum_table import NAMES
from benchmarks.momentum_text import BUNDLED, DOMAIN
from benchmarks.output import show
from benchmarks.pages import show_or_put
from benchmarks.quality import only_domain
from models.atomic import write_json
from orchestrator.load import validate
from orchestrator.preflight import prepare
from orchestrator.run import observe, run
from orchestrator.run_folder import versions

LAYERS = 6
MAPPED = {"export": {"format": "mapped"}}
GLOBAL = {"method": "mc_smoe", "scope": "global"}
DIVIDED = {"method": "coalesce", "divide": "predicted"}
GAIN = {"weigh_layers": "gain"}
# Half of the expert bytes; sections of a run that differ from the defaults.
RECIPES: dict[str, dict[str, Any]] = {
    "pruned, REAP": {"group": {"method": "reap"}},
    "merged, one budget": {"group": GLOBAL, **MAPPED},
    "merged, weighed by gain": {"group": GLOBAL | GAIN, **MAPPED},
    "narrower, refit": {"group": {"method": "coalesce"}},
    "divided, refit": {"group": DIVIDED, **MAPPED},
    "divided by gain, refit": {"group": DIVIDED | GAIN, **MAPPED},
}
MARKS = (
    "<!-- momentum compressed: begin -->\n",
    "<!-- momentum compressed: end -->\n",
)


def base(folder: Path, place: Place, model: Path, seed: int) -> dict[str, Any]:
    """The config of an observation of 40,960 tokens."""

    def text(split: str, tokens: int) -> dict[str, Any]:
        source = {"path": str(folder / f"{split}.parquet"), "domain_column": "domain"}
        length = WHOLE.length
        return {"sources": [source], "tokens": tokens, "sequence_length": length, "seed": seed}

    return {
        "run_dir": str(folder / model.parent.name / "observed"),
        "model": {"path": str(model), "tokenizer": str(place.tokenizer)},
        "calibrate": {"data": text("calibration", 40_960), "dtype": "float32", "shards": 1},
        "evaluate": {
            "data": text("test", 10_240) | {"seed": 0},
            "baselines": [],
            "dtype": "float32",
        },
        "executor": {"kind": "local"},
    }


def row(cell: Cell, place: Place, folder: Path) -> dict[str, Any]:
    """Rises of the log-perplexity of one trained model, by recipe."""
    config = base(folder, place, place.model(cell), cell.seed)
    statistics = observe(prepare(validate(config)))
    config["calibrate"] |= {"statistics": str(statistics)}
    rises: dict[str, float] = {}
    for name, sections in recipes(cell):
        group = sections["group"] | {"budget": {"keep_ratio": 0.5}}
        place_of = folder / cell.name / name.replace(" ", "-").replace(",", "")
        report = place_of / "report" / "report.json"
        if not report.exists():
            run(prepare(validate(config | sections | {"group": group, "run_dir": str(place_of)})))
        measured = json.loads(report.read_text())["perplexity"]
        before, after = (measured[each]["overall"] for each in ("original", "compressed"))
        rises[name] = math.log(after / before)
    return {"style": cell.style, "variant": cell.variant, "seed": cell.seed, "rises": rises}


def recipes(cell: Cell) -> Iterator[tuple[str, dict[str, Any]]]:
    """Without momentum every gain is one, and weighing by it nothing else than not weighing."""
    for name, sections in RECIPES.items():
        if cell.variant == "momentum" or "weigh_layers" not in sections["group"]:
            yield name, sections


def tables(found: Mapping[str, Any]) -> str:
    """Rise per recipe, a column per block and variant, mean and farthest seed."""
    rows = found["rows"]
    kinds = list(dict.fromkeys((each["style"], each["variant"]) for each in rows))
    heads = [f"`{style}` {NAMES[variant]}" for style, variant in kinds]
    lines = ["| half of the expert bytes | " + " | ".join(heads) + " |"]
    lines.append("| --- |" + " ---: |" * len(heads))
    for name in RECIPES:
        cells = []
        for kind in kinds:
            alike = [each["rises"] for each in rows if (each["style"], each["variant"]) == kind]
            values = [each[name] for each in alike if name in each]
            cells.append(_spread(values) if values else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    """Mean, and the largest distance of a seed to it."""
    middle = mean(values)
    off = max(abs(value - middle) for value in values)
    return f"{middle:.3f}" + (f" ± {off:.3f}" if len(values) > 1 else "")


def measure(out: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """All models, all recipes."""
    place, folder = Place(out), out / "compressed"
    folder.mkdir(exist_ok=True)
    for split in ("calibration", "test"):
        text = folder / f"{split}.parquet"
        if not text.exists():
            only_domain(BUNDLED / "data" / f"{split}.parquet", DOMAIN, text)
    styles = Setup(out).styles
    cells = [
        Cell(style, LAYERS, seed, variant, LEARNING_RATE)
        for style in styles
        for variant in PAIR
        for seed in seeds
    ]
    rows = [row(cell, place, folder) for cell in cells]
    return {"benchmark": "momentum compressed", "versions": versions(), "rows": rows}


def main() -> None:
    """Prints a row per model; the last line is JSON. With --table: the table of a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="of benchmarks.momentum")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, help="a file for the results")
    parser.add_argument("--table", type=Path, help="print the table of such a file, run nothing")
    parser.add_argument("--page", type=Path, help="with --table: write it between a page's marks")
    options = parser.parse_args()
    if options.table:
        show_or_put(tables(json.loads(options.table.read_text())), options.page, MARKS)
        return
    if options.out is None:
        parser.error("--out is needed")
    torch.set_num_threads(1)
    found = measure(options.out.resolve(), range(options.seeds))
    if options.results is not None:
        write_json(options.results, found)
    keys = ("style", "variant", "seed")
    shown = [{key: each[key] for key in keys} | each["rises"] for each in found["rows"]]
    shown.sort(key=len, reverse=True)  # the first row names the columns
    show("momentum compressed", shown, results=found["rows"])


if __name__ == "__main__":
    main()
