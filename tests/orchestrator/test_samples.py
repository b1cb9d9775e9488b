"""Sampled inputs in a whole run: promised sizes, resumed runs, and use by another run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from models.errors import CheckpointError
from orchestrator import disk, estimate, samples
from orchestrator.load import load
from orchestrator.plan import rows
from orchestrator.preflight import Prepared, prepare
from orchestrator.run import observe
from stages.errors import StatisticsError
from stages.inputs.read import LayerInputs
from stages.subsample.read import SubsampleStatistics
from tests.orchestrator.tiny_run import EXPERTS, HIDDEN, LAYERS, Command, Inputs

SAMPLED = 48


def prepared(inputs: Inputs, *overrides: str) -> Prepared:
    return prepare(load(str(inputs.recipe()), overrides).config)


@pytest.fixture(scope="module")
def seen(pristine: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A folder in which `coalesce calibrate` was run; to be read only."""
    root = tmp_path_factory.mktemp("seen") / "inputs"
    shutil.copytree(pristine.root, root)
    observe(prepared(Inputs(root)))
    return Inputs(root)


def reusing(inputs: Inputs, seen: Inputs, *overrides: str) -> Prepared:
    word = f"calibrate.statistics={seen.run_dir / 'statistics.arrow'}"
    return prepared(inputs, word, *overrides)


def used_by(run: Prepared) -> tuple[dict[int, Path], dict[int, Path]]:
    arguments = run.folder, run.config.calibrate, run.moe
    return samples.layer_inputs(*arguments), samples.subsamples(*arguments)


def test_calibrating_leaves_both_files_of_every_layer(seen: Inputs) -> None:
    inputs, sums = used_by(prepared(seen))
    assert list(inputs) == list(sums) == list(range(LAYERS))
    for layer in range(LAYERS):
        sample = LayerInputs.read(inputs[layer])
        assert sample.hidden.shape == (SAMPLED, HIDDEN) and sample.domains == ("prose",)
        total = SubsampleStatistics.read(sums[layer]).summed()
        assert total["sampled"].tolist() == [SAMPLED] * EXPERTS
        selected = [int((sample.ids == expert).sum()) for expert in range(EXPERTS)]
        assert total["sampled_selected"].tolist() == selected


def test_the_plan_promises_what_is_written(seen: Inputs) -> None:
    run = prepared(seen)
    found = {row.stage: row for row in rows(run)}
    for stage, folder in (("inputs", run.folder.inputs), ("subsample", run.folder.subsample)):
        row, files = found[stage], [p for p in folder.iterdir() if p.suffix != ".json"]
        assert row.units == row.done == len(files) == LAYERS
        written = sum(path.stat().st_size for path in files)
        # Headers and keys are not promised.
        assert row.written_bytes <= written <= row.written_bytes + 8192 * LAYERS
    without = disk.disk_bytes(prepared(seen, f"run_dir={seen.root / 'x'}", "calibrate.sample=null"))
    kept = disk.disk_bytes(run) - without
    assert kept == 2 * found["inputs"].written_bytes + found["subsample"].written_bytes


def test_a_sample_that_is_off_costs_nothing(inputs: Inputs) -> None:
    run = prepared(inputs, "calibrate.sample.tokens=0")
    assert not {"inputs", "subsample"} & {row.stage for row in rows(run)}
    assert used_by(run) == ({}, {})
    with_sample = prepared(inputs)
    difference = estimate.calibrate(with_sample, "resident") - estimate.calibrate(run, "resident")
    config = with_sample.config.calibrate
    assert difference == 2 * LAYERS * samples.layer_bytes(config, run.moe) // config.shards


def test_a_sample_is_never_larger_than_the_text(inputs: Inputs) -> None:
    run = prepared(inputs, "calibrate.sample.tokens=1000000")
    assert samples.sampled_tokens(run.config.calibrate, run.moe) == 512


