"""The batch script: to the letter, whatever stands in paths, and without secrets."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import ConfigError
from orchestrator.load import validate
from orchestrator.slurm.config import SlurmConfig
from orchestrator.slurm.script import Places, log_option, refuse_secrets, render
from tests.orchestrator.slurm_script import GOLDEN, PLAIN, places
from tests.orchestrator.tiny_run import Command, Inputs, snapshot
from tests.tiny import PROPERTY

FOLDER = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", GOLDEN)
def test_a_script_is_the_one_that_was_read_and_found_good(name: str) -> None:
    assert render(*GOLDEN[name]) == (FOLDER / f"{name}.sbatch").read_text()


def words_of(script: str, program: str) -> list[str]:
    """What a shell hands to the launcher: the script is run with a stand-in for Python."""
    text = script.replace("exec ", "exec printf '%s\\0' ").replace("cd -- ", ": cd -- ")
    done = subprocess.run(["bash", "-c", text], capture_output=True, check=True)
    return [word.decode() for word in done.stdout.split(b"\0")[:-1]]


PRINTABLE = st.text(
    st.characters(blacklist_categories=("C",), blacklist_characters="/\\"), min_size=1, max_size=20
)


@PROPERTY
@given(PRINTABLE, PRINTABLE)
def test_a_shell_reads_any_path_as_it_was_written(run: str, python: str) -> None:
    where = Places(Path("/r", run), Path("/f", run), Path("/c", run), f"/p/{python}")
    words = words_of(render(PLAIN, where), python)
    assert words[0] == f"/p/{python}"
    assert words[words.index("--run") + 1] == str(where.run)
    assert str(where.config) in words


@pytest.mark.parametrize("letter", ["\n", "\r", "\t", "\0", "\x1b", "\\"])
@pytest.mark.parametrize("part", ["run", "folder"])
def test_paths_that_no_script_can_hold_are_refused(letter: str, part: str) -> None:
    with pytest.raises(ConfigError, match="line break, control character or backslash"):
        render(PLAIN, places(**{part: f"/shared/a{letter}b"}))


def test_a_percent_sign_is_no_pattern_in_the_name_of_the_log() -> None:
    assert log_option(Path("/runs/50%j")) == "--output=/runs/50%%j/slurm/job-%j.log"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("partition", "gpu\n#SBATCH --uid=0", "partition"),
        ("account", "$(id)", "account"),
        ("qos", "a b", "qos"),
        ("job_name", "-x", "job_name"),
        ("time", "soon", "time"),
        ("time", 5400, "write it in quotes"),
        ("memory_per_node", "64G;", "memory_per_node"),
        ("interface", "ib0 ", "interface"),
        ("scratch", "/tmp/" + "x" * 60, "scratch"),
        ("setup", ["module load cuda\nrm -rf x"], "line break"),
        ("setup", ["#SBATCH --nodes=9"], "slurm.options"),
        ("setup", ["export HF_TOKEN=hf_abc"], "secret"),
        ("setup", ["AWS_SECRET_ACCESS_KEY=x env"], "secret"),
        ("options", ["--nodes=9"], "set by coalesce itself"),
        ("options", ["-N9"], "--name=value"),
        ("options", ["--comment=a\n#SBATCH -N9"], "line break"),
        ("container", ["a\nb"], "line break"),
        ("cpus_per_task", 0, "cpus_per_task"),
        ("nodes", 0, "nodes"),
        ("lead_seconds", 3, "lead_seconds"),
        ("nodse", 2, "unknown key"),
    ],
)
def test_values_that_mean_something_to_a_shell_or_to_slurm_are_refused(
    inputs: Inputs, coalesce: Command, key: str, value: object, said: str
) -> None:
    recipe = inputs.recipe(slurm={"cpus_per_task": 2, key: value})
    outcome = coalesce("submit", "slurm", recipe, "--dry-run")
    assert outcome.code == 2
    assert said in outcome.err
    assert not inputs.run_dir.exists()


def test_a_script_with_a_secret_of_the_environment_is_refused_without_showing_it() -> None:
    secret = "hf_abcdefgh12345"
    with pytest.raises(ConfigError, match="the value of MY_TOKEN") as caught:
        refuse_secrets(f"echo {secret}", {"MY_TOKEN": secret, "HOME": "/root"})
    assert secret not in str(caught.value)
    refuse_secrets("echo nothing", {"MY_TOKEN": secret})
    refuse_secrets("echo short", {"MY_TOKEN": "short"})


def test_an_own_template_gets_the_same_words(tmp_path: Path) -> None:
    own = tmp_path / "own.j2"
    own.write_text("#!/bin/sh\ncd {{ folder | quote }}\n{{ (launcher + arguments) | words }}\n")
    script = render(SlurmConfig(cpus_per_task=1, template=own), places(folder="/a b"))
    assert script.startswith("#!/bin/sh\ncd '/a b'\n/sw/venv/bin/python -m cluster.slurm.launch ")


@pytest.mark.parametrize("text", ["{{ nothing }}", "{% for %}", "{{ folder | words(1) }}"])
def test_a_template_that_cannot_be_filled_in_is_refused(tmp_path: Path, text: str) -> None:
    own = tmp_path / "own.j2"
    own.write_text(text)
    with pytest.raises(ConfigError, match=r"slurm\.template"):
        render(SlurmConfig(cpus_per_task=1, template=own), places())


def test_a_dry_run_prints_the_script_and_writes_nothing(coalesce: Command, inputs: Inputs) -> None:
    recipe = inputs.recipe(slurm__cpus_per_task=2, slurm__nodes=3)
    before = snapshot(inputs.root)
    outcome = coalesce("submit", "slurm", recipe, "--dry-run")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("#!/bin/bash\n#SBATCH --job-name=coalesce\n#SBATCH --nodes=3\n")
    assert snapshot(inputs.root) == before


def test_without_a_slurm_section_the_remedy_is_named(coalesce: Command, inputs: Inputs) -> None:
    outcome = coalesce("submit", "slurm", inputs.recipe())
    assert outcome.code == 2
    assert "slurm.cpus_per_task=N" in outcome.err


def test_more_gpus_for_a_worker_than_a_node_has_are_refused(
    coalesce: Command, inputs: Inputs
) -> None:
    recipe = inputs.recipe(slurm__cpus_per_task=2, executor__gpus_per_worker=1)
    recipe.write_text(recipe.read_text().replace("kind: local", "kind: ray"))
    outcome = coalesce("submit", "slurm", recipe)
    assert outcome.code == 2
    assert "slurm.gpus_per_node=0" in outcome.err


def test_where_there_is_no_sbatch_the_command_to_type_elsewhere_is_shown(
    coalesce: Command, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    outcome = coalesce("submit", "slurm", inputs.recipe(slurm__cpus_per_task=2))
    assert outcome.code == 2
    assert "sbatch cannot be run here" in outcome.err
    script = inputs.run_dir / "slurm" / "job.sbatch"
    assert f"sbatch --parsable --output={inputs.run_dir}/slurm/job-%j.log {script}" in outcome.err
    assert script.exists()
    assert coalesce("validate", script.with_name("config.yaml")).code == 0


def test_what_a_job_is_given_does_not_change_what_a_run_is() -> None:
    from orchestrator.run_folder import settled

    values = {
        "run_dir": "r",
        "model": {"path": "m"},
        "calibrate": {"data": {"sources": [{"path": "t"}]}},
    }
    submitted = values | {"slurm": {"cpus_per_task": 4}}
    assert settled(validate(values)) == settled(validate(submitted))
