"""The preset `paper` of uncurl: the published protocol, or a refusal that names what differs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from orchestrator.config import RunConfig
from stages.group.config import Budget, Uncurl
from stages.group.methods.uncurl import decide
from tests.orchestrator.tiny_run import Command, Inputs, router
from tests.stages.group.observed import partition, random_layer
from tests.tiny import statistics_of


def config(**changes: Any) -> RunConfig:
    base = {
        "run_dir": "run",
        "model": {"path": "model"},
        "calibrate": {"data": {"sources": [{"path": "text.jsonl"}], "tokens": 8}},
        "group": {"method": "uncurl", "preset": "paper"},
    }
    return RunConfig.model_validate(base | changes)


def test_the_preset_draws_the_router_anew_and_survives_being_written_down() -> None:
    found = config()

    assert found.export.router == "reinit" and found.export.format == "native"
    assert RunConfig.model_validate(found.model_dump(mode="json")) == found
    assert config(group=Uncurl(preset="paper")).export.router == "reinit"
    assert config(export={"router_seed": 4}).export.router == "reinit"
    assert config(group={"method": "uncurl"}).export.router == "representative"
    assert config(group={"method": "mc_smoe", "preset": "paper"}).export.router == "representative"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"export": {"router": "mean"}}, "export.router=reinit"),
        ({"align": {"enabled": False}}, "align.enabled=true"),
        ({"align": {"by": "both"}}, "align.by=weights"),
        ({"align": {"reference": "highest_saliency"}}, "align.reference=method"),
        ({"merge": {"weights": "uniform"}}, "merge.weights=method"),
        ({"refit": {"enabled": True}}, "refit.enabled=auto"),
        ({"compress": {"preset": "paper"}}, "no section compress"),
        ({"export": {"format": "mapped"}}, "router=reinit needs format=native"),
    ],
)
def test_whatever_the_paper_does_not_do_is_refused_by_name(
    changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValidationError, match=named):
        config(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"grouping": "frequency_merge"},
        {"center_logits": "token"},
        {"protect_super_experts": True},
    ],
)
def test_another_grouping_is_not_the_papers(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="preset=paper has grouping=spectral"):
        Uncurl.model_validate({"preset": "paper"} | changes)


def test_what_the_paper_leaves_open_stays_open() -> None:
    layers = [random_layer(7, layer, layer=layer) for layer in (2, 3)]
    asked = Uncurl(preset="paper", budget=Budget(experts_per_layer=3))

    assert decide(asked, layers, 6) == decide(Uncurl(), layers, 6)
    for changes in ({"first_layer": "skip"}, {"zero_diagonal": True}, {"n_init": 3, "seed": 5}):
        assert Uncurl.model_validate({"preset": "paper"} | changes)


def test_planted_clusters_are_found_under_the_preset() -> None:
    generator = np.random.default_rng(0)
    labels = generator.permutation(np.arange(16) % 4)
    columns = generator.normal(size=(8, 4))[:, labels] + 0.05 * generator.normal(size=(8, 16))
    layer = statistics_of(0, [1] * 16, generator.normal(size=(64, 8)) @ columns)

    (found,) = decide(Uncurl(preset="paper"), [layer], 4)

    assert partition(found.group) == {frozenset(np.flatnonzero(labels == c)) for c in range(4)}


@pytest.mark.slow
def test_a_run_under_the_preset_writes_a_router_of_its_own(
    inputs: Inputs, coalesce: Command
) -> None:
    from safetensors.torch import load_file

    recipe = inputs.recipe(
        group={"method": "uncurl", "preset": "paper", "task": {"prose": 1}}, calibrate__sample=None
    )

    assert coalesce("run", recipe).code == 0

    files = (inputs.run_dir / "output").glob("*.safetensors")
    (rows,) = (found[router(0)] for found in map(load_file, files) if router(0) in found)
    original = load_file(inputs.weights)[router(0)]
    assert rows.shape == (4, original.shape[1])
    assert not any(row.equal(other) for row in rows for other in original)
