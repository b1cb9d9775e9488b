"""Merged experts as U V + S: bytes, memory, FLOPs, speed, and quality without recovery.

Bytes, FLOPs and tokens/s are those of a random Mixtral in fp32 (a quarter of Mixtral-8x7B's width,
--quick: a sixteenth), prefill of 512 tokens and decoding at batch 4, one thread; each figure with
`over` is the decomposed model's share of the other's. Quality is that of the bundled model, half of
whose experts were merged, on its test text: perplexity over the original's, nothing trained after,
but for the last row: the best of them, its experts trained on the observed text after the original.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.compress_speed import measure
from benchmarks.output import show, wants_quick
from orchestrator.load import validate
from orchestrator.preflight import prepare
from orchestrator.run import run
from stages.compress.config import CompressConfig
from stages.corpus.stage import block_domains
from stages.evaluate.stage import EvaluateUnit, Measurer, reduce
from stages.recover.api import recover
from stages.recover.config import RecoverConfig
from stages.recover.teach import teach

BUNDLED = Path(__file__).resolve().parents[1] / "examples" / "bundled"
# A quarter of the values in factors and a tenth of the rows: a third of a matrix.
SIZE = {"ratio": 0.25, "sparse": 0.1}
FITTED = {"importance": "activations", "whiten": True}
# Name -> the section `compress`, and whether the second factors are solved again.
QUALITY: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "merged": (None, False),
    "merged, U V + S": (SIZE, False),
    "merged, U V + S by inputs": (SIZE | FITTED, False),
    "merged and refitted": (None, True),
    "merged and refitted, U V + S by inputs, U solved again": (SIZE | FITTED, True),
}


def recipe(folder: Path, name: str, quick: bool, first: Path | None) -> dict[str, Any]:
    """The run of one variant; all but the first decide on what the first observed."""

    def text(kind: str, tokens: int) -> dict[str, Any]:
        source = {"path": str(BUNDLED / "data" / f"{kind}.parquet"), "domain_column": "domain"}
        return {"sources": [source], "tokens": tokens, "sequence_length": 256}

    section, refit = QUALITY[name]
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
        "evaluate": {
            "data": text("test", 5120 if quick else 40_960),
            "baselines": [],
            "dtype": "float32",
            "kl_positions": 0,
        },
        "executor": {"kind": "local"},
    }


def quality(folder: Path, quick: bool) -> list[dict[str, Any]]:
    """Perplexity of every variant over the original's, and bytes of its experts' files."""
    rows: list[dict[str, Any]] = []
    first: Path | None = None
    for number, name in enumerate(QUALITY):
        root = folder / f"run-{number}"
        run(prepare(validate(recipe(root, name, quick, first))))
        first = first or root
        report = json.loads((root / "report" / "report.json").read_text())
        found = {
            n: each["overall"] for n, each in report["perplexity"].items() if "overall" in each
        }
        rows.append(
            {
                "variant": name,
                "bytes_over_original": report["bytes"]["after"] / report["bytes"]["before"],
                "perplexity_over_original": found["compressed"] / found["original"],
            }
        )
    rows.append(rows[-1] | recovered(root, found["original"], quick))
    return rows


def recovered(root: Path, original: float, quick: bool) -> dict[str, Any]:
    """The last variant with its experts trained, `recover.mode=experts`.

    Args:
        root: its run, beside that of the first, which observed.
        original: perplexity.
    """
    corpus = root.with_name("run-0") / "calibration" / "tokens.arrow"
    config = RecoverConfig(
        steps=4 if quick else 300, batch=8 if quick else 16, warmup=1, learning_rate=2e-3
    )
    taught = teach(BUNDLED / "model", corpus, root / "taught.arrow", config)
    student = root / "recovered"
    recover(root / "output", student, config, corpus, taught)
    measurer, text = Measurer(), root / "evaluation" / "tokens.arrow"
    evaluate = validate(recipe(root, next(reversed(QUALITY)), quick, None)).evaluate
    assert evaluate is not None
    results = {
        domain: measurer.run_one(
            EvaluateUnit("recovered", domain, student, True, text, evaluate, root / "again", ())
        )
        for domain in block_domains(text)
    }
    perplexity = reduce(results)["perplexity"]["overall"]
    return {"variant": "the same, recovered", "perplexity_over_original": perplexity / original}


def main() -> None:
    """Prints both tables and one line of figures."""
    quick = wants_quick(str(__doc__))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        size = (256, 896) if quick else (1024, 3584)
        config = CompressConfig(**SIZE)
        rows, figures = measure(Path(root), config, *size, 5 if quick else 9, 512)
        qualities = quality(Path(root), quick)
    small = [row for row in qualities[:-1] if QUALITY[row["variant"]][0] is not None]
    best = min(row["perplexity_over_original"] for row in small)
    show(
        "compress",
        rows,
        **figures,
        perplexity_over_original_no_recovery=best,
        perplexity_over_original_recovered=qualities[-1]["perplexity_over_original"],
        quality=qualities,
    )


if __name__ == "__main__":
    main()
