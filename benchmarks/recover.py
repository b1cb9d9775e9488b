"""What recovery brings: the bundled model reduced, trained after the original, and measured.

Three cases: half of the neurons (`coalesce`), half of the experts merged (MC-SMoE's merging,
refitted), and that with U V + S on top, at a fifth of the expert bytes. Each is one run with a
section `recover`; plain pruning at the same bytes and the checkpoint before training are measured
beside it. Runs are kept in --work and go on where they were cut; --out is the file of results, from
which --page gets its table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.output import show
from benchmarks.pages import between
from models.atomic import write_json
from models.moe import MoeCheckpoint
from orchestrator.load import validate
from orchestrator.preflight import prepare
from orchestrator.run import run
from orchestrator.run_folder import versions

BUNDLED = Path(__file__).resolve().parents[1] / "examples" / "bundled"
MARKS = ("<!-- recovery: begin -->\n", "<!-- recovery: end -->\n")
MERGED: dict[str, Any] = {
    "group": {"method": "mc_smoe", "budget": {"keep_ratio": 0.5}},
    "refit": {"enabled": True, "polish": {"steps": 0}},
    "export": {"format": "mapped"},
}
NARROWED: dict[str, Any] = {"group": {"method": "coalesce", "budget": {"keep_ratio": 0.5}}}
SMALL = {"ratio": 0.25, "sparse": 0.15, "importance": "activations", "whiten": True}
# Name -> sections of the run, and the rise of the perplexity that is aimed at.
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "half of the neurons": (NARROWED, 1.02),
    "half of the experts": (MERGED, 1.02),
    "a fifth of the expert bytes": (MERGED | {"compress": SMALL}, 1.05),
}


def recipe(folder: Path, case: str, steps: int, tokens: int, seed: int) -> dict[str, Any]:
    """The run of one case."""

    def text(kind: str, count: int) -> dict[str, Any]:
        source = {"path": str(BUNDLED / "data" / f"{kind}.parquet"), "domain_column": "domain"}
        return {"sources": [source], "tokens": count, "sequence_length": 256}

    return {
        "run_dir": str(folder),
        "model": {"path": str(BUNDLED / "model"), "verify": "headers"},
        "calibrate": {
            "data": text("calibration", 81_920),
            "sample": {"tokens": 8192, "statistics": False},
            "dtype": "float32",
            "engine": "resident",
        },
        **CASES[case][0],
        "recover": {
            "mode": "full",
            "data": text("calibration", tokens),
            "steps": steps,
            "batch": 8,
            "warmup": max(steps // 20, 1),
            "learning_rate": 0.002,
            "seed": seed,
            "checkpoint_every": 50,
            "teacher": {"top": 32, "dtype": "float32", "engine": "resident"},
        },
        "evaluate": {
            "data": text("test", 40_960),
            "baselines": ["reap"],
            "dtype": "float32",
            "kl_positions": 64,
        },
        "executor": {"kind": "local"},
    }


def measure(work: Path, case: str, steps: int, tokens: int, seed: int) -> dict[str, Any]:
    """Runs a case, or goes on with it, and reads its report."""
    folder = work / f"{case.replace(' ', '-')}-{steps}-{tokens}-{seed}"
    report = folder / "report" / "report.json"
    if not report.exists():
        run(prepare(validate(recipe(folder, case, steps, tokens, seed))))
    found = json.loads(report.read_text())
    perplexity = found["perplexity"]
    original = perplexity["original"]["overall"]
    every = {
        name: perplexity[key] for name, key in (("before", "unrecovered"), ("after", "compressed"))
    }
    every["pruned"] = perplexity["baselines"]["reap"]
    moe = MoeCheckpoint.open(BUNDLED / "model")
    experts = sum(moe.num_experts * moe.expert_bytes(layer) for layer in moe.layers)
    others = found["bytes"]["before"] - experts
    return {
        "case": case,
        "seed": seed,
        "target": CASES[case][1],
        "expert_bytes": (found["bytes"]["after"] - others) / experts,
        **{f"{name}_over_original": each["overall"] / original for name, each in every.items()},
        "perplexity": {"original": perplexity["original"], **every},
        "steps": found["recover"]["steps"],
        "tokens": found["recover"]["tokens"],
        "text_tokens": tokens,
        "seconds": found["recover"]["seconds"],
        "first": found["recover"]["first"],
        "last": found["recover"]["last"],
    }


def page_table(results: dict[str, Any]) -> str:
    """The table of docs/recover.md."""
    lines = [
        "| | expert bytes | pruned (REAP) at those bytes | reduced | recovered | aimed at |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in results["rows"]:
        numbers = (f"{row[f'{name}_over_original']:.3f}" for name in ("pruned", "before", "after"))
        share = f"{row['expert_bytes']:.1%}".replace("%", " %")
        lines.append(f"| {row['case']} | {share} | {' | '.join(numbers)} | {row['target']:.2f} |")
    row = results["rows"][0]
    lines.append(
        f"\n{row['steps']:,} steps, {row['tokens']:,} tokens of a text of {row['text_tokens']:,},"
        f" seed {row['seed']}; perplexity over the original's, geometric mean of five domains."
    )
    return "\n".join(lines)


def main() -> None:
    """`python -m benchmarks.recover [--quick] [--work FOLDER] [--out FILE] [--page FILE]`"""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps: whether it runs")
    parser.add_argument("--work", type=Path, default=Path("runs/recover-benchmark"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of the text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", choices=CASES, action="append", help="all by default")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    steps, tokens = (4, 20_480) if given.quick else (given.steps, given.tokens)
    cases = given.case or list(CASES)
    rows = [measure(given.work, case, steps, tokens, given.seed) for case in cases]
    results = {"rows": rows, "versions": versions()}
    if given.out is not None:
        write_json(given.out, results)
    if given.page is not None:
        given.page.write_text(between(given.page.read_text(), MARKS, page_table(results)))
    names = ("case", "expert_bytes", "pruned_over_original", "before_over_original")
    names += ("after_over_original", "target")
    show("recover", [{name: row[name] for name in names} for row in rows])


if __name__ == "__main__":
    main()
