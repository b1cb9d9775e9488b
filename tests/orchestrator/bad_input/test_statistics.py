"""Statistics that are damaged or of another model; and those that fit."""

from __future__ import annotations

import json
import shutil

import pytest

from orchestrator.load import load
from orchestrator.preflight import prepare
from stages.calibrate.statistics import metadata_of, read_statistics
from stages.corpus.stage import tokenizer_digest
from tests.orchestrator.refusals import assert_refused
from tests.orchestrator.tiny_run import (
    Command,
    Inputs,
)


def test_statistics_that_are_not_there_are_refused(coalesce: Command, inputs: Inputs) -> None:
    recipe = inputs.recipe(calibrate__statistics=str(inputs.root / "no.arrow"))
    assert_refused(coalesce, inputs, recipe, "cannot read statistics from", "no.arrow")


def test_a_table_of_something_else_is_refused(coalesce: Command, inputs: Inputs) -> None:
    import pyarrow as pa

    from models.arrow import write_table

    path = inputs.root / "other.arrow"
    write_table(path, pa.table({"domain": ["prose"]}))
    recipe = inputs.recipe(calibrate__statistics=str(path))
    assert_refused(coalesce, inputs, recipe, "is no statistics table: it lacks tokens")


def test_statistics_of_another_model_are_refused_with_both_fingerprints(
    coalesce: Command, inputs: Inputs, finished: Inputs
) -> None:
    inputs.change_weights(lambda tensors: tensors["lm_head.weight"].add_(1))
    recipe = inputs.recipe(calibrate__statistics=str(finished.run_dir / "statistics.arrow"))
    ours = prepare(load(str(inputs.recipe())).config).model
    theirs = json.loads((finished.run_dir / "run.json").read_text())["model"]
    recipe = inputs.recipe(calibrate__statistics=str(finished.run_dir / "statistics.arrow"))
    assert_refused(coalesce, inputs, recipe, "another model", ours[:12], theirs[:12])


def test_statistics_of_another_tokenizer_are_refused_with_both_fingerprints(
    coalesce: Command, inputs: Inputs, finished: Inputs
) -> None:
    path = inputs.model / "tokenizer.json"
    path.write_text(path.read_text().replace('"word7"', '"another"'))
    ours = tokenizer_digest(inputs.model)
    theirs = metadata_of(read_statistics(finished.run_dir / "statistics.arrow"))["tokenizer"]
    recipe = inputs.recipe(calibrate__statistics=str(finished.run_dir / "statistics.arrow"))
    assert_refused(coalesce, inputs, recipe, "another tokenizer", ours[:12], theirs[:12])


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_damaged_statistics_are_refused(
    coalesce: Command, inputs: Inputs, finished: Inputs, damage: str
) -> None:
    path = inputs.root / "statistics.arrow"
    for name in (path.name, f"{path.name}.json"):
        shutil.copyfile(finished.run_dir / name, inputs.root / name)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle] ^= 0xFF
    path.write_bytes(data[:middle] if damage == "cut" else data)
    recipe = inputs.recipe(calibrate__statistics=str(path))
    assert_refused(coalesce, inputs, recipe, str(path))


@pytest.mark.slow
def test_statistics_of_another_run_lead_to_the_same_decision(
    coalesce: Command, inputs: Inputs, finished: Inputs
) -> None:
    recipe = inputs.recipe(calibrate__statistics=str(finished.run_dir / "statistics.arrow"))
    assert coalesce("run", recipe, "--quiet").code == 0
    decisions = [i.run_dir / "decision.arrow" for i in (inputs, finished)]
    assert decisions[0].read_bytes() == decisions[1].read_bytes()
    assert not (inputs.run_dir / "calibration").exists()
