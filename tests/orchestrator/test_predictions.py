"""Predicted errors in a whole run: against the real experts on the real sample."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pytest
import torch

from models.arrow import read_table
from models.expert_function import activation, activations, output
from models.moe import MoeCheckpoint
from orchestrator import samples
from orchestrator.load import load
from orchestrator.predictions import sampled_sums
from orchestrator.preflight import prepare
from orchestrator.run import _settle
from orchestrator.run_folder import MAIN, RunFolder
from stages.group.decision import from_labels, from_table
from stages.group.predict import predicted_error
from stages.inputs.read import LayerInputs
from stages.refit.layer import target_of
from tests.orchestrator.tiny_run import EXPERTS, LAYERS, Inputs


def test_dropped_and_averaged_experts_cost_what_was_predicted(finished: Inputs) -> None:
    run = prepare(load(str(finished.recipe())).config)
    sums = sampled_sums(run.config, None, run.folder, run.moe)
    paths = samples.layer_inputs(run.folder, run.config.calibrate, run.moe)
    for layer in range(LAYERS):
        inputs = LayerInputs.read(paths[layer])
        made, gates = outputs_of(run.moe, inputs), inputs.dense_gates()
        dropped = from_labels(layer, [0, None, 2, None, None, 5, 6, 7], [1 / EXPERTS] * EXPERTS)
        merged = from_labels(layer, [0, 1, 2, 2, 4, 5, 6, 7], [1, 1, 0.3, 0.7, 1, 1, 1, 1])
        mean = 0.3 * made[2] + 0.7 * made[3]
        for decision, after in (
            (dropped, [None if g is None else made[e] for e, g in enumerate(dropped.group)]),
            (merged, [mean if e in (2, 3) else made[e] for e in range(EXPERTS)]),
        ):
            target = target_of(run.moe, inputs)
            kept = [gates[:, e, None] * f for e, f in enumerate(after) if f is not None]
            expected = float((target - sum(kept)).square().sum() / target.square().sum())
            found = predicted_error(sums[layer], decision)
            assert found == pytest.approx(expected, rel=1e-5)


@torch.inference_mode()
def outputs_of(moe: MoeCheckpoint, inputs: LayerInputs) -> list[torch.Tensor]:
    act, x = activation(moe.checkpoint.config), inputs.hidden.float()
    experts = moe.read_experts(inputs.layer, list(range(EXPERTS)))
    return [output(each, activations(each, x, act)).double() for each in experts]


def test_the_decision_table_of_a_run_holds_them(finished: Inputs) -> None:
    run = prepare(load(str(finished.recipe())).config)
    table = read_table(run.folder.decision(MAIN))
    sums = sampled_sums(run.config, None, run.folder, run.moe)
    for decision in from_table(table):
        rows = [row for row in table.to_pylist() if row["layer"] == decision.layer]
        total = sum(row["predicted_error"] for row in rows)
        assert total == pytest.approx(predicted_error(sums[decision.layer], decision))
        assert 0 < total < 2


def test_predictions_that_became_possible_later_replace_none(
    finished: Inputs, tmp_path_factory: pytest.TempPathFactory
) -> None:
    table = read_table(RunFolder(finished.run_dir).decision(MAIN))
    empty = table.set_column(
        table.column_names.index("predicted_error"),
        table.schema.field("predicted_error"),
        pa.nulls(table.num_rows, pa.float64()),
    )
    path = tmp_path_factory.mktemp("settled") / "decision.arrow"
    _settle(path, empty)
    assert _settle(path, table, free=["predicted_error"]).equals(table)
    assert read_table(path).equals(table, check_metadata=True)


def test_without_sums_of_all_experts_nothing_is_predicted(finished: Inputs) -> None:
    run = prepare(load(str(finished.recipe())).config)
    nowhere = replace(run.folder, root=run.folder.root / "nowhere")
    assert sampled_sums(run.config, None, nowhere, run.moe) == {}
