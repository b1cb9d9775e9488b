"""One threshold of S over all layers through the whole job: planned, resumed, refused early."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import transformers

from models.arrow import read_table
from models.mapped.registration import register
from stages.compress.scores import read_curves
from tests.orchestrator.test_compression import SMALL, weights_of
from tests.orchestrator.tiny_run import Command, Inputs
from tests.tiny import logits_of, random_ids

GLOBAL = {"rank": 3, "sparse": 0.25, "threshold": "global", "multiple": 1}


def rows_of(inputs: Inputs) -> dict[int, dict[str, int]]:
    found: dict[int, dict[str, int]] = {}
    for row in read_table(inputs.run_dir / "threshold.arrow").to_pylist():
        found.setdefault(row["layer"], {})[row["matrix"]] = row["rows"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"importance": "activations", "whiten": True}])
def test_layers_keep_what_one_threshold_leaves_them(
    coalesce: Command, inputs: Inputs, more: dict[str, Any]
) -> None:
    """The bytes are those of the even division, to within a row; the files have what was
    predicted from the decision."""
    changes = SMALL | {"compress": GLOBAL | more}
    outcome = coalesce("run", inputs.recipe(**changes), "--quiet")

    assert outcome.code == 0, outcome.err
    rows = rows_of(inputs)
    curves = [
        curve
        for path in sorted((inputs.run_dir / "threshold").glob("*.arrow"))
        for curve in read_curves(path)
    ]
    budget = sum(each.even * each.row_bytes for each in curves)
    taken = sum(rows[each.layer][each.matrix] * each.row_bytes for each in curves)
    assert budget - min(each.row_bytes for each in curves) < taken <= budget
    config = json.loads((inputs.run_dir / "output" / "config.json").read_text())
    assert config["expert_factors"] == {
        str(layer): {f"{name}_proj": [3, n] for name, n in each.items()}
        for layer, each in rows.items()
    }
    report = json.loads((inputs.run_dir / "report" / "report.json").read_text())
    assert weights_of(inputs) == report["bytes"]["after"] == report["bytes"]["predicted"]
    register()
    model = transformers.AutoModelForCausalLM.from_pretrained(inputs.run_dir / "output")
    assert logits_of(model, random_ids(2, 6)).isfinite().all()


@pytest.mark.slow
def test_a_resumed_run_decides_the_same_and_writes_the_same_bytes(
    coalesce: Command, inputs: Inputs
) -> None:
    recipe = inputs.recipe(**SMALL | {"compress": GLOBAL})
    assert coalesce("run", recipe, "--quiet").code == 0
    kept = [inputs.run_dir / "threshold.arrow", *(inputs.run_dir / "layers").glob("*.safetensors")]
    before = {path: path.read_bytes() for path in kept}
    shutil.rmtree(inputs.run_dir / "layers")
    shutil.rmtree(inputs.run_dir / "output")
    (inputs.run_dir / "output.json").unlink()
    (inputs.run_dir / "threshold" / "layer-00001.arrow").unlink()

    outcome = coalesce("run", recipe, "--quiet")

    assert outcome.code == 0, outcome.err
    assert {path: path.read_bytes() for path in kept} == before


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"compress": GLOBAL | {"sparse": 0.0}}, "sparse=0 keeps the same of every one"),
        ({"compress": GLOBAL | {"sparse": 1.0}}, "sparse=1 keeps the same of every one"),
        (
            {"compress": GLOBAL | {"importance": "activations"}, "calibrate__sample": None},
            "compress needs a sample of what enters the layers",
        ),
        ({"compress": GLOBAL | {"numbers": {0: {"up": 3}}}}, "is decided by compress.threshold"),
        (
            {"compress": GLOBAL, "group__budget": {"target_bytes": 90_000}},
            "decides the last bytes after the layers were looked at",
        ),
        (
            {"compress": GLOBAL | {"threshold": "model"}},
            "'model' is not possible; valid: layer, global",
        ),
    ],
    ids=["nothing", "everything", "no scores", "numbers", "budget", "word"],
)
def test_what_cannot_be_divided_is_refused_before_anything_is_written(
    coalesce: Command, inputs: Inputs, changes: dict[str, Any], cause: str
) -> None:
    outcome = coalesce("run", inputs.recipe(**(SMALL | changes)), "--quiet")

    assert outcome.code not in (0, None) and cause in " ".join(outcome.err.split())
    assert not inputs.run_dir.exists()


def test_the_plan_shows_the_stage(coalesce: Command, inputs: Inputs) -> None:
    found = coalesce("plan", inputs.recipe(**SMALL | {"compress": GLOBAL}))

    assert found.code == 0, found.err
    assert "threshold" in found.out and "about" in found.out
