"""A run folder belongs to one run: foreign files and changed inputs are refused, untouched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.config import RunConfig
from orchestrator.errors import RunFolderError
from orchestrator.load import load
from orchestrator.run_folder import MAIN, RunFolder, check, claim, settled, versions
from tests.orchestrator.tiny_run import Command, Inputs, snapshot

MODEL = "f" * 64


def config(**changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "run_dir": "runs/x",
        "model": {"path": "somewhere"},
        "calibrate": {"data": {"sources": [{"path": "text.txt"}]}},
        "group": {"method": "mc_smoe", "budget": {"keep_ratio": 0.5}},
    }
    return RunConfig.model_validate(values | changes)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def refusal(folder: RunFolder, wanted: RunConfig, model: str = MODEL) -> str:
    """The same message from `check` and `claim`, and an unchanged folder."""
    before = snapshot(folder.root)
    with pytest.raises(RunFolderError) as checked:
        check(folder, wanted, model)
    with pytest.raises(RunFolderError) as claimed:
        claim(folder, wanted, model)
    assert snapshot(folder.root) == before
    assert str(checked.value) == str(claimed.value)
    return str(checked.value)


# Claiming -----------------------------------------------------------------------------------------


def test_checking_a_folder_that_is_not_there_writes_nothing(folder: RunFolder) -> None:
    assert check(folder, config(), MODEL) is False
    assert not folder.root.exists()


def test_claiming_writes_what_the_run_is(folder: RunFolder) -> None:
    claim(folder, config(), MODEL)
    assert set(snapshot(folder.root)) == {"run.json", "config.yaml"}
    assert yaml.safe_load(folder.config.read_text()) == config().model_dump(mode="json")
    assert check(folder, config(), MODEL) is True


def test_the_config_that_is_kept_can_be_run_again(folder: RunFolder) -> None:
    claim(folder, config(), MODEL)
    assert load(str(folder.config)).config == config()


def test_claiming_again_changes_nothing(folder: RunFolder) -> None:
    claim(folder, config(), MODEL)
    before = snapshot(folder.root)
    claim(folder, config(), MODEL)
    assert snapshot(folder.root) == before


def test_an_empty_folder_is_taken(folder: RunFolder) -> None:
    folder.root.mkdir()
    claim(folder, config(), MODEL)
    assert folder.identity.exists()


def test_a_folder_whose_claim_was_killed_is_taken(folder: RunFolder) -> None:
    folder.root.mkdir()
    folder.config.write_text("half")
    (folder.root / ".run.json.123.tmp").write_text("half")
    claim(folder, config(), MODEL)
    assert check(folder, config(), MODEL) is True


# Refusing -----------------------------------------------------------------------------------------


def test_a_folder_with_foreign_files_is_refused_by_name(folder: RunFolder) -> None:
    (folder.root / "photos").mkdir(parents=True)
    (folder.root / "thesis.tex").write_text("mine")
    message = refusal(folder, config())
    assert "is not empty and holds no run: photos, thesis.tex" in message
    assert "choose another `run_dir`" in message


def test_a_file_in_place_of_the_folder_is_refused(folder: RunFolder) -> None:
    folder.root.write_text("mine")
    assert "is not a folder" in refusal(folder, config())


@pytest.mark.parametrize("content", ["{", "[1]", "7", ""])
def test_a_damaged_identity_is_refused(folder: RunFolder, content: str) -> None:
    folder.root.mkdir()
    folder.identity.write_text(content)
    assert "run.json is damaged" in refusal(folder, config())


def test_another_config_is_refused_with_key_and_both_values(folder: RunFolder) -> None:
    claim(folder, config(), MODEL)
    other = config(group={"method": "mc_smoe", "budget": {"keep_ratio": 0.25}})
    message = refusal(folder, other)
    assert "config.group.budget.keep_ratio was 0.5, is 0.25" in message
    assert "choose another `run_dir`" in message


def test_every_key_that_differs_is_named(folder: RunFolder) -> None:
    claim(folder, config(), MODEL)
    message = refusal(folder, config(group={"method": "reap"}, align={"enabled": False}))
    assert 'config.group.method was "mc_smoe", is "reap"' in message
    assert "config.align.enabled was true, is false" in message


def test_another_model_is_refused_with_both_fingerprints(folder: RunFolder) -> None:
    claim(folder, config(), "a" * 64)
    message = refusal(folder, config(), "b" * 64)
    assert f'model was "{"a" * 40}' in message
    assert f'is "{"b" * 40}' in message


def test_how_many_threads_compute_is_part_of_the_run(folder: RunFolder) -> None:
    claim(folder, config(), MODEL)
    message = refusal(folder, config(executor={"threads_per_unit": 2}))
    assert "config.threads_per_unit was 1, is 2" in message


@pytest.mark.parametrize("executor", [{"kind": "local"}, {"workers": 3}, {"address": "auto"}])
def test_where_units_run_is_no_part_of_the_run(
    folder: RunFolder, executor: dict[str, object]
) -> None:
    claim(folder, config(), MODEL)
    assert check(folder, config(executor=executor), MODEL) is True


def test_a_run_folder_may_be_moved(folder: RunFolder, tmp_path: Path) -> None:
    claim(folder, config(), MODEL)
    moved = folder.root.rename(tmp_path / "elsewhere")
    assert check(RunFolder(moved), config(run_dir=str(moved)), MODEL) is True


def test_the_settled_config_names_no_place(folder: RunFolder) -> None:
    assert not {"run_dir", "executor"} & set(settled(config()))


def test_versions_name_the_libraries_that_results_depend_on() -> None:
    found = versions()
    assert {"python", "torch", "transformers"} <= set(found)
    assert "unknown" not in found.values()


# Names --------------------------------------------------------------------------------------------


def test_baselines_have_folders_of_their_own(folder: RunFolder) -> None:
    assert folder.output(MAIN) == folder.root / "output"
    assert folder.output("reap") == folder.root / "baselines" / "reap" / "output"
    assert folder.decision("reap").parent == folder.layers("reap").parent


# On the command line ------------------------------------------------------------------------------


def test_run_refuses_a_folder_with_foreign_files_and_leaves_it_alone(
    coalesce: Command, inputs: Inputs
) -> None:
    inputs.run_dir.mkdir()
    (inputs.run_dir / "thesis.tex").write_text("mine")
    recipe = inputs.recipe()
    before = snapshot(inputs.root)
    outcome = coalesce("run", recipe)
    assert outcome.code == 2
    assert "holds no run: thesis.tex" in outcome.err
    assert snapshot(inputs.root) == before


@pytest.mark.slow
def test_run_refuses_the_folder_of_another_run_and_leaves_it_alone(
    coalesce: Command, inputs: Inputs, finished: Inputs
) -> None:
    recipe = inputs.recipe(run_dir=str(finished.run_dir))
    before = snapshot(finished.run_dir)
    inputs.change_weights(lambda tensors: tensors["lm_head.weight"].add_(1))
    outcome = coalesce("run", recipe, "group.budget.keep_ratio=0.25")
    assert outcome.code == 2
    assert "config.group.budget.keep_ratio was 0.5, is 0.25" in outcome.err
    assert "config.model.path was" in outcome.err
    assert "; model was " in outcome.err
    assert snapshot(finished.run_dir) == before