def test_large_outputs_are_counted_as_scratch(inputs: Inputs) -> None:
    run = prepared(inputs, "calibrate.data.tokens=1000000", "calibrate.sample.tokens=1000000")
    config = run.config.calibrate
    assert samples.scratch_bytes(config, run.moe) == 0  # 32,768 tokens of them are evaluated
    wide = prepared(
        inputs,
        "calibrate.data.tokens=1000000",
        "calibrate.sample.tokens=1000000",
        "calibrate.sample.statistics_tokens=1000000",
    )
    config = wide.config.calibrate
    assert samples.scratch_bytes(config, run.moe) == 4 * 10**6 * EXPERTS * HIDDEN
    assert samples.scratch_bytes(prepared(inputs).config.calibrate, run.moe) == 0


def test_sums_can_be_asked_for_later(inputs: Inputs) -> None:
    observe(prepared(inputs, "calibrate.sample.statistics=false"))
    run = prepared(inputs)
    assert len(used_by(run)[0]) == LAYERS and not run.folder.subsample.exists()
    before = {path: path.stat().st_mtime_ns for path in run.folder.inputs.iterdir()}

    observe(run)

    assert len(used_by(run)[1]) == LAYERS
    assert {path: path.stat().st_mtime_ns for path in run.folder.inputs.iterdir()} == before


def test_sums_of_part_of_a_sample_are_those_of_a_sample_of_that_size(inputs: Inputs) -> None:
    """Two domains, of which one has three times as much text."""
    text = {"path": str(inputs.text)}
    domains = [{**text, "domain": "much", "weight": 3.0}, {**text, "domain": "some"}]
    found = []
    for name, words in (
        ("few", ["calibrate.sample.tokens=50"]),
        ("part", ["calibrate.sample.tokens=512", "calibrate.sample.statistics_tokens=50"]),
        ("more", ["calibrate.sample.tokens=512", "calibrate.sample.statistics_tokens=60"]),
    ):
        recipe = inputs.recipe(calibrate__data__sources=domains, run_dir=str(inputs.root / name))
        run = prepare(load(str(recipe), words).config)
        observe(run)
        files = used_by(run)[1]
        found.append([path.read_bytes() for path in files.values()])
    assert found[0] == found[1] != found[2]


# Used by another run ------------------------------------------------------------------------------


def test_the_sample_of_another_run_is_found_beside_its_statistics(
    inputs: Inputs, seen: Inputs
) -> None:
    run = reusing(inputs, seen)
    assert used_by(run) == used_by(prepared(seen))
    assert not {"inputs", "subsample"} & {row.stage for row in rows(run)}


def test_a_table_alone_has_no_sample(inputs: Inputs, seen: Inputs, tmp_path: Path) -> None:
    shutil.copy(seen.run_dir / "statistics.arrow", tmp_path / "statistics.arrow")
    run = prepared(inputs, f"calibrate.statistics={tmp_path / 'statistics.arrow'}")
    assert used_by(run) == ({}, {})


def test_inputs_that_were_not_observed_with_the_statistics_are_refused(
    inputs: Inputs, seen: Inputs, tmp_path: Path
) -> None:
    other = Inputs(tmp_path / "other")
    shutil.copytree(seen.root, other.root)
    shutil.rmtree(other.run_dir)
    observe(prepared(other, "calibrate.data.seed=5", "calibrate.data.tokens=256"))
    for folder in ("inputs", "subsample"):
        shutil.copytree(
            seen.run_dir / "calibration" / folder,
            other.run_dir / "calibration" / folder,
            dirs_exist_ok=True,
        )
    with pytest.raises(StatisticsError, match="were not observed together"):
        reusing(inputs, other)


# Refused ------------------------------------------------------------------------------------------


def test_experts_that_cannot_be_evaluated_are_refused_before_anything_runs(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.expert_function.activation", lambda _: lambda _gate, up: up)
    with pytest.raises(CheckpointError, match="compute something else than down") as caught:
        observe(prepared(inputs))
    assert not (inputs.run_dir / "calibration" / "shards").exists()
    assert "set calibrate.sample.statistics=false" in caught.value.remedy
    observe(prepared(inputs, "calibrate.sample.statistics=false"))


@pytest.mark.parametrize("word", ["calibrate.sample.tokens=-1", "calibrate.sample.count=3"])
def test_a_sample_that_makes_no_sense_is_refused(
    coalesce: Command, inputs: Inputs, word: str
) -> None:
    outcome = coalesce("plan", inputs.recipe(), word)
    assert outcome.code == 2
    assert word.split("=")[0] in outcome.err
