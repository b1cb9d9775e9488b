"""One log file per unit, as the process that runs it writes it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.executor import Job
from cluster.local import LocalExecutor
from models.errors import UserError
from orchestrator.events import EventLog, read_events
from orchestrator.scheduler import Scheduler
from orchestrator.unit_log import LogFolder, attempts, writing
from stages.unit import Done, Fingerprint, OneFile
from tests.orchestrator.tiny_run import Command, Inputs


@dataclass(frozen=True)
class Talk(OneFile):
    """Says things and writes a file."""

    name: str
    output: Path

    @property
    def fingerprint(self) -> Fingerprint:
        return {"code": "talk-1"}


def talk(unit: Talk) -> dict[str, Any]:
    print(f"out of {unit.name}")
    print("to stderr", file=sys.stderr)
    logging.getLogger("some.library").warning("a record")
    unit.output.write_text("x")
    return {}


def refuse(unit: Talk) -> dict[str, Any]:
    print("before the end")
    raise UserError("there is nothing to read", "give more")


def scheduler(root: Path) -> Scheduler:
    return Scheduler(LocalExecutor(1), EventLog(root / "events.jsonl"), 0, logs=root / "logs")


@pytest.fixture
def unit(tmp_path: Path) -> Talk:
    return Talk("talk/one", tmp_path / "one")


def test_output_records_and_warnings_go_to_the_units_file_and_nowhere_else(
    tmp_path: Path, unit: Talk, capfd: pytest.CaptureFixture[str]
) -> None:
    scheduler(tmp_path).run("talk", [unit], talk, 0)
    text = (tmp_path / "logs" / "talk" / "one.log").read_text()
    assert text.startswith("=== attempt 1 of talk/one: ")
    for said in ("out of talk/one", "to stderr", "some.library: a record", "done"):
        assert said in text
    assert capfd.readouterr() == ("", "")


def test_a_unit_that_was_done_already_leaves_its_file_as_it_is(tmp_path: Path, unit: Talk) -> None:
    scheduler(tmp_path).run("talk", [unit], talk, 0)
    path = tmp_path / "logs" / "talk" / "one.log"
    before = path.read_bytes()
    scheduler(tmp_path).run("talk", [unit], talk, 0)
    assert path.read_bytes() == before
    path.unlink()
    scheduler(tmp_path).run("talk", [unit], talk, 0)
    assert not path.exists()


def test_every_attempt_is_appended_with_its_traceback_and_the_error_names_the_file(
    tmp_path: Path, unit: Talk
) -> None:
    for _ in range(2):
        with pytest.raises(UserError, match="nothing to read") as caught:
            scheduler(tmp_path).run("talk", [unit], refuse, 0)
    path = tmp_path / "logs" / "talk" / "one.log"
    assert attempts(path.read_text()) == 2
    assert path.read_text().count("models.errors.UserError: there is nothing to read") == 2
    assert caught.value.__notes__ == [f"log of talk/one: {path}"]
    (failed, *_) = (e for e in read_events(tmp_path / "events.jsonl") if "failed" in e["event"])
    assert (failed["unit"], failed["error"]) == ("talk/one", "there is nothing to read")


def test_other_threads_keep_their_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with writing(LogFolder.of(tmp_path, "talk"), "talk/a"):
        other = threading.Thread(target=print, args=("a bar",))
        other.start()
        other.join()
        print("the unit")
    assert capsys.readouterr().out == "a bar\n"
    assert "the unit" in (tmp_path / "talk" / "a.log").read_text()


def test_a_process_of_its_own_writes_what_libraries_in_c_say_and_how_it_crashed(
    tmp_path: Path,
) -> None:
    code = f"""
import faulthandler, os, warnings
from pathlib import Path
from orchestrator.unit_log import LogFolder, writing
faulthandler.enable()
with writing(LogFolder(Path({str(tmp_path)!r}), "talk", ("elsewhere", 1)), "talk/a"):
    os.write(1, b"from below\\n")
    warnings.warn("be warned")
    faulthandler._sigsegv()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-11, "", "")
    text = (tmp_path / "a.log").read_text()
    assert "from below" in text and "be warned" in text and "Segmentation fault" in text


@pytest.mark.parametrize(
    "name", ["talk/../../etc", "talk/.", "talk/a/b", "talk/\n", "talk/" + "x" * 999]
)
def test_a_name_cannot_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    path = LogFolder.of(tmp_path, "talk").path(name)
    assert path.parent == tmp_path / "talk"
    path.parent.mkdir()
    path.write_text("")


def test_where_no_log_can_be_written_the_unit_runs_all_the_same(tmp_path: Path, unit: Talk) -> None:
    (tmp_path / "logs").write_text("a file in the way")
    scheduler(tmp_path).run("talk", [unit], quiet, 0)
    assert unit.output.exists()


def quiet(unit: Talk) -> dict[str, Any]:
    unit.output.write_text("x")
    return {}


def test_the_environment_is_not_written(
    tmp_path: Path, unit: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    with pytest.raises(UserError):
        scheduler(tmp_path).run("talk", [unit], refuse, 0)
    assert "hf_very_secret" not in (tmp_path / "logs" / "talk" / "one.log").read_text()


def test_a_failed_unit_is_found_from_the_command_line(coalesce: Command, inputs: Inputs) -> None:
    inputs.change_weights(lambda tensors: tensors["lm_head.weight"][0].fill_(float("nan")))
    failed = coalesce("run", inputs.recipe(), "--quiet")
    log = inputs.run_dir / "logs" / "verify" / "model.safetensors.log"
    assert failed.code == 2
    assert f"log of verify/model.safetensors: {log}" in failed.err
    shown = coalesce("logs", inputs.run_dir, "--failed", "--tail", "3")
    assert shown.code == 0
    assert "CheckpointError" in shown.out and str(log) in shown.out
    for words in (["verify/model.safetensors"], ["--stage", "verify"], ["model.safetensors"]):
        assert "=== attempt 1" in coalesce("logs", inputs.run_dir, *words).out
    refused = coalesce("logs", inputs.run_dir, "verify/other")
    assert refused.code == 2 and "no log of verify/other" in refused.err
    status = json.loads(coalesce("status", inputs.run_dir, "--json").out)
    (why,) = status["stages"]["verify"]["failed"].values()
    assert status["stages"]["verify"]["state"] == "failed" and "lm_head.weight" in why


def test_a_worker_is_made_within_the_log_of_its_first_unit(tmp_path: Path) -> None:
    def make() -> Callable[[Talk], Done]:
        print("loading")
        return lambda unit: Done(unit.name, {}, {}, 0.0, 0)

    units = [Talk(f"talk/{i}", tmp_path / str(i)) for i in range(2)]
    scheduler(tmp_path).run_model("talk", units, make, 0)
    assert "loading" in (tmp_path / "logs" / "talk" / "0.log").read_text()
    assert "loading" not in (tmp_path / "logs" / "talk" / "1.log").read_text()
    assert Job(make).resources.cpus == 1
