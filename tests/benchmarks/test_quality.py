"""The quality benchmark: what it counts, what it reports, and that the docs show what it wrote."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.pages import between
from benchmarks.quality import RATIOS, claim, held, only_domain, options_of, plan, setup_of
from benchmarks.quality_cell import agreement, flops_per_token
from benchmarks.quality_control import random_expert
from benchmarks.quality_methods import METHODS, cells
from benchmarks.quality_summary import (
    DEFAULT,
    OURS,
    over_best_other,
    standard_error,
    summary,
)
from benchmarks.quality_table import marks, tables
from models.expert import Expert
from models.moe import MoeCheckpoint
from orchestrator.errors import ConfigError
from stages.export.layout import placeholder

REPOSITORY = Path(__file__).resolve().parents[2]
FOUND: dict[str, Any] = json.loads((REPOSITORY / "docs/results/quality.json").read_text())


@pytest.mark.parametrize("name", ["quality", "quality_16e"])
def test_the_docs_hold_exactly_the_tables_of_the_file(name: str) -> None:
    page = (REPOSITORY / "docs" / "methods.md").read_text()
    found = json.loads((REPOSITORY / "docs" / "results" / f"{name}.json").read_text())
    assert between(page, marks(found), tables(found)) == page


def test_the_file_holds_the_default_and_every_published_method_at_every_ratio() -> None:
    rows = {(row["method"], row["keep"], row["refit"]): row for row in FOUND["rows"]}
    published = {name for name, recipe in METHODS.items() if recipe.published}
    for keep in RATIOS:
        assert ("coalesce", keep, True) in rows
        assert {name for name, at, refit in rows if at == keep and not refit} >= published
    assert set(rows) <= {(c.method, c.keep, c.refit) for c in cells(METHODS, RATIOS)}
    assert all(set(row["seeds"]) <= set(FOUND["seeds"]) for row in FOUND["rows"])
    again = over_best_other(FOUND["rows"], DEFAULT)
    assert again == pytest.approx(FOUND["default_over_best_other"], rel=1e-3)


def test_a_rise_is_the_mean_over_domains_and_its_errors_are_over_seeds_and_domains() -> None:
    original = {"perplexity": {"overall": 4.0, "domains": {"a": 2.0, "b": 8.0}}}
    rises = [(0.1, 0.3), (0.3, 0.5)]
    sizes = dict.fromkeys(("expert_bytes", "bytes", "flops_per_token", "refitted_layers"), 0)
    made = [
        {
            **sizes,
            "method": "reap",
            "keep": 0.5,
            "refit": False,
            "format": "native",
            "seed": seed,
            "agreement": 0.5,
            "kl": {"overall": 0.1},
            "perplexity": {"domains": {"a": 2 * math.exp(a), "b": 8 * math.exp(b)}},
        }
        for seed, (a, b) in enumerate(rises)
    ]
    (row,) = summary(original, made)
    assert row["rise"] == pytest.approx(0.3)
    assert row["perplexity"] == pytest.approx(4 * math.exp(0.3))
    assert row["se_seeds"] == pytest.approx(0.1)  # of 0.2 and 0.4
    assert row["se_domains"] == pytest.approx(0.1)  # of 0.2 and 0.4
    assert standard_error([1.0]) is None


def test_agreement_ends_at_the_first_token_that_differs() -> None:
    one, other = ({"continuations": [c]} for c in ([5, 6, 7, 8], [5, 6, 0, 8]))
    assert agreement(one, one) == 1
    assert agreement(one, other) == 0.5


def test_flops_are_two_per_weight_that_a_token_meets() -> None:
    moe = MoeCheckpoint.open(REPOSITORY / "examples" / "bundled" / "model")
    head, attention = 4096 * 192, 192 * (192 + 64 + 64 + 192)
    for kept, width in ((16, None), (8, None), (16, 48)):
        whole = placeholder(moe, dict.fromkeys(moe.layers, kept))
        decisions = [replace(each, width=width) for each in whole]
        layer = attention + kept * 192 + 2 * 3 * 192 * (width or 96)
        assert flops_per_token(moe, decisions, "native") == 2 * (head + 5 * layer)
        mapped = 2 * (head + 5 * (layer + (16 - kept) * 192))
        assert flops_per_token(moe, decisions, "mapped") == mapped


def test_a_random_expert_has_the_scale_of_the_real_one_and_no_output() -> None:
    generator = torch.Generator().manual_seed(0)
    like = Expert(up=torch.full((64, 96), 0.5), down=torch.ones(96, 64), gate=torch.ones(64, 96))
    made = random_expert(like, 32, generator)
    assert made.gate is not None
    assert (made.up.shape, made.down.shape) == ((32, 96), (96, 32))
    assert float(made.up.std()) == pytest.approx(0.5, rel=0.1)
    assert float(made.gate.std()) == pytest.approx(1.0, rel=0.1)
    assert not made.down.any()


def test_results_of_other_settings_are_refused(tmp_path: Path) -> None:
    setup = setup_of(options_of(["--quick"]))
    claim(tmp_path, setup)
    claim(tmp_path, setup)
    with pytest.raises(ConfigError, match="other settings"):
        claim(tmp_path, replace(setup, sample=setup.sample + 1))


def test_text_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither calibration.parquet nor train"):
        setup_of(options_of(["--data", str(tmp_path)]))
    calibration = setup_of(options_of([])).calibration
    with pytest.raises(ConfigError, match="'klingon'"):
        only_domain(calibration, "klingon", tmp_path / "one.parquet")


def test_methods_with_another_sample_are_observed_apart(tmp_path: Path) -> None:
    words = ["--only-comparison", "--seeds", "2", "--refit-seeds", "2", "--only", "reap"]
    words += [*OURS, "naee more text"]
    options = options_of(words)
    setup = setup_of(options)

    plans = plan(setup, options, tmp_path)

    sizes = {name: (tasks[0].setup.tokens, tasks[0].setup.sample) for name, tasks in plans.items()}
    assert sizes == {
        "main": (setup.tokens, setup.sample),
        "all": (setup.tokens, setup.tokens),
        "all-524288": (524_288, 524_288),
        "all-524288-statistics": (524_288, 524_288),
    }
    assert plans["all-524288-statistics"][0].setup.statistics_tokens == 524_288
    every = [task for tasks in plans.values() for task in tasks]
    assert len({task.folder for task in every}) == len(every) == 8
    measured = [(task.seed, cell) for task in every for cell in task.cells]
    # REAP and two of ours are measured without refit as well, NAEE without alone.
    assert len(set(measured)) == len(measured) == 2 * len(RATIOS) * (2 + len(OURS) + 2 + 1)
    assert held(every[0]) == {"original": None, "cells": []}


@pytest.mark.slow
def test_the_quick_run_goes_on_where_it_ended(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks.quality", "--quick", "--out", str(tmp_path)]
    found = []
    for _ in range(2):
        done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/cells/*.json")}
        found.append((json.loads(done.stdout.splitlines()[-1]), times))
    assert found[0] == found[1]
    figures = found[0][0]
    # A reduced model that is written or opened wrongly is far from this on so easy a model.
    assert 0 < figures["default_over_best_other"]["50 %"] < 1
    assert len(figures["rows"]) == 6
