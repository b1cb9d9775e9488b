"""Expert-parallel replicas in a whole run, and what is refused before one is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.moe import MoeCheckpoint
from orchestrator import estimate, preflight
from orchestrator.errors import ConfigError
from orchestrator.load import load
from orchestrator.preflight import prepare
from orchestrator.run import run
from stages.calibrate.observer import INTEGERS
from stages.calibrate.statistics import domain_sums, metadata_of, read_statistics
from tests.orchestrator.tiny_run import Inputs

RANKS = {"kind": "ray", "workers": 4, "ranks_per_replica": 2}


def statistics_of(inputs: Inputs, name: str, executor: dict[str, Any]) -> Path:
    """Runs into a folder of its own; returns the statistics table."""
    run_dir = inputs.root / name
    changes = {"executor": executor, "run_dir": str(run_dir), "calibrate__shards": 3}
    run(prepare(load(str(inputs.recipe(calibrate__batch_size=4, **changes))).config))
    assert (run_dir / "output" / "config.json").exists()
    return run_dir / "statistics.arrow"


@pytest.mark.slow
def test_two_replicas_of_two_ranks_observe_what_one_process_does(inputs: Inputs) -> None:
    expected = domain_sums(read_statistics(statistics_of(inputs, "local", {"kind": "local"})))

    path = statistics_of(inputs, "replicas", RANKS)

    found = domain_sums(read_statistics(path))
    assert metadata_of(read_statistics(path))["ranks"] == "2"
    assert list(found) == list(expected)
    for key, sums in expected.items():
        for name, values in sums.items():
            if name in INTEGERS:
                assert np.array_equal(found[key][name], values), name
            else:
                np.testing.assert_allclose(found[key][name], values, rtol=1e-6, atol=1e-6)


def test_experts_that_cannot_be_dealt_out_evenly_are_refused(inputs: Inputs) -> None:
    executor = {"kind": "ray", "ranks_per_replica": 3}
    with pytest.raises(ConfigError, match="8 experts per layer cannot be dealt out evenly to 3"):
        prepare(load(str(inputs.recipe(executor=executor))).config)
    assert not inputs.run_dir.exists()


def test_the_refusal_names_what_is_possible(inputs: Inputs) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(load(str(inputs.recipe(executor={"ranks_per_replica": 16}))).config)
    assert caught.value.remedy == "set executor.ranks_per_replica to one of 1, 2, 4, 8"


def test_a_missing_deepspeed_is_named_before_anything_runs(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    prepare(load(str(inputs.recipe())).config)
    with pytest.raises(ConfigError, match="needs DeepSpeed, which is not installed"):
        prepare(load(str(inputs.recipe(executor=RANKS))).config)


def test_replicas_need_ray(inputs: Inputs) -> None:
    executor = {"kind": "local", "ranks_per_replica": 2}
    with pytest.raises(ConfigError, match="ranks_per_replica=2 needs kind=ray"):
        load(str(inputs.recipe(executor=executor)))


def test_fewer_workers_than_ranks_are_refused(inputs: Inputs) -> None:
    executor = {"kind": "ray", "workers": 1, "ranks_per_replica": 2}
    with pytest.raises(ConfigError, match="workers=1 is less than ranks_per_replica=2"):
        load(str(inputs.recipe(executor=executor)))


def test_one_rank_leaves_the_identity_of_a_run_as_it_was(inputs: Inputs) -> None:
    from orchestrator.run_folder import settled

    one = load(str(inputs.recipe())).config
    two = load(str(inputs.recipe(executor=RANKS))).config
    assert "ranks_per_replica" not in settled(one)
    assert settled(two) == settled(one) | {"ranks_per_replica": 2}


def test_a_rank_is_estimated_by_its_part_of_the_experts(inputs: Inputs) -> None:
    executors: list[dict[str, Any]] = [{"kind": "local"}, RANKS]
    whole, rank = (
        estimate.calibrate(prepare(load(str(inputs.recipe(executor=executor))).config), "resident")
        for executor in executors
    )
    moe = MoeCheckpoint.open(inputs.model)
    experts = moe.num_experts * moe.expert_bytes(0)
    # Two layers: half of both is elsewhere, one of them is read whole for the self-check.
    assert rank - whole == -2 * experts // 2 + experts


def test_streaming_by_several_ranks_is_refused(inputs: Inputs) -> None:
    recipe = inputs.recipe(executor=RANKS, calibrate__engine="streaming")
    with pytest.raises(ConfigError, match="streaming runs in one process, ranks_per_replica is 2"):
        prepare(load(str(recipe)).config)
