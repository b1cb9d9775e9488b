"""The UNCURL benchmark: its pure parts, its smallest form, and what its file of results bears out.

Asserted is only what small models are known to show; which grouping wins is reported, not asserted.
"""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import OlmoeConfig, OlmoeForCausalLM

from benchmarks.uncurl.build import sections
from benchmarks.uncurl.cells import PLAIN, TWO_STAGE, Cell, cells
from benchmarks.uncurl.planted import adjusted_rand, clone
from benchmarks.uncurl.recipes import GROUPINGS, RECIPES, ROUTERS, SCRATCH
from benchmarks.uncurl.setup import Setup, quick
from benchmarks.uncurl.summary import differences, largest_safe, mean, rows_of, safe_factors, spread
from models.errors import CheckpointError
from models.mapped.registration import register
from models.moe import MoeCheckpoint
from orchestrator.config import RunConfig
from stages.export.config import ExportConfig
from stages.group.config import Uncurl
from stages.group.methods.uncurl import decide
from tests.tiny import PROPERTY, compress, logits_of, open_model, random_ids, statistics_of

REPOSITORY = Path(__file__).resolve().parents[2]
LABELS = st.lists(st.integers(0, 3), min_size=2, max_size=12)


def tiny(folder: Path, top_k: int = 1) -> Path:
    """A random OLMoE of three experts whose gates are shares of the softmax."""
    torch.manual_seed(3)
    config = OlmoeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=3,
        num_experts_per_tok=top_k,
        norm_topk_prob=False,
        initializer_range=0.3,
    )
    OlmoeForCausalLM(config).save_pretrained(folder)
    return folder


def row(experts: int, kept: int, recipe: str, tuned: float) -> tuple[Cell, dict[str, Any]]:
    return Cell(0, experts, kept, recipe, "code", TWO_STAGE), {"losses": {"tuned": {"code": tuned}}}


def test_copied_experts_leave_the_function_as_it_is_and_noise_moves_it(tmp_path: Path) -> None:
    source, ids = tiny(tmp_path / "source"), random_ids(4, 12)
    clone(source, tmp_path / "same", copies=4, noise=0.0, seed=0)
    clone(source, tmp_path / "noisy", copies=4, noise=0.5, seed=0)

    same, noisy = open_model(tmp_path / "same"), open_model(tmp_path / "noisy")

    assert same.config.num_experts == 12
    before = logits_of(open_model(source), ids)
    torch.testing.assert_close(logits_of(same, ids), before, rtol=0, atol=1e-5)
    assert (logits_of(noisy, ids) - before).abs().max() > 0.01
    rows = same.model.layers[0].mlp.experts.down_proj.detach()  # [E, H, F]
    assert not rows[0].equal(rows[3])
    assert rows[0].sort(dim=1).values.equal(rows[3].sort(dim=1).values)


def test_copies_are_found_and_merged_without_loss_but_only_if_aligned(tmp_path: Path) -> None:
    """E-U4 of the plan of experiments: the strongest evidence that all steps fit together."""
    source, ids = tiny(tmp_path / "source"), random_ids(8, 24)
    clone(source, tmp_path / "copied", copies=4, noise=1e-5, seed=0)
    model = open_model(tmp_path / "copied")
    with torch.inference_mode():
        seen = model(input_ids=ids, output_router_logits=True).router_logits  # [T, E] each
    layers = [
        statistics_of(layer, torch.bincount(each.argmax(1), minlength=12).tolist(), each.numpy())
        for layer, each in enumerate(seen)
    ]
    decisions = decide(Uncurl(), layers, 6)
    before = logits_of(open_model(source), ids)

    def apart(name: str, aligned: bool) -> float:
        moe, folder = MoeCheckpoint.open(tmp_path / "copied"), tmp_path / name
        folder.mkdir()
        export = ExportConfig(format="mapped")
        register()
        made = open_model(compress(moe, decisions, folder, export, aligned=aligned))
        return float((logits_of(made, ids) - before).abs().max() / before.abs().max())

    assert [adjusted_rand(d.group, [0, 1, 2] * 4) for d in decisions] == [1.0, 1.0]
    assert apart("aligned", True) < 2e-3
    assert apart("not aligned", False) > 0.05


def test_copies_of_experts_that_share_a_token_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="2 experts"):
        clone(tiny(tmp_path / "source", top_k=2), tmp_path / "copied", 4, 0.0, 0)


