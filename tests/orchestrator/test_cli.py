"""The verbs of `coalesce`: what they print, import, touch, and how they end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from models.checkpoint import Checkpoint
from models.families import FAMILIES, REFUSED
from models.support import matrix
from orchestrator.load import recipes
from stages.export.formats import FORMATS
from stages.group.config import METHODS
from tests.orchestrator.tiny_run import Command, Inputs, expert, router, snapshot

VERBS = ["run", "plan", "validate", "status", "report", "submit", "show-config", "ls"]
HEAVY = {"torch", "ray", "deepspeed", "transformers", "datasets", "pyarrow", "numpy", "matplotlib"}

# Runs the command like the installed script, then says what it imported.
PROBE = """
import sys
from orchestrator.cli import main
sys.argv = ["coalesce", *sys.argv[1:]]
try:
    main()
finally:
    print("imported:", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


def imports_of(*words: str) -> tuple[str, set[str]]:
    """What a command prints, and the packages that it imported."""
    run = subprocess.run(
        [sys.executable, "-c", PROBE, *words], capture_output=True, text=True, check=True
    )
    text, _, names = run.stdout.rpartition("imported:")
    return text, set(names.split())


# Help ---------------------------------------------------------------------------------------------


def test_help_names_every_verb_and_imports_nothing_heavy() -> None:
    text, imported = imports_of("--help")
    assert all(f"\n  {verb} " in text for verb in VERBS)
    assert not imported & HEAVY


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_imports_nothing_heavy(verb: str) -> None:
    text, imported = imports_of(verb, "--help")
    assert f"Usage: coalesce {verb}" in text
    assert not imported & HEAVY


def test_show_config_imports_nothing_heavy() -> None:
    text, imported = imports_of("show-config", "quickstart")
    assert "run_dir" in text
    assert not imported & HEAVY


def test_the_installed_script_ends_with_code_2_and_one_message() -> None:
    script = Path(sys.executable).with_name("coalesce")
    run = subprocess.run([script, "plan", "nonsense"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error: no config file or recipe 'nonsense'\n  -> ")


@pytest.mark.parametrize("words", [["frobnicate"], ["run"], ["plan", "a", "--nope"], ["status"]])
def test_a_call_that_is_not_understood_ends_with_code_2(
    coalesce: Command, words: list[str]
) -> None:
    outcome = coalesce(*words)
    assert outcome.code == 2
    assert outcome.err.startswith("Usage: ")


def test_no_words_at_all_show_the_help(coalesce: Command) -> None:
    outcome = coalesce()
    assert "Merge, then compress" in outcome.out + outcome.err


# ls -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("methods", set(METHODS)),
        ("families", {*FAMILIES, *REFUSED}),
        ("recipes", set(recipes())),
        ("exporters", set(FORMATS)),
    ],
)
def test_ls_prints_a_line_for_every_name(coalesce: Command, what: str, names: set[str]) -> None:
    outcome = coalesce("ls", what)
    lines = {line.split()[0]: line.split()[1:] for line in outcome.out.splitlines()}
    assert outcome.code == 0
    assert set(lines) == names
    assert all(lines.values())


def test_ls_of_families_has_the_whole_matrix_in_json(coalesce: Command) -> None:
    outcome = coalesce("ls", "families", "--json")

    assert outcome.code == 0
    found = json.loads(outcome.out)
    assert found == matrix()
    assert found["mixtral"]["native"] == "supported"
    assert found["switch_transformers"]["mapped"].startswith("unsupported: ")


def test_ls_of_others_has_no_json(coalesce: Command) -> None:
    outcome = coalesce("ls", "methods", "--json")
    assert outcome.code == 2
    assert "`coalesce ls families --json`" in outcome.err


def test_ls_of_something_else_names_what_can_be_listed(coalesce: Command) -> None:
    outcome = coalesce("ls", "methds")
    assert outcome.code == 2
    assert "cannot list 'methds'" in outcome.err
    assert "methods, families, recipes, exporters" in outcome.err


# validate and plan --------------------------------------------------------------------------------


def test_validate_says_what_would_be_made_and_writes_nothing(
    coalesce: Command, inputs: Inputs
) -> None:
    recipe = inputs.recipe()
    before = snapshot(inputs.root)
    outcome = coalesce("validate", recipe)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("valid: mixtral, 2 MoE layers of 8 experts, top-2: ")
    assert snapshot(inputs.root) == before


def test_only_deep_validation_reads_values(coalesce: Command, inputs: Inputs) -> None:
    inputs.change_weights(lambda tensors: tensors[router(1)][0].fill_(float("inf")))
    recipe = inputs.recipe()
    assert coalesce("validate", recipe).code == 0
    outcome = coalesce("validate", recipe, "--deep")
    assert outcome.code == 2
    assert f"{router(1)} in {inputs.weights} holds 32 values" in outcome.err


def test_deep_validation_of_a_sound_model_writes_nothing(coalesce: Command, inputs: Inputs) -> None:
    recipe = inputs.recipe()
    before = snapshot(inputs.root)
    assert coalesce("validate", recipe, "--deep").code == 0
    assert snapshot(inputs.root) == before


def hollow(inputs: Inputs, gibibytes: int) -> None:
    """A weight file with a true header whose data were never written: a hole in a sparse file."""
    width = gibibytes * (1 << 30) // (3 * 2 * 8 * 32 * 4)
    raw = inputs.weights.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    shapes = {"w1": [width, 32], "w2": [32, width], "w3": [width, 32]}
    wide = {expert(layer, i, part): part for layer in (0, 1) for i in range(8) for part in shapes}
    offset = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if name in wide:
            entry["shape"] = shapes[wide[name]]
        begin, end = entry["data_offsets"]
        size = width * 32 * 4 if name in wide else end - begin
        entry["data_offsets"] = [offset, offset + size]
        offset += size
    text = json.dumps(header).encode()
    inputs.weights.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(inputs.weights, 8 + len(text) + offset)
    inputs.change_config(intermediate_size=width)


def test_a_plan_reads_samples_of_a_large_file_and_not_its_weights(
    coalesce: Command, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = Path("/proc/self/io")
    if not counter.exists() or shutil.disk_usage(inputs.root).free < 5e9:
        pytest.skip("what a process reads is not counted here, or a plan for 4 GB has no room")

    def forbidden(*_: object) -> None:
        pytest.fail("a tensor was read")  # through a memory map, which the counter does not see

    hollow(inputs, 8)
    recipe = inputs.recipe()
    monkeypatch.setattr(Checkpoint, "read", forbidden)
    before = bytes_read(counter)
    outcome = coalesce("plan", recipe)
    assert outcome.code == 0, outcome.err
    assert bytes_read(counter) - before < 128 << 20  # 64 samples of 1 MiB identify the file
    assert "8.6 GB -> 4.3 GB" in " ".join(outcome.out.split())


def bytes_read(counter: Path) -> int:
    """Bytes that this process has read by system calls so far."""
    return int(counter.read_text().split("rchar: ")[1].split()[0])


def test_a_plan_shows_units_and_what_is_done(coalesce: Command, inputs: Inputs) -> None:
    outcome = coalesce("plan", inputs.recipe())
    assert outcome.code == 0
    cells = [[c.strip() for c in line.split("│")[1:4]] for line in outcome.out.splitlines()]
    assert ["calibrate", "2", "0"] in cells
    assert ["transform", "3", "0"] in cells


# status and report --------------------------------------------------------------------------------


def test_status_of_a_folder_without_run_is_refused(coalesce: Command, tmp_path: Path) -> None:
    outcome = coalesce("status", tmp_path)
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: no run in {tmp_path}\n  -> ")


def test_report_of_a_folder_without_report_is_refused(coalesce: Command, tmp_path: Path) -> None:
    outcome = coalesce("report", tmp_path)
    assert outcome.code == 2
    assert "report.json does not exist" in outcome.err
    assert "coalesce status" in outcome.err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_report_writes_the_page_again_from_the_numbers_alone(
    coalesce: Command, finished: Inputs, tmp_path: Path
) -> None:
    (tmp_path / "report").mkdir()
    source = finished.run_dir / "report" / "report.json"
    (tmp_path / "report" / "report.json").write_bytes(source.read_bytes())
    outcome = coalesce("report", tmp_path)
    page = tmp_path / "report" / "index.html"
    assert outcome.code == 0
    assert f"report: {page}" in outcome.out
    assert page.read_bytes() == source.with_name("index.html").read_bytes()


@pytest.mark.slow
def test_a_quiet_run_that_is_finished_prints_the_result_only(
    coalesce: Command, finished: Inputs
) -> None:
    outcome = coalesce("run", finished.recipe(), "--quiet")
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[-2:] == [
        f"checkpoint: {finished.run_dir / 'output'}",
        f"report: {finished.run_dir / 'report' / 'index.html'}",
    ]
    assert len(outcome.out.splitlines()) == 3
    assert outcome.err == ""


@pytest.mark.slow
def test_calibrate_observes_only_and_run_goes_on_from_there(
    coalesce: Command, inputs: Inputs
) -> None:
    recipe = inputs.recipe()
    outcome = coalesce("calibrate", recipe, "--quiet")
    assert outcome.code == 0, outcome.err
    assert outcome.out.strip() == f"statistics: {inputs.run_dir / 'statistics.arrow'}"
    assert not (inputs.run_dir / "output").exists()
    assert "observed" in coalesce("status", inputs.run_dir).out
    statistics = (inputs.run_dir / "statistics.arrow").stat().st_mtime_ns
    left_by_a_killed_attempt = inputs.run_dir / "layers" / ".layer-00000.safetensors.1.tmp"
    left_by_a_killed_attempt.parent.mkdir()
    left_by_a_killed_attempt.touch()
    assert coalesce("run", recipe, "--quiet").code == 0
    assert not left_by_a_killed_attempt.exists()
    assert (inputs.run_dir / "output" / "config.json").exists()
    assert (inputs.run_dir / "statistics.arrow").stat().st_mtime_ns == statistics


def test_experts_with_few_tokens_are_named_when_calibration_ends_and_by_status(
    coalesce: Command, inputs: Inputs
) -> None:
    recipe = inputs.recipe(calibrate__min_tokens_per_expert=513)
    expected = "warning: layer 1: experts [0-7] received fewer than 513 of 512 calibration tokens"

    assert expected in coalesce("calibrate", recipe).out

    assert coalesce("status", inputs.run_dir).out.count(expected) == 1
