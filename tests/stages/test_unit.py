"""A unit is done when its marker says so and its files are as it left them."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from stages.errors import StaleUnit
from stages.unit import (
    Fingerprint,
    beside,
    differences,
    execute,
    peak_rss,
    read_digests,
    read_marker,
    reset_peak_rss,
)


@dataclass(frozen=True)
class Copy:
    """Writes `text` to two files."""

    folder: Path
    text: str = "content"
    config: int = 1

    @property
    def name(self) -> str:
        return "copy"

    @property
    def outputs(self) -> Sequence[Path]:
        return (self.folder / "a", self.folder / "b")

    @property
    def marker(self) -> Path:
        return beside(self.folder / "a")

    @property
    def fingerprint(self) -> Fingerprint:
        return {"config": {"number": self.config, "pair": (1, 2)}}


class Worker:
    """Counts how often a unit really ran."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, unit: Copy) -> dict[str, Any]:
        self.runs += 1
        for path in unit.outputs:
            path.write_text(unit.text)
        return {"run": self.runs}


def test_the_marker_lies_beside_the_output() -> None:
    assert beside(Path("x/layer.safetensors")) == Path("x/layer.safetensors.json")


def test_a_finished_unit_is_not_run_again(tmp_path: Path) -> None:
    worker = Worker()

    first, second = execute(Copy(tmp_path), worker), execute(Copy(tmp_path), worker)

    assert worker.runs == 1
    assert (first.resumed, second.resumed) == (False, True)
    assert second == first  # `resumed` does not take part


def test_the_marker_holds_result_digests_and_cost(tmp_path: Path) -> None:
    done = execute(Copy(tmp_path), Worker())

    marker = json.loads(Copy(tmp_path).marker.read_text())
    assert marker["result"] == {"run": 1}
    assert {n: e["sha256"] for n, e in marker["outputs"].items()} == done.digests
    assert [entry["bytes"] for entry in marker["outputs"].values()] == [7, 7]
    assert marker["seconds"] >= 0
    assert marker["peak_rss_bytes"] > 1 << 20


@pytest.mark.parametrize("content", ["contenT", "conten", "", None], ids=str)
def test_a_damaged_or_missing_output_is_made_again(tmp_path: Path, content: str | None) -> None:
    worker = Worker()
    execute(Copy(tmp_path), worker)
    (tmp_path / "b").unlink()
    if content is not None:
        (tmp_path / "b").write_text(content)

    again = execute(Copy(tmp_path), worker)

    assert worker.runs == 2
    assert not again.resumed
    assert (tmp_path / "b").read_text() == "content"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"fingerprint": 1}'])
def test_an_unreadable_marker_means_not_done(tmp_path: Path, text: str) -> None:
    worker = Worker()
    execute(Copy(tmp_path), worker)
    Copy(tmp_path).marker.write_text(text)

    execute(Copy(tmp_path), worker)

    assert worker.runs == 2


def test_other_inputs_stop_with_what_differs(tmp_path: Path) -> None:
    execute(Copy(tmp_path), Worker())

    with pytest.raises(StaleUnit, match=r"config\.number was 1, is 2"):
        execute(Copy(tmp_path, config=2), Worker())
    assert (tmp_path / "a").exists()


def test_a_failing_unit_leaves_no_marker(tmp_path: Path) -> None:
    def fail(unit: Copy) -> dict[str, Any]:
        unit.outputs[0].write_text("half")
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        execute(Copy(tmp_path), fail)

    assert read_marker(Copy(tmp_path)) is None


def test_the_old_marker_is_gone_while_a_unit_runs_again(tmp_path: Path) -> None:
    execute(Copy(tmp_path), Worker())
    (tmp_path / "a").write_text("damaged")

    def look(unit: Copy) -> dict[str, Any]:
        assert not unit.marker.exists()
        return Worker()(unit)

    execute(Copy(tmp_path), look)

    assert Copy(tmp_path).marker.exists()


def test_the_marker_is_written_after_the_outputs(tmp_path: Path) -> None:
    unit = Copy(tmp_path)

    with pytest.raises(FileNotFoundError):
        execute(unit, lambda _: {})

    assert not unit.marker.exists()


def test_a_killed_attempt_and_its_repetition_give_the_same_files(tmp_path: Path) -> None:
    whole, killed = Copy(tmp_path / "whole"), Copy(tmp_path / "killed")
    for unit in (whole, killed):
        unit.folder.mkdir()
    execute(whole, Worker())
    (killed.folder / "a").write_text("cont")

    execute(killed, Worker())

    assert read_digests(killed.marker) == read_digests(whole.marker)


def test_the_digest_of_a_unit_follows_its_content(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        execute(Copy(tmp_path / name, text=name), Worker())

    assert read_digests(Copy(tmp_path / "x").marker) != read_digests(Copy(tmp_path / "y").marker)


def test_nothing_but_outputs_and_marker_is_left(tmp_path: Path) -> None:
    execute(Copy(tmp_path), Worker())

    assert sorted(os.listdir(tmp_path)) == ["a", "a.json", "b"]


def test_differences_name_nested_parts() -> None:
    found = {"a": {"x": 1, "y": [1]}, "b": 1}

    assert differences(found, {"a": {"x": 2, "y": [1]}, "c": None, "b": 1}) == "a.x was 1, is 2"
    assert differences(found, {"a": {"x": 1}, "b": 1}) == "a.y was [1], is null"


def test_long_values_are_shortened() -> None:
    assert len(differences({"a": "x" * 99}, {"a": "y"})) < 80


def test_a_done_unit_can_be_pickled(tmp_path: Path) -> None:
    done = execute(Copy(tmp_path), Worker())

    assert pickle.loads(pickle.dumps(done)) == replace(done)


def test_peak_memory_is_plausible() -> None:
    reset_peak_rss()

    assert 1 << 24 < peak_rss() < 1 << 40