@PROPERTY
@given(labels=LABELS, names=st.permutations(range(4)))
def test_the_rand_index_of_a_partition_with_itself_is_one(
    labels: list[int], names: list[int]
) -> None:
    assert adjusted_rand(labels, [names[label] for label in labels]) == pytest.approx(1)


def test_the_rand_index_is_zero_on_average() -> None:
    fixed = (0, 0, 1, 1, 2)
    found = [adjusted_rand(fixed, each) for each in permutations((0, 0, 0, 1, 1))]
    assert sum(found) / len(found) == pytest.approx(0, abs=1e-12)
    assert min(found) < -0.1 < 0.1 < max(found)


@pytest.mark.parametrize(
    ("gaps", "margin", "expected"),
    [
        ({2: -0.1, 4: 0.3, 8: 0.4}, 0.0, 2),
        ({2: 0.1, 4: -0.3}, 0.0, 1),
        ({8: 0.05, 2: 0.0, 4: 0.02}, 0.02, 4),
        ({2: -1.0, 4: -1.0}, 0.0, 4),
        ({}, 0.0, 1),
    ],
)
def test_a_factor_is_safe_only_if_all_smaller_ones_are(
    gaps: dict[int, float], margin: float, expected: int
) -> None:
    assert largest_safe(gaps, margin) == expected


def test_a_reduced_model_is_compared_with_one_that_was_trained_as_small() -> None:
    found = [
        row(4, 4, SCRATCH, 2.0),
        row(8, 8, SCRATCH, 1.5),
        row(8, 4, "uncurl, paper", 1.9),
        row(16, 8, "uncurl, paper", 1.6),
        row(16, 4, "uncurl, paper", 1.7),
    ]

    made = {each["experts"]: each for each in safe_factors(rows_of(found), "code")}

    assert made[8]["gaps"] == {"2": -0.1} and made[8]["safe"]["0.0"] == 2
    assert made[16]["gaps"] == {"2": 0.1, "4": -0.3} and made[16]["safe"]["0.0"] == 1


def test_seeds_of_one_cell_become_one_row() -> None:
    rows = rows_of(
        (Cell(seed, 8, 4, "uncurl", "code"), {"losses": {"before": {"code": float(seed)}}})
        for seed in (1, 3)
    )
    assert len(rows) == 1 and rows[0]["seeds"] == [1, 3]
    values = rows[0]["losses"]["before"]["code"]
    assert values == {"1": 1.0, "3": 3.0}
    assert (mean(values), spread(values)) == (2.0, 1.0)
    assert differences(values, {"3": 1.0}) == {"3": 2.0}
    assert spread({"1": 1.0}) is None


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_a_config(recipe: str) -> None:
    cell = Cell(5, 8, 4, recipe, "legal")
    base = {"run_dir": "run", "model": {"path": "model"}}
    text = {"data": {"sources": [{"path": "text.jsonl"}], "tokens": 8}}

    config = RunConfig.model_validate(base | {"calibrate": text} | sections(cell))

    assert config.group.task == {"legal": 1.0} and config.group.budget.experts_per_layer == 4
    assert (config.export.router == "reinit") == (recipe == "uncurl, paper")
    assert (config.export.format == "native") == (config.group.prunes or recipe in ROUTERS) or (
        recipe == "uncurl, remapped"
    )
    assert config.align.enabled == ("not aligned" not in recipe)


def test_cells_are_told_apart_by_their_files_and_every_seed_has_the_same() -> None:
    found = cells(Setup(Path("out")))

    assert len({cell.slug for cell in found}) == len(found)
    of = {seed: {c.slug[1:] for c in found if c.seed == seed} for seed in (0, 1)}
    assert of[0] == of[1]
    assert {c.recipe for c in found if c.tuning == PLAIN} == {SCRATCH, *GROUPINGS}
    assert all(c.experts > c.kept for c in found if c.recipe != SCRATCH)


@pytest.mark.slow
def test_the_smallest_form_measures_everything_and_goes_on_where_it_ended(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks.uncurl", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])

    expected = {cell.slug for cell in cells(quick(Setup(tmp_path)))}
    assert {path.stem for path in (tmp_path / "cells").glob("*.json")} == expected | {"planted-0"}
    planted = found["planted"][0]
    assert planted["uncurl, diagonal kept"]["adjusted_rand"] == [1.0, 1.0]
    for task, loss in planted["original"]["losses"].items():
        assert planted["uncurl, diagonal kept"]["losses"][task] == pytest.approx(loss, abs=1e-4)
    held = subprocess.run([*words, "--held"], cwd=REPOSITORY, capture_output=True, text=True)
    assert json.loads(held.stdout.splitlines()[-1]) == found
