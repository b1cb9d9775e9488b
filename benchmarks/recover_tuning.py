"""How the settings of the long recovery were chosen: short trainings, judged on validation text.

Two students of the bundled model (`benchmarks.recover`, half of the experts and a fifth of their
bytes, before any training) are trained for 120 steps on the same blocks in the same order. Reported
is the perplexity on 40,960 tokens of `validation.parquet` over the original's; no test text is
read. Cells are kept in --work and not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from benchmarks.output import show
from benchmarks.pages import between
from benchmarks.recover import BUNDLED, CASES, recipe
from models.atomic import write_json
from models.mapped.registration import register
from orchestrator.load import validate
from orchestrator.preflight import prepare
from orchestrator.run import run
from orchestrator.run_folder import versions
from stages.corpus.config import CorpusConfig
from stages.corpus.stage import CorpusUnit, read_blocks, run_one
from stages.model import batch_of, load_model, pad_id
from stages.recover.config import RecoverConfig
from stages.recover.teach import teach
from stages.recover.trainer import Training, train

MARKS = ("<!-- tuning: begin -->\n", "<!-- tuning: end -->\n")
TEXT, HELD_OUT = 245_760, 40_960  # tokens
COMMON: dict[str, Any] = {
    "mode": "full",
    "steps": 120,
    "batch": 8,
    "warmup": 6,
    "temperature": 1.0,
    "teacher": {"top": 64, "dtype": "float32", "engine": "resident"},
}
# Case, rate, weight of the distillation.
TRIALS = (
    ("half of the experts", 1e-3, 1.0),
    ("half of the experts", 4e-4, 1.0),
    ("half of the experts", 4e-4, 10.0),
    ("half of the experts", 2e-4, 30.0),
    ("half of the experts", 8e-4, 30.0),
    ("a fifth of the expert bytes", 1e-3, 10.0),
    ("a fifth of the expert bytes", 1e-3, 30.0),
    ("a fifth of the expert bytes", 2e-3, 30.0),
)


def start_of(work: Path, case: str) -> Path:
    """The student before training: the case's run without its last stages."""
    folder = work / case.replace(" ", "-")
    if not (folder / "report" / "report.json").exists():
        values = recipe(folder, CASES[case], 0)
        del values["recover"]
        values["evaluate"] |= {"data": text("validation", HELD_OUT), "baselines": []}
        run(prepare(validate(values)))
    return folder / "output"


def text(kind: str, tokens: int) -> dict[str, Any]:
    """A section `data`."""
    source = {"path": str(BUNDLED / "data" / f"{kind}.parquet"), "domain_column": "domain"}
    return {"sources": [source], "tokens": tokens, "sequence_length": 256}


def corpus(work: Path, kind: str, tokens: int) -> Path:
    """Blocks of one of the bundled texts."""
    path = work / f"{kind}-{tokens}.arrow"
    if not path.exists():
        config = CorpusConfig.model_validate(text(kind, tokens))
        run_one(CorpusUnit(f"corpus/{kind}", config, BUNDLED / "model", path))
    return path


@torch.no_grad()
def perplexity(model: Any, held_out: Path) -> float:
    """Geometric mean over domains."""
    sums: dict[str, list[float]] = {}
    for block in read_blocks(held_out):
        ids, _ = batch_of([block.tokens], pad_id(model), torch.device("cpu"))
        said = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(said, ids[0, 1:], reduction="none")
        sums.setdefault(block.domain, []).extend(losses.tolist())
    return math.exp(sum(sum(each) / len(each) for each in sums.values()) / len(sums))


def measure(work: Path, case: str, rate: float, alpha: float) -> dict[str, Any]:
    """One cell: trained, or read."""
    path = work / f"{case.replace(' ', '-')}-{rate:g}-{alpha:g}.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    config = RecoverConfig.model_validate(COMMON | {"learning_rate": rate, "alpha": alpha})
    learnt, held_out = (
        corpus(work, *each) for each in (("calibration", TEXT), ("validation", HELD_OUT))
    )
    taught = work / "taught.arrow"
    if not taught.exists():
        teach(BUNDLED / "model", learnt, taught, config)
    start = start_of(work, case)
    done = train(
        Training(start, True, learnt, (taught,), config, work / f"{path.stem}-states", path.stem)
    )
    original = perplexity(load_model(BUNDLED / "model", "float32"), held_out)
    before = perplexity(load_model(start, "float32", trust_remote_code=True), held_out)
    row = {"case": case, "rate": rate, "alpha": alpha, "original": original}
    row |= {"before_over_original": before / original}
    row |= {"after_over_original": perplexity(done.model, held_out) / original}
    write_json(path, row)
    return row


def page_table(results: dict[str, Any]) -> str:
    """The table of docs/recover.md."""
    lines = [
        "| 120 steps, validation text | rate | alpha | before | after |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in results["rows"]:
        settings = f"{row['case']} | {row['rate']:g} | {row['alpha']:g}"
        before, after = (f"{row[f'{name}_over_original']:.3f}" for name in ("before", "after"))
        lines.append(f"| {settings} | {before} | {after} |")
    return "\n".join(lines)


def main() -> None:
    """`python -m benchmarks.recover_tuning [--work FOLDER] [--out FILE] [--page FILE]`"""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/recover-tuning"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    register()
    given.work.mkdir(parents=True, exist_ok=True)
    rows = [measure(given.work, *trial) for trial in TRIALS]
    results = {"rows": rows, "steps": COMMON["steps"], "seed": 0, "versions": versions()}
    if given.out is not None:
        write_json(given.out, results)
    if given.page is not None:
        given.page.write_text(between(given.page.read_text(), MARKS, page_table(results)))
    show("recover_tuning", rows)


if __name__ == "__main__":
    main()
