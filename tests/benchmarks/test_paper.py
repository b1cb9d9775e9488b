"""The paper's tables at small scale: the page shows what the file holds; the smallest form runs."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

from benchmarks.pages import between
from benchmarks.paper.__main__ import SETUPS, measured, quick
from benchmarks.paper.cells import ABLATIONS, DISTILLATION, RECOVERED, ROWS, THRESHOLD, Cell, cells
from benchmarks.paper.switch import Recipe
from benchmarks.paper.switch_student import FactoredLinear
from benchmarks.paper.tables import MARKS, rises, tables
from benchmarks.paper.text import log_likelihood, measure, windows
from stages.compress.config import CompressConfig
from stages.compress.factor import factor
from tests.tiny import random_input, save_tiny
from tests.tiny_seq2seq import seq2seq_model

REPOSITORY = Path(__file__).resolve().parents[2]
FOUND: dict[str, Any] = json.loads((REPOSITORY / "docs/results/paper.json").read_text())


def test_the_page_holds_exactly_the_tables_of_the_file() -> None:
    page = (REPOSITORY / "docs" / "paper.md").read_text()
    assert between(page, MARKS, tables(FOUND)) == page


def test_the_file_holds_every_cell_of_its_seeds() -> None:
    there = {(e["model"], e["seed"], json.dumps(e["cell"], sort_keys=True)) for e in FOUND["cells"]}
    models = [each["model"] for each in FOUND["setups"]]
    wanted = {
        (model, seed, json.dumps(asdict(cell), sort_keys=True))
        for model in models
        for seed in FOUND["seeds"]
        for cell in cells()
    }
    assert there == wanted and len({cell.slug for cell in cells()}) == len(cells())


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_what_is_asked_is_answered_by_chance_at_random(kind: str, tmp_path: Path) -> None:
    """Sums of the likelihoods of the tokens, and shares between 0 and 1."""
    if kind == "decoder":
        from tests.tiny import open_model

        model = open_model(save_tiny(tmp_path, "mixtral"))
    else:
        model = seq2seq_model("SwitchTransformers")
    generator = torch.Generator().manual_seed(0)
    streams = {n: torch.randint(3, 60, (200,), generator=generator) for n in ("a", "b", "c")}
    asked = windows(streams, 3, 16, 0)

    found = measure(model, asked)

    assert set(found["perplexity"]) == {"a", "b", "c"}
    assert all(0 <= share <= 1 for share in found["tasks"].values())
    one = log_likelihood(model, asked.sources[0], asked.targets[0])
    alone = log_likelihood(model, asked.sources[0][2:3], asked.targets[0][2:3])
    torch.testing.assert_close(one[2:3], alone, rtol=1e-4, atol=1e-4)
    starts = [row.tolist() for row in asked.sources[0]]
    assert len({tuple(row) for row in starts}) == 3


def test_windows_do_not_overlap_and_follow_the_seed() -> None:
    streams = {"a": torch.arange(320)}

    first, again, other = (windows(streams, 5, 8, seed) for seed in (0, 0, 1))

    assert first.sources[0].equal(again.sources[0]) and not first.sources[0].equal(other.sources[0])
    everything = torch.cat([first.sources[0], first.targets[0]], dim=1)
    assert len(set(everything.flatten().tolist())) == everything.numel() == 80
    assert set((first.targets[0][:, 0] - first.sources[0][:, -1]).tolist()) == {1}


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_factored_linear_is_its_matrix(share: float) -> None:
    made = factor(random_input(12, 10, 0), CompressConfig(rank=3, sparse=share))
    x = random_input(5, 10, 1)

    found = FactoredLinear(made)(x)

    torch.testing.assert_close(found, x @ made.dense().T, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # tokenises ten megabytes of text
def test_the_smallest_form_runs_and_is_not_measured_twice(tmp_path: Path) -> None:
    """Of every kind of cell one, on both models; a second call reads what the first wrote."""
    chosen = [
        ROWS["full"],
        ROWS["prune"],
        THRESHOLD["one threshold for all"],
        RECOVERED["MC-SMoE"],
        replace(DISTILLATION["likelihood alone"], similarity="expert output"),
    ]
    setups = [quick(each) for each in SETUPS]
    recipe = Recipe(steps=2, windows=1)

    found = measured(tmp_path, setups, [0], recipe, chosen)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/seed-0/cells/*.json")}
    again = measured(tmp_path, setups, [0], recipe, chosen)

    assert found == again and len(files) == 2 * len(chosen)
    assert files == {path: path.stat().st_mtime_ns for path in files}
    by = {(e["model"], e["cell"]["decomposed"], e["cell"]["method"]): e for e in found["cells"]}
    for model in ("bundled", "switch"):
        sizes = [by[model, d, m]["parameters"] for d, m in ((True, "merge"), (False, "full"))]
        assert 0 < sizes[0] < sizes[1]
    assert all(each["loss"] > 0 for each in found["cells"])


def mean_rise(model: str, cell: Cell) -> float:
    return mean(rises(FOUND, model, cell))


@pytest.mark.parametrize("model", ["bundled", "switch"])
def test_the_file_bears_out_what_the_page_says(model: str) -> None:
    merged, named = mean_rise(model, ROWS["M-SMoE"]), ABLATIONS | ROWS
    of = {name: mean_rise(model, cell) - merged for name, cell in named.items()}
    after = {name: rises(FOUND, model, cell) for name, cell in RECOVERED.items()}

    assert of["average"] > 0.09 and of["uniform averaging"] > 0.05
    assert max(after["M-SMoE"]) < min(after["average"])
    ahead = sum(a < b for a, b in zip(after["M-SMoE"], after["prune"], strict=True))
    assert (of["prune"] < 0, ahead) == ((True, 2) if model == "bundled" else (False, 3))
    assert of["no alignment"] > (0.5 if model == "bundled" else 0.01)
    assert abs(of["uniform budget"]) < 0.04
    alike = [of[f"grouped by {each}"] for each in ("router weight", "expert weight")]
    assert max(alike) <= 0 and of["grouped by expert output"] == min(
        v for n, v in of.items() if n != "full"
    )
    trained = [mean_rise(model, cell) for cell in DISTILLATION.values()]
    assert 0 < trained[1] - trained[2] < 0.03 < trained[0] - trained[1]
    threshold = [mean_rise(model, cell) for cell in THRESHOLD.values()]
    assert -0.01 < threshold[0] - threshold[1] <= 0
    assert mean(after["MC-SMoE"]) > mean(after["M-SMoE"]) + 0.08 and min(after["M-SMoE"]) > 0.05
