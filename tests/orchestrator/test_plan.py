"""What a plan promises is what a run writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from orchestrator import disk, preflight
from orchestrator.estimate import human
from orchestrator.load import load
from orchestrator.plan import Row, rows, summary
from orchestrator.preflight import Prepared, prepare
from orchestrator.run_folder import MAIN
from tests.orchestrator.tiny_run import Command, Inputs, snapshot


def prepared(inputs: Inputs, *overrides: str) -> Prepared:
    return prepare(load(str(inputs.recipe()), overrides).config)


def by_stage(run: Prepared) -> dict[str, Row]:
    return {row.stage: row for row in rows(run)}


def predicted_bytes(run: Prepared) -> int:
    return sum(each.file_bytes for each in preflight.expected_layouts(run.variants[0], run.moe))


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def held_out(inputs: Inputs, *baselines: str) -> str:
    source = f"{{path: {inputs.text}, domain: prose}}"
    data = f"{{sources: [{source}], tokens: 64, sequence_length: 16}}"
    return f"evaluate={{data: {data}, baselines: [{', '.join(baselines)}], kl_positions: 10}}"


# Before a run -------------------------------------------------------------------------------------


def test_a_plan_counts_the_units_of_every_stage(inputs: Inputs) -> None:
    units = {stage: row.units for stage, row in by_stage(prepared(inputs)).items()}
    observed = {"verify": 1, "corpus": 1, "calibrate": 2, "inputs": 2, "subsample": 2}
    assert units == observed | {"transform": 3, "export": 1}


def test_nothing_is_done_before_the_first_run(inputs: Inputs) -> None:
    assert not any(row.done for row in rows(prepared(inputs)))


def test_baselines_and_evaluation_add_their_units(inputs: Inputs) -> None:
    found = by_stage(prepared(inputs, held_out(inputs, "frequency", "reap")))
    assert found["corpus"].units == 2
    assert (found["transform"].units, found["export"].units) == (9, 3)
    assert found["evaluate"].units == 4  # the original, ours, two baselines
    assert found["evaluate"].written_bytes == 10 * 64 * 4


def test_given_statistics_leave_nothing_to_calibrate(inputs: Inputs, finished: Inputs) -> None:
    word = f"calibrate.statistics={finished.run_dir / 'statistics.arrow'}"
    found = by_stage(prepared(inputs, word))
    assert (found["corpus"].units, found["calibrate"].units) == (0, 0)


def test_headers_alone_are_verified_without_units(inputs: Inputs) -> None:
    assert by_stage(prepared(inputs, "model.verify=headers"))["verify"].units == 0


def test_planning_writes_nothing(coalesce: Command, inputs: Inputs) -> None:
    recipe = inputs.recipe()
    before = snapshot(inputs.root)
    assert coalesce("plan", recipe).code == 0
    assert snapshot(inputs.root) == before


def test_the_summary_has_both_sizes_and_the_exact_number_of_bytes(inputs: Inputs) -> None:
    run = prepared(inputs)
    text = summary(run)
    assert f"exactly {predicted_bytes(run):,} bytes of weights" in text
    assert f"{human(inputs.weights.stat().st_size)} -> {human(predicted_bytes(run))}" in text
    assert "2 MoE layers of 8 experts, top-2" in text


def test_the_disk_that_is_needed_includes_baselines(inputs: Inputs) -> None:
    without = prepared(inputs, "calibrate.sample=null")
    reap = held_out(inputs, "reap")
    compared = disk.disk_bytes(prepared(inputs, "calibrate.sample=null", reap))
    tokenizer = sum(path.stat().st_size for path in inputs.model.glob("tokenizer*"))
    assert disk.model_bytes(without) >= predicted_bytes(without) + tokenizer
    assert compared == disk.disk_bytes(without) + disk.model_bytes(without) + 10 * 64 * 4 + 64 * 4


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_500_000, "2.5 MB"), (7e12, "7.0 TB")],
)
def test_bytes_are_shown_in_decimal_units(count: float, text: str) -> None:
    assert human(count) == text


# Against what a run writes ------------------------------------------------------------------------


@pytest.mark.slow
def test_the_predicted_bytes_are_written_to_the_byte(finished: Inputs) -> None:
    written = weight_bytes(finished.run_dir / "output")
    assert written == predicted_bytes(prepared(finished))
    report = json.loads((finished.run_dir / "report" / "report.json").read_text())
    assert report["bytes"]["after"] == report["bytes"]["predicted"] == written
    assert report["bytes"]["before"] == finished.weights.stat().st_size


@pytest.mark.slow
def test_after_a_run_every_unit_is_done(finished: Inputs) -> None:
    for row in rows(prepared(finished)):
        assert row.done == row.units, row


@pytest.mark.slow
def test_a_unit_whose_file_is_gone_is_not_done(finished: Inputs, tmp_path: Path) -> None:
    shutil.copytree(finished.run_dir, tmp_path / "run")
    (tmp_path / "run" / "calibration" / "shards" / "shard-00001.arrow.json").unlink()
    (tmp_path / "run" / "layers" / "rest.safetensors.json").unlink()
    found = by_stage(prepared(finished, f"run_dir={tmp_path / 'run'}"))
    assert (found["calibrate"].done, found["transform"].done) == (1, 2)


@pytest.mark.slow
def test_a_size_in_bytes_is_kept_by_what_is_written(
    coalesce: Command, inputs: Inputs, finished: Inputs
) -> None:
    recipe = inputs.recipe(
        calibrate__statistics=str(finished.run_dir / "statistics.arrow"),
        export__format="mapped",
        group={"method": "mc_smoe", "scope": "global", "budget": {"target_bytes": 111_111}},
    )
    assert coalesce("run", recipe, "--quiet").code == 0
    run = prepare(load(str(recipe)).config)
    written = weight_bytes(run.folder.output(MAIN))
    assert written <= 111_111 < written + run.moe.expert_bytes(0) + 100
    report = json.loads((run.folder.report / "report.json").read_text())
    assert report["bytes"]["requested"] == 111_111
    assert abs(written - predicted_bytes(run)) <= 0.01 * written


def test_every_domain_of_a_source_is_a_unit_of_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    config = load("quickstart", [f"run_dir={tmp_path / 'run'}"]).config
    planned = {row.stage: row for row in rows(prepare(config))}
    # Five domains in one file; the original, the result and two baselines.
    assert planned["evaluate"].units == 5 * 4
