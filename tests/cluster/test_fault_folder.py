"""Run folders that are moved, oddly named, dated wrongly, or wanted by two drivers at once."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.events import read_events
from tests.cluster.faults import (
    REPOSITORY,
    SHORT,
    Driver,
    Holds,
    bytes_of,
    environment,
    events,
    kill,
)
from tests.orchestrator.tiny_run import Inputs

pytestmark = [pytest.mark.slow, pytest.mark.fault, pytest.mark.timeout(1800)]
HERE = ("executor.kind=local", *SHORT)
YEAR_2100, YEAR_1980 = 4102444800, 315532800


@pytest.fixture(scope="module")
def half(every_stage: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose driver was killed while it wrote the second layer file."""
    folder = tmp_path_factory.mktemp("half")
    holds = Holds(folder / "holds")
    holds.want("layer", r"/run/layers/\.layer-00001")
    env = environment(holds.folder)
    with Driver(every_stage, folder / "run", HERE, env) as driver:
        kill(holds.taken("layer", driver))
        assert driver.end()[0] == -9
    return folder / "run"


def units(run_dir: Path, *, resumed: bool) -> list[str]:
    """Names of units that ended, found done or made now."""
    return [e["unit"] for e in events(run_dir, "unit_done") if e.get("resumed") is resumed]


def assert_goes_on(inputs: Inputs, run_dir: Path, expected: dict[str, str]) -> None:
    """What was done is taken over, all else is made, and the bytes are those of one run."""
    done = units(run_dir, resumed=False)
    assert len(done) >= 7  # verify, corpus, four shards, one layer
    with Driver(inputs, run_dir, HERE) as driver:
        driver.succeed()
    assert sorted(units(run_dir, resumed=True)) == sorted(done)
    made = units(run_dir, resumed=False)[len(done) :]
    assert made and not set(made) & set(done)
    assert bytes_of(run_dir) == expected


def test_a_moved_run_folder_goes_on_where_it_is_now(
    every_stage: Inputs, short_undisturbed: dict[str, str], half: Path, tmp_path: Path
) -> None:
    shutil.copytree(half, tmp_path / "first" / "run")
    shutil.move(tmp_path / "first", tmp_path / "second")
    assert_goes_on(every_stage, tmp_path / "second" / "run", short_undisturbed)


def test_no_decision_depends_on_a_clock(
    every_stage: Inputs, short_undisturbed: dict[str, str], half: Path, tmp_path: Path
) -> None:
    """Nodes with other clocks leave files from the future and events that run backwards."""
    run_dir = shutil.copytree(half, tmp_path / "run")
    for turn, path in enumerate(sorted(run_dir.rglob("*"))):
        moment = (YEAR_2100, YEAR_1980)[turn % 2]
        os.utime(path, (moment, moment))
    log = list(read_events(run_dir / "events.jsonl"))
    for turn, event in enumerate(log):
        event["time"] = YEAR_2100 - 3600 * turn
    (run_dir / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in log))
    words = [sys.executable, "-m", "orchestrator", "status", str(run_dir)]
    subprocess.run(words, cwd=REPOSITORY, env=environment(), check=True, capture_output=True)
    assert_goes_on(every_stage, run_dir, short_undisturbed)


def test_a_path_with_blanks_quotes_and_other_scripts(
    every_stage: Inputs, short_undisturbed: dict[str, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / 'dépôt d\'essai №1 模型 "100%" $HOME #x' / "run"
    with Driver(every_stage, run_dir, SHORT) as driver:
        driver.succeed()
    assert bytes_of(run_dir) == short_undisturbed


def test_of_two_drivers_started_at_once_one_works_and_the_other_names_it(
    every_stage: Inputs, short_undisturbed: dict[str, str], tmp_path: Path
) -> None:
    run_dir, holds = tmp_path / "run", Holds(tmp_path / "holds")
    holds.want("shard", r"/shards/\.shard-00002")
    env = environment(holds.folder)
    with (
        Driver(every_stage, run_dir, HERE, env) as one,
        Driver(every_stage, run_dir, HERE, env) as two,
    ):
        works, refused = (one, two) if holds.taken("shard", one) == one.process.pid else (two, one)
        code, said = refused.end()
        assert code == 2
        assert f"process {works.process.pid} on {socket.gethostname()}" in said
        holds.release("shard")
        works.succeed()
    assert bytes_of(run_dir) == short_undisturbed
    assert not any(event["resumed"] for event in events(run_dir, "unit_done") if "resumed" in event)
