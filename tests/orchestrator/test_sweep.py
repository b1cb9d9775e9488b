"""`coalesce sweep`: one observation, many pairs, chosen ones built by normal runs."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.run_folder import RunFolder
from tests.orchestrator.tiny_run import EXPERTS, LAYERS, TOP_K, Command, Inputs, snapshot

METHODS = [
    {"method": "coalesce", "multiple": 4},
    "reap",
    {"method": "mc_smoe", "scope": "global"},
    "hc_smoe",
]


def options(**more: Any) -> dict[str, Any]:
    """Changes of the recipe; the statistics are named by it, so that nothing is observed."""
    return {"sweep": {"methods": METHODS, "ratios": [0.75, 0.5]} | more}


def found(folder: Path) -> list[dict[str, Any]]:
    points: list[dict[str, Any]] = json.loads((folder / "sweep.json").read_text())["points"]
    return points


@dataclass(frozen=True)
class Ran:
    """A copy of a finished run, free to be added to; its model and text stay where they are."""

    root: Path
    made: Inputs

    @property
    def run_dir(self) -> Path:
        return self.root / "run"

    def recipe(self, **changes: Any) -> Path:
        source = {"path": str(self.made.text), "domain": "prose"}
        places = {"model__path": str(self.made.model), "calibrate__data__sources": [source]}
        return Inputs(self.root).recipe(**places, **changes)


@pytest.fixture
def ran(finished: Inputs, tmp_path: Path) -> Ran:
    shutil.copytree(finished.run_dir, tmp_path / "run")
    return Ran(tmp_path, finished)


def test_a_sweep_observes_decides_every_pair_and_draws(inputs: Inputs, coalesce: Command) -> None:
    done = coalesce("sweep", inputs.recipe(**options()))

    assert done.code == 0, done.err
    points, folder = found(inputs.run_dir), RunFolder(inputs.run_dir)
    names = ["coalesce multiple=4", "reap", "mc_smoe scope=global", "hc_smoe"]
    assert [point["method"] for point in points] == [name for name in names for _ in (0, 1)]
    assert folder.statistics.exists() and not folder.decision("compressed").exists()
    for large, small in zip(points[::2], points[1::2], strict=True):
        assert small["bytes"] < large["bytes"] and small["reduction"] > large["reduction"] > 0
        assert small["predicted_error"]["mean"] > large["predicted_error"]["mean"] > 0
        assert len(small["predicted_error"]["layers"]) == LAYERS
    assert {p["format"] for p in points[:4]} == {"native"}
    assert {p["format"] for p in points[4:]} == {"mapped"}
    for ending in ("png", "svg"):
        assert folder.sweep.with_suffix(f".{ending}").stat().st_size > 5000
    assert "is no perplexity" in " ".join(done.out.split()) and "hc_smoe" in done.out


def test_a_finished_run_is_swept_without_being_touched(ran: Ran, coalesce: Command) -> None:
    before = snapshot(ran.run_dir)

    done = coalesce("sweep", ran.recipe(**options()), "--quiet")

    assert done.code == 0, done.err
    after = snapshot(ran.run_dir)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"sweep.json", "sweep.png", "sweep.svg"}


def test_pairs_that_cannot_be_say_why(ran: Ran, coalesce: Command) -> None:
    changes = options(methods=["reap", "ream"], ratios=[1 / EXPERTS], target_bytes=[10])
    done = coalesce("sweep", ran.recipe(**changes))

    assert done.code == 0, done.err
    one, small, merged, also = found(ran.run_dir)
    assert f"fewer than the {TOP_K}" in one["refused"]
    assert "the smallest possible output" in small["refused"]
    assert "the smallest possible output" in also["refused"]
    assert merged["experts"] == {str(layer): 1 for layer in range(LAYERS)}
    assert f"reap {1 / EXPERTS}: 1 experts per layer" in done.out


def test_a_divided_budget_is_used_up_and_predicted_to_cost_less(
    ran: Ran, coalesce: Command
) -> None:
    method = {"method": "coalesce", "multiple": 2}
    methods = [method, method | {"divide": "predicted"}, method | {"divide": "probe"}]
    done = coalesce("sweep", ran.recipe(sweep={"methods": methods, "ratios": [0.5]}), "--quiet")

    assert done.code == 0, done.err
    even, divided, probed = found(ran.run_dir)
    assert sum(divided["width"].values()) == sum(even["width"].values())
    assert divided["predicted_error"]["mean"] <= even["predicted_error"]["mean"]
    assert (even["format"], divided["format"]) == ("native", "mapped")
    assert "cannot read what was probed" in probed["refused"]


@pytest.mark.slow
def test_chosen_points_have_the_bytes_that_were_promised(ran: Ran, coalesce: Command) -> None:
    held = {"sources": [{"path": str(ran.made.text), "domain": "prose"}], "tokens": 256}
    evaluate = {"data": held | {"sequence_length": 16}, "kl_positions": 32, "baselines": []}
    statistics = str(ran.run_dir / "statistics.arrow")
    recipe = ran.recipe(
        run_dir=str(ran.root / "swept"),
        evaluate=evaluate,
        calibrate__statistics=statistics,
        **options(build=["reap:0.5"]),
    )
    done = coalesce("sweep", recipe, "--quiet", "--build", "mc_smoe:0.5")

    assert done.code == 0, done.err
    points = {
        (p["method"], p["config"]["budget"]["keep_ratio"]): p for p in found(ran.root / "swept")
    }
    for name in ("reap", "mc_smoe scope=global"):
        point = points[name, 0.5]
        assert point["measured"]["bytes"] == point["bytes"]
        assert point["measured"]["perplexity"] > 1 and point["measured"]["kl"] > 0
    assert points["coalesce multiple=4", 0.5]["measured"] is None
    built = sorted(path.name for path in (ran.root / "swept" / "sweep").iterdir())
    assert built == ["mc_smoe-scope=global-0.5", "reap-0.5"]
    assert not (ran.root / "swept" / "sweep" / "reap-0.5" / "calibration" / "shards").exists()
    # Again: nothing is built anew, and what was measured is still there.
    assert coalesce("sweep", recipe, "--quiet").code == 0
    assert sum(p["measured"] is not None for p in found(ran.root / "swept")) == 2


@pytest.mark.parametrize(
    ("section", "words", "message"),
    [
        ({"methods": ["reep"]}, (), "sweep.methods: 'reep' is no method; valid: coalesce"),
        ({"methods": [{"method": "reap", "task": {"a": 1}}]}, (), "set group.task"),
        ({"methods": ["reap"]}, ("--build", "reap:0.3"), "names no point of the sweep"),
        ({"methods": ["reap"], "ratios": [0.125]}, ("--build", "reap:0.125"), "cannot be built"),
    ],
)
def test_mistakes_are_refused(
    section: dict[str, Any], words: tuple[str, ...], message: str, ran: Ran, coalesce: Command
) -> None:
    done = coalesce("sweep", ran.recipe(sweep=section), *words)
    assert done.code == 2 and message in done.err
    assert not (ran.run_dir / "sweep").exists()
