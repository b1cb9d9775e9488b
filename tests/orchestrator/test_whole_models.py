"""Where a whole model does not fit, the output is tried and measured by layers: the same result."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import disk, engine, estimate
from orchestrator.events import Event
from orchestrator.load import load
from orchestrator.plan import summary
from orchestrator.preflight import Prepared, expected_layouts, prepare
from orchestrator.run import run
from tests.orchestrator.tiny_run import Inputs


def recipe(inputs: Inputs, **changes: Any) -> Path:
    """Evaluates on one domain, against one baseline."""
    source = {"path": str(inputs.text), "domain": "prose"}
    data = {"sources": [source], "tokens": 128, "sequence_length": 16}
    evaluate = {"data": data, "baselines": ["frequency"], "kl_positions": 16}
    return inputs.recipe(evaluate=evaluate, calibrate__dedup={"mode": "off"}, **changes)


def prepared(inputs: Inputs, *overrides: str) -> Prepared:
    return prepare(load(str(recipe(inputs)), overrides).config)


def test_whole_models_are_held_where_they_fit(inputs: Inputs) -> None:
    found = prepared(inputs)

    assert engine.evaluation(found).engine == "resident"
    assert engine.gate(found, expected_layouts(found.variants[0], found.moe)).engine == "resident"
    assert "evaluate:" not in summary(found)
    assert disk.evaluation_bytes(found) == 0


@pytest.mark.parametrize("asked", ["resident", "streaming"])
def test_an_engine_that_is_asked_for_is_taken(asked: str, inputs: Inputs) -> None:
    found = prepared(inputs, f"executor.engine={asked}", "calibrate.memory_bytes=1")

    assert engine.evaluation(found).engine == asked
    assert engine.evaluation(found).worker_bytes == estimate.evaluate(found, asked)  # type: ignore[arg-type]  # one of two literals


def test_the_limit_is_met_to_the_byte(inputs: Inputs) -> None:
    needed = estimate.evaluate(prepared(inputs))

    engines = [
        engine.evaluation(prepared(inputs, f"calibrate.memory_bytes={size}")).engine
        for size in (needed - 1, needed)
    ]

    assert engines == ["streaming", "resident"]


def test_the_plan_says_why_and_counts_hidden_states(inputs: Inputs) -> None:
    found = prepared(inputs, "calibrate.memory_bytes=1000000")

    assert "export: streaming engine: a whole model needs about" in summary(found)
    assert "evaluate: streaming engine: a whole model needs about" in summary(found)
    # 128 tokens of 32 fp32 numbers.
    assert disk.evaluation_bytes(found) == 128 * 32 * 4
    assert disk.peak_bytes(found) > disk.peak_bytes(prepared(inputs, "executor.engine=resident"))


def test_a_model_that_cannot_be_streamed_is_held_whole(inputs: Inputs) -> None:
    found = prepared(inputs, "calibrate.memory_bytes=1")
    cannot = found.moe.family, {"streaming": "its layers need each other"}
    family = dataclasses.replace(cannot[0], unsupported=cannot[1])
    found = dataclasses.replace(found, moe=dataclasses.replace(found.moe, family=family))

    assert engine.evaluation(found).engine == "resident"
    assert engine.evaluation(found).why == "it cannot be streamed: its layers need each other"


def bytes_of(folder: Path) -> Iterator[tuple[str, bytes]]:
    for kind in ("output", "evaluation"):
        for path in sorted((folder / kind).rglob("*")):
            is_marker = path.with_name(path.name.removesuffix(".json")).is_file()
            if path.is_file() and not (path.suffix == ".json" and is_marker):
                yield str(path.relative_to(folder)), path.read_bytes()


@pytest.mark.slow
def test_streaming_changes_no_byte_of_the_output_and_no_digit(inputs: Inputs) -> None:
    places, events = [inputs.root / "whole" / "run", inputs.root / "layers" / "run"], list[Event]()
    for place, word in zip(places, ("resident", "streaming"), strict=True):
        words = [f"run_dir={place}", f"executor.engine={word}", "export.format=mapped"]
        run(prepared(inputs, *words), [events.append])

    whole, layers = (dict(bytes_of(place)) for place in places)

    assert whole == layers
    assert len([name for name in whole if name.startswith("evaluation/")]) >= 4
    told = [(e["stage"], e["engine"]) for e in events if e["event"] == "engine"]
    assert told[-2:] == [("export", "streaming"), ("evaluate", "streaming")]
