"""The engine that calibrates fits the memory of a worker, says why, and changes no result."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator import engine, estimate
from orchestrator.engine import choose
from orchestrator.events import Event
from orchestrator.load import load
from orchestrator.plan import Row, rows, summary
from orchestrator.preflight import Prepared, prepare
from orchestrator.progress import STAGES, describe, listener
from orchestrator.run import run
from stages.passage import KEPT_ARGUMENT_BYTES
from tests.orchestrator.tiny_run import Inputs

GB = 1_000_000_000


def prepared(inputs: Inputs, *overrides: str) -> Prepared:
    return prepare(load(str(inputs.recipe()), overrides).config)


def calibrate_row(run: Prepared) -> Row:
    return next(row for row in rows(run) if row.stage == "calibrate")


# The choice ---------------------------------------------------------------------------------------


def test_auto_is_resident_where_the_model_fits(inputs: Inputs) -> None:
    found = choose(prepared(inputs, f"calibrate.memory_bytes={GB}"))

    assert found.engine == "resident"
    assert "which fits into 1.0 GB (calibrate.memory_bytes)" in found.why


def test_auto_streams_where_it_does_not_fit(inputs: Inputs) -> None:
    found = choose(prepared(inputs, "calibrate.memory_bytes=1000000"))

    assert found.engine == "streaming"
    assert "which does not fit into 1.0 MB (calibrate.memory_bytes)" in found.why


def test_the_limit_is_met_to_the_byte(inputs: Inputs) -> None:
    needed = estimate.calibrate(prepared(inputs), "resident")

    engines = [
        choose(prepared(inputs, f"calibrate.memory_bytes={size}")).engine
        for size in (needed - 1, needed)
    ]

    assert engines == ["streaming", "resident"]


@pytest.mark.parametrize("asked", ["resident", "streaming"])
def test_an_engine_that_is_asked_for_is_taken(asked: str, inputs: Inputs) -> None:
    run = prepared(inputs, f"calibrate.engine={asked}", "calibrate.memory_bytes=1")

    assert (choose(run).engine, choose(run).why) == (asked, f"calibrate.engine={asked}")


def test_an_encoder_decoder_is_held_whole_wherever_it_fits(inputs: Inputs) -> None:
    run = prepared(inputs, "calibrate.memory_bytes=1")
    run.moe.checkpoint.config["is_encoder_decoder"] = True

    assert (choose(run).engine, choose(run).why) == (
        "resident",
        "an encoder-decoder is held whole by every worker",
    )


def test_the_free_memory_is_shared_by_the_workers(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "available_memory", lambda: 3 * GB)
    run = prepared(inputs, "executor.kind=ray", "executor.workers=6", "calibrate.shards=3")

    assert engine.worker_budget(run) == (GB, "3.0 GB of free memory / 3 workers")


def test_one_process_has_the_free_memory_for_itself(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "available_memory", lambda: 3 * GB)

    assert engine.worker_budget(prepared(inputs)) == (3 * GB, "3.0 GB of free memory")


def test_a_model_on_a_gpu_must_fit_the_gpu(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "gpu_memory", lambda: 80 * GB)
    run = prepared(inputs, "executor.kind=ray", "executor.workers=6", "executor.gpus_per_worker=1")

    assert engine.worker_budget(run) == (80 * GB, "the memory of a GPU")


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    monkeypatch.setattr(engine, "_MEMINFO", meminfo)
    monkeypatch.setattr(engine, "_CGROUP", tmp_path)
    assert engine.available_memory() == 8000 << 10

    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert engine.available_memory() == 3000

    (tmp_path / "memory.max").write_text("max\n")
    assert engine.available_memory() == 8000 << 10


def test_free_memory_is_a_share_of_what_the_machine_has() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    assert 0 < engine.available_memory() <= total


# The plan -----------------------------------------------------------------------------------------


def test_streaming_is_estimated_as_rest_and_one_layer(inputs: Inputs) -> None:
    run = prepared(inputs)
    tensors = run.moe.checkpoint.tensors.values()
    rest = sum(info.nbytes for info in tensors if run.moe.family.layer_of(info.name) is None)
    layers = run.moe.checkpoint.nbytes - rest
    largest = max(run.moe.layer_bytes(layer) for layer in run.moe.layers)

    saved = estimate.calibrate(run, "resident") - estimate.calibrate(run, "streaming")

    assert saved == layers - 2 * largest - KEPT_ARGUMENT_BYTES


def test_the_plan_shows_the_memory_and_the_reads_of_streaming(inputs: Inputs) -> None:
    resident = prepared(inputs, "calibrate.engine=resident")
    streaming = prepared(inputs, "calibrate.engine=streaming")

    assert calibrate_row(resident).peak_bytes == estimate.calibrate(resident, "resident")
    assert calibrate_row(streaming).peak_bytes == estimate.calibrate(streaming, "streaming")
    assert calibrate_row(resident).read_bytes == resident.moe.checkpoint.nbytes
    assert calibrate_row(streaming).read_bytes == 2 * resident.moe.checkpoint.nbytes  # shards


def test_the_plan_says_why(inputs: Inputs) -> None:
    run = prepared(inputs, "calibrate.memory_bytes=1000000")

    assert f"calibrate: streaming engine: {choose(run).why}" in summary(run)


def test_given_statistics_need_no_engine(inputs: Inputs, finished: Inputs) -> None:
    word = f"calibrate.statistics={finished.run_dir / 'statistics.arrow'}"

    assert "engine" not in summary(prepared(inputs, word))


# A run --------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> Iterator[Inputs]:
    """A resident run that lost one of its two shards and everything behind them."""
    run(prepared(inputs, "calibrate.engine=resident"))
    shard = inputs.run_dir / "calibration" / "shards" / "shard-00001.arrow"
    for path in (shard, shard.with_name(f"{shard.name}.json")):
        path.unlink()
    yield inputs


@pytest.mark.slow
def test_a_half_done_resident_run_is_finished_by_streaming_with_the_same_bytes(
    stopped: Inputs,
) -> None:
    statistics = stopped.run_dir / "statistics.arrow"
    expected = statistics.read_bytes()
    statistics.unlink()
    (stopped.run_dir / "statistics.arrow.json").unlink()

    report = run(prepared(stopped, "calibrate.engine=streaming"))

    assert statistics.read_bytes() == expected
    engines = json.loads((report / "report.json").read_text())["calibrate"]["engines"]
    assert engines == {"resident": 1, "streaming": 1}


@pytest.mark.slow
def test_a_run_says_which_engine_it_uses_and_why(inputs: Inputs) -> None:
    events: list[Event] = []

    run(prepared(inputs, "calibrate.memory_bytes=1000000"), [events.append])

    event, *later = (each for each in events if each["event"] == "engine")
    assert [each["stage"] for each in later] == ["export"]
    stage = f"[3/{len(STAGES)}] calibrate"
    assert describe(event).startswith(f"{stage}: streaming engine: a worker with the whole")
    assert "does not fit into 1.0 MB" in describe(event)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_the_engine(terminal: bool) -> None:
    event = {"time": 0.0, "event": "engine", "stage": "calibrate", "engine": "resident", "why": "w"}
    console = Console(force_terminal=terminal, record=True, width=100)

    with listener(console) as tell:
        tell(event)

    assert "calibrate: resident engine: w" in console.export_text()
