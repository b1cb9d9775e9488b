"""What recovery brings: the bundled model reduced, trained after the original, and measured.

Half of the neurons (`coalesce`), half of the experts (MC-SMoE's groups), and these with U V + S at
a fifth of the expert bytes. The experts of a group are averaged and trained for a short time, or
become one at the level of neurons, are refitted thoroughly, and are trained for longer. Beside the
last of them, neurons alone are left away until no more bytes are left than with U V + S. Each case
is one run with a section `recover`; plain pruning at the same bytes and the checkpoint before
training are measured beside it. Runs are kept in --work and go on where they were cut; --out is the
file of results, from which --page gets its table, and cases that are not asked for stay in it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
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
from stages.recover.progress import read_course

BUNDLED = Path(__file__).resolve().parents[1] / "examples" / "bundled"
MARKS = ("<!-- recovery: begin -->\n", "<!-- recovery: end -->\n")
MERGED: dict[str, Any] = {
    "group": {"method": "mc_smoe", "budget": {"keep_ratio": 0.5}},
    "refit": {"enabled": True, "preset": "parallel", "polish": {"steps": 0}},
    "export": {"format": "mapped"},
}
NARROWED: dict[str, Any] = {
    "group": {"method": "coalesce", "budget": {"keep_ratio": 0.5}},
    "refit": {"preset": "parallel"},
}
SMALL = {"ratio": 0.25, "sparse": 0.15, "importance": "activations", "whiten": True}
BY_NEURONS: dict[str, Any] = MERGED | {
    "merge": {"by": "neurons"},
    "refit": {"enabled": True, "preset": "thorough", "polish": {"steps": 600}},
}
# No more bytes than U V + S on half of the experts.
FIFTH: dict[str, Any] = {
    "group": {"method": "coalesce", "budget": {"keep_ratio": 0.2084}, "divide": "probe"},
    "probe": {"refit": False},
    "refit": {"preset": "thorough", "polish": {"steps": 600}},
    "export": {"format": "mapped"},
}
OBSERVED = 81_920  # tokens
LAST = 100  # steps


@dataclass(frozen=True)
class Case:
    """Sections of the run, how it is trained, and the rise of the perplexity that is aimed at."""

    sections: dict[str, Any]
    target: float
    sample: int  # tokens whose inputs of layers are kept
    steps: int
    tokens: int  # of the text
    training: dict[str, Any]


def short(sections: dict[str, Any], target: float) -> Case:
    """About five minutes of one core."""
    rate = {"learning_rate": 0.002, "teacher": {"top": 32}}
    return Case(sections, target, 8192, 400, 400_000, rate)


def long(sections: dict[str, Any], target: float, steps: int, tokens: int) -> Case:
    """A quarter of an hour of one core for 1,600 steps, half an hour for 4,000."""
    return Case(sections, target, OBSERVED, steps, tokens, {"preset": "long"})


# Nearly all of the bundled text.
ALL_TEXT = 3_400_000
CASES = {
    "half of the neurons": short(NARROWED, 1.02),
    "half of the experts, averaged": short(MERGED, 1.02),
    "a fifth of the expert bytes, averaged": short(MERGED | {"compress": SMALL}, 1.05),
    "half of the experts": long(BY_NEURONS, 1.02, 1600, 1_500_000),
    "a fifth of the expert bytes": long(BY_NEURONS | {"compress": SMALL}, 1.05, 4000, ALL_TEXT),
    "a fifth of the expert bytes, by neurons alone": long(FIFTH, 1.05, 4000, ALL_TEXT),
}


def recipe(folder: Path, case: Case, seed: int) -> dict[str, Any]:
    """The run of one case."""
    steps, teacher = case.steps, {"dtype": "float32", "engine": "resident"}
    training = case.training | {"teacher": teacher | case.training.get("teacher", {})}

    def text(kind: str, count: int) -> dict[str, Any]:
        source = {"path": str(BUNDLED / "data" / f"{kind}.parquet"), "domain_column": "domain"}
        return {"sources": [source], "tokens": count, "sequence_length": 256}

    return {
        "run_dir": str(folder),
        "model": {"path": str(BUNDLED / "model"), "verify": "headers"},
        "calibrate": {
            "data": text("calibration", OBSERVED),
            "sample": {"tokens": case.sample, "statistics": False},
            "dtype": "float32",
            "engine": "resident",
        },
        **case.sections,
        "recover": {
            "mode": "full",
            "data": text("calibration", case.tokens),
            "steps": steps,
            "batch": 8,
            "warmup": max(steps // 20, 1),
            "seed": seed,
            "checkpoint_every": 50,
            **training,
        },
        "evaluate": {
            "data": text("test", 40_960),
            "baselines": ["reap"],
            "dtype": "float32",
            "kl_positions": 64,
        },
        "executor": {"kind": "local"},
    }


def measure(work: Path, name: str, case: Case, seed: int) -> dict[str, Any]:
    """Runs a case, or goes on with it, and reads its report."""
    folder = work / f"{name.replace(' ', '-').replace(',', '')}-{case.steps}-{case.tokens}-{seed}"
    report = folder / "report" / "report.json"
    if not report.exists():
        run(prepare(validate(recipe(folder, case, seed))))
    found = json.loads(report.read_text())
    perplexity = found["perplexity"]
    original = perplexity["original"]["overall"]
    every = {
        each: perplexity[key] for each, key in (("before", "unrecovered"), ("after", "compressed"))
    }
    every["pruned"] = perplexity["baselines"]["reap"]
    moe = MoeCheckpoint.open(BUNDLED / "model")
    experts = sum(moe.num_experts * moe.expert_bytes(layer) for layer in moe.layers)
    others = found["bytes"]["before"] - experts
    return {
        "case": name,
        "seed": seed,
        "target": case.target,
        "expert_bytes": (found["bytes"]["after"] - others) / experts,
        **{f"{key}_over_original": each["overall"] / original for key, each in every.items()},
        "perplexity": {"original": perplexity["original"], **every},
        "steps": found["recover"]["steps"],
        "tokens": found["recover"]["tokens"],
        "text_tokens": case.tokens,
        "seconds": found["recover"]["seconds"],
        "first": found["recover"]["first"],
        "last": found["recover"]["last"],
        "kl_on_test": found["kl"]["compressed"]["overall"],
        "distillation_of_last_steps": distilled(folder / "recover" / "course.jsonl"),
    }


def distilled(course: Path) -> float:
    """Mean KL to the original on what was trained on; at T 1 comparable to that on test text."""
    last: list[float] = [line["distillation"] for line in read_course(course)[-LAST:]]
    return sum(last) / len(last)


def page_table(results: dict[str, Any]) -> str:
    """The table of docs/recover.md."""
    lines = [
        "| | expert bytes | pruned (REAP) at those bytes | reduced | steps | tokens, of a text of |"
        " recovered | aimed at |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in results["rows"]:
        pruned, before, after = (
            f"{row[f'{name}_over_original']:.3f}" for name in ("pruned", "before", "after")
        )
        share = f"{row['expert_bytes']:.1%}".replace("%", " %")
        text = f"{row['tokens'] / 1e6:.1f} M, {row['text_tokens'] / 1e6:.1f} M"
        lines.append(
            f"| {row['case']} | {share} | {pruned} | {before} | {row['steps']:,} | {text}"
            f" | {after} | {row['target']:.2f} |"
        )
    seeds = ", ".join(map(str, sorted({row["seed"] for row in results["rows"]})))
    lines.append(f"\nSeed {seeds}; perplexity over the original's, geometric mean of five domains.")
    return "\n".join(lines)


def merged(kept: Path | None, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """In the order of the cases: those of now, and the others as the file has them."""
    known = {row["case"]: row for row in rows}
    if kept is not None and kept.exists():
        known = {row["case"]: row for row in json.loads(kept.read_text())["rows"]} | known
    return [known[name] for name in CASES if name in known]


def main() -> None:
    """`python -m benchmarks.recover [--quick] [--work FOLDER] [--out FILE] [--page FILE]`"""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps: whether it runs")
    parser.add_argument("--work", type=Path, default=Path("runs/recover-benchmark"))
    parser.add_argument("--steps", type=int, help="instead of the case's own")
    parser.add_argument("--tokens", type=int, help="of the text, instead of the case's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", choices=CASES, action="append", help="all by default")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    changes = {"steps": given.steps, "tokens": given.tokens}
    if given.quick:
        changes = {"steps": 4, "tokens": 20_480, "sample": 2048}
    changes = {name: value for name, value in changes.items() if value is not None}
    chosen = {name: replace(CASES[name], **changes) for name in given.case or CASES}
    rows = [measure(given.work, name, case, given.seed) for name, case in chosen.items()]
    results = {"rows": merged(given.out, rows), "versions": versions()}
    if given.out is not None:
        write_json(given.out, results)
    if given.page is not None:
        given.page.write_text(between(given.page.read_text(), MARKS, page_table(results)))
    over = ("pruned_over_original", "before_over_original", "after_over_original")
    names = ("case", "expert_bytes", *over, "target")
    show("recover", [{name: row[name] for name in names} for row in rows])


if __name__ == "__main__":
    main()
