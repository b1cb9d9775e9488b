"""Merged experts as U V + S: bytes, memory, FLOPs, speed, and quality with and without recovery.

Bytes, FLOPs and tokens/s are those of a random Mixtral in fp32 (a quarter of Mixtral-8x7B's width,
and a sixteenth; --quick: that alone), prefill of 512 tokens and decoding at batch 4, one thread;
each figure with `over` is the decomposed model's share of the other's. Quality is that of the
bundled model, half of whose experts were merged, on its test text: perplexity over the original's.
The last rows are the best of them, its experts trained on the observed text after the original,
with the S that it had, and with S chosen by that training at the same bytes.

Cells are kept in --work and not measured again; --out is the file of results, from which --page
gets its tables.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.compress_cells import decompositions, planned
from benchmarks.compress_page import put
from benchmarks.compress_speed import measure
from benchmarks.output import show
from models.atomic import write_json
from orchestrator.load import validate
from orchestrator.preflight import prepare
from orchestrator.run import run
from orchestrator.run_folder import versions
from stages.compress.config import CompressConfig

BUNDLED = Path(__file__).resolve().parents[1] / "examples" / "bundled"
# A quarter of the values in factors and a tenth of the rows: a third of a matrix.
SIZE = {"ratio": 0.25, "sparse": 0.1}
FITTED = {"importance": "activations", "whiten": True}
BEST = "merged and refitted, U V + S by inputs, U solved again"
# Name -> the section `compress`, and whether the second factors are solved again.
QUALITY: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "merged": (None, False),
    "merged, U V + S": (SIZE, False),
    "merged, U V + S by inputs": (SIZE | FITTED, False),
    "merged and refitted": (None, True),
    BEST: (SIZE | FITTED, True),
}
CHOSEN = {"importance": "sensitivity", "one_shot": "activations", "whiten": True}
TRAINED: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "the same, recovered": QUALITY[BEST],
    "the same, S chosen by sensitivity while recovered": (SIZE | CHOSEN, True),
}
SIZES = {"quarter": (1024, 3584), "sixteenth": (256, 896)}
TURNS = 5
SEED = 0


def recipe(folder: Path, name: str, steps: int, quick: bool, first: Path | None) -> dict[str, Any]:
    """The run of one variant; all but the first decide on what the first observed."""

    def text(kind: str, tokens: int) -> dict[str, Any]:
        source = {"path": str(BUNDLED / "data" / f"{kind}.parquet"), "domain_column": "domain"}
        return {"sources": [source], "tokens": tokens, "sequence_length": 256}

    section, refit = (QUALITY | TRAINED)[name]
    calibrate = {
        "data": text("calibration", 10_240 if quick else 81_920),
        "sample": {"tokens": 2048 if quick else 8192, "statistics": False},
        "dtype": "float32",
        "engine": "resident",
    }
    observed = {} if first is None else {"statistics": str(first / "statistics.arrow")}
    return {
        "run_dir": str(folder),
        "model": {"path": str(BUNDLED / "model"), "verify": "headers"},
        "calibrate": calibrate | observed,
        "group": {"method": "mc_smoe", "budget": {"keep_ratio": 0.5}},
        "refit": {"enabled": refit, "polish": {"steps": 0}},
        "compress": section,
        "export": {"format": "mapped"},
        "recover": recovery(steps) if name in TRAINED else None,
        "evaluate": {
            "data": text("test", 5120 if quick else 40_960),
            "baselines": [],
            "dtype": "float32",
            "kl_positions": 0,
        },
        "executor": {"kind": "local"},
    }


def recovery(steps: int) -> dict[str, Any]:
    """The section of the rows that are trained."""
    return {
        "mode": "experts",
        "steps": steps,
        "batch": 8,
        "warmup": max(steps // 20, 1),
        "learning_rate": 2e-3,
        "seed": SEED,
        "checkpoint_every": 50,
        "teacher": {"top": 32, "dtype": "float32", "engine": "resident"},
    }


def quality(work: Path, name: str, steps: int, quick: bool) -> dict[str, Any]:
    """Perplexity of a variant over the original's, and bytes of its files."""
    names = list(QUALITY | TRAINED)
    folder, first = work / f"run-{names.index(name)}-{steps}", work / f"run-0-{steps}"
    report = folder / "report" / "report.json"
    if not report.exists():
        before = None if folder == first else first
        run(prepare(validate(recipe(folder, name, steps, quick, before))))
    found = json.loads(report.read_text())
    perplexity = found["perplexity"]
    return {
        "variant": name,
        "bytes_over_original": found["bytes"]["after"] / found["bytes"]["before"],
        "perplexity_over_original": perplexity["compressed"]["overall"]
        / perplexity["original"]["overall"],
    }


def kept(work: Path, name: str, make: Callable[[], Any]) -> Any:
    """What `make` gives, asked once per folder."""
    path = work / f"{name}.json"
    if not path.exists():
        write_json(path, make())
    return json.loads(path.read_text())


def speed(name: str) -> dict[str, Any]:
    """Rows per model of one width, and the figures that compare them."""
    with tempfile.TemporaryDirectory() as root:
        rows, figures = measure(Path(root), CompressConfig(**SIZE), *SIZES[name], TURNS, 512)
    return {"rows": rows, "figures": figures, "width": SIZES[name], "turns": TURNS}


def results(work: Path, steps: int, quick: bool) -> dict[str, Any]:
    """Everything that is measured."""
    work.mkdir(parents=True, exist_ok=True)
    sizes = ["sixteenth"] if quick else list(SIZES)
    rows = [quality(work, name, steps, quick) for name in QUALITY | TRAINED]
    found: dict[str, Any] = {
        "seed": SEED,
        "versions": versions(),
        "recovery": recovery(steps),
        "quality": rows,
        "speed": {n: kept(work, f"speed-{n}", partial(speed, n)) for n in sizes},
    }
    if not quick:
        found["svd"] = kept(work, "svd", lambda: decompositions(*SIZES["quarter"]))
        plans = ("switch-base-32", "mixtral-8x7b")
        found["plans"] = {n: kept(work, f"plan-{n}", partial(planned, n)) for n in plans}
    return found


def figures(found: dict[str, Any]) -> dict[str, float]:
    """The line for programs."""
    over = {row["variant"]: row["perplexity_over_original"] for row in found["quality"]}
    small = [over[name] for name, (section, _) in QUALITY.items() if section is not None]
    fast: dict[str, float] = next(iter(found["speed"].values()))["figures"]
    return fast | {
        "perplexity_over_original_no_recovery": min(small),
        "perplexity_over_original_recovered": over["the same, recovered"],
    }


def main() -> None:
    """`python -m benchmarks.compress [--quick] [--work FOLDER] [--out FILE] [--page FILE]`"""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under three minutes on two cores")
    parser.add_argument("--work", type=Path, help="folder that keeps what is measured")
    parser.add_argument("--steps", type=int, default=200, help="of the recovery")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with ExitStack() as stack:
        work = given.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found = results(work, 4 if given.quick else given.steps, given.quick)
    if given.out is not None:
        write_json(given.out, found)
    if given.page is not None:
        given.page.write_text(put(given.page.read_text(), found))
    rows = next(iter(found["speed"].values()))["rows"]
    show("compress", rows, **figures(found), quality=found["quality"])


if __name__ == "__main__":
    main()
