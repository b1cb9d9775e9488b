"""Expert-parallel replicas in a whole run, and what is refused before one is started."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from models.moe import MoeCheckpoint
from orchestrator import estimate, preflight
from orchestrator.engine import choose, worker_count
from orchestrator.errors import ConfigError, RunFolderError
from orchestrator.events import Event
from orchestrator.load import load
from orchestrator.preflight import Prepared, prepare
from orchestrator.run import observe
from orchestrator.run_folder import settled
from stages.calibrate.observer import INTEGERS
from stages.calibrate.statistics import domain_sums, metadata_of, read_statistics
from tests.orchestrator.tiny_run import Inputs

RANKS = {"kind": "ray", "workers": 4, "ranks_per_replica": 2}
ALONE = {"kind": "local"}


def prepared(inputs: Inputs, name: str, executor: dict[str, Any], **calibrate: Any) -> Prepared:
    """A run in a folder of its own, in six shards."""
    changes = {f"calibrate__{key}": value for key, value in calibrate.items()}
    run_dir = str(inputs.root / name)
    recipe = inputs.recipe(
        executor=executor, run_dir=run_dir, calibrate__shards=6, calibrate__batch_size=2, **changes
    )
    return prepare(load(str(recipe)).config)


class Killed(Exception):
    """The driver is gone."""


def observe_until(run: Prepared, shards: int) -> None:
    """Observes and ends the driver when so many shards are done."""

    def listen(event: Event) -> None:
        if event["event"] == "unit_done" and event["stage"] == "calibrate":
            done.append(event)
            if len(done) == shards:
                raise Killed

    done: list[Event] = []
    with pytest.raises(Killed):
        observe(run, [listen])


@pytest.mark.slow
def test_any_number_of_replicas_and_ranks_continues_a_run_to_the_same_bytes(
    inputs: Inputs,
) -> None:
    expected = observe(prepared(inputs, "alone", ALONE)).read_bytes()

    observe_until(prepared(inputs, "first-ranks", RANKS), shards=3)
    found = observe(prepared(inputs, "first-ranks", ALONE))
    assert found.read_bytes() == expected

    observe_until(prepared(inputs, "first-alone", ALONE), shards=3)
    found = observe(prepared(inputs, "first-alone", RANKS, engine="streaming"))
    assert found.read_bytes() == expected
    lines = (found.parent / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    units = [each for each in events if each["event"] == "unit_done"]
    resumed = [each["resumed"] for each in units if each["stage"] == "calibrate"]
    assert resumed[:3] == [False] * 3 and sorted(resumed[3:]) == [False] * 3 + [True] * 3


@pytest.mark.slow
def test_autoep_is_marked_and_does_not_mix_with_others(inputs: Inputs) -> None:
    found = read_statistics(observe(prepared(inputs, "autoep", RANKS, backend="autoep")))
    assert metadata_of(found)["backend"] == "autoep-2"

    expected = domain_sums(read_statistics(observe(prepared(inputs, "alone", ALONE))))
    for key, sums in domain_sums(found).items():
        for name, values in sums.items():
            if name in INTEGERS:
                assert np.array_equal(expected[key][name], values), name
            else:
                np.testing.assert_allclose(values, expected[key][name], rtol=1e-5, atol=1e-6)
    with pytest.raises(RunFolderError, match=r"config\.calibrate\.backend was .*autoep-2"):
        prepared(inputs, "autoep", RANKS)


def test_autoep_needs_ranks_and_whole_models(inputs: Inputs) -> None:
    with pytest.raises(ConfigError, match="autoep needs executor"):
        prepared(inputs, "run", ALONE, backend="autoep")
    with pytest.raises(ConfigError, match="autoep cannot stream"):
        prepared(inputs, "run", RANKS, backend="autoep", engine="streaming")
    run = prepared(inputs, "run", RANKS, backend="autoep", memory_bytes=1)
    assert choose(run).engine == "resident"


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


def test_ranks_are_no_part_of_what_a_run_is(inputs: Inputs) -> None:
    one = load(str(inputs.recipe())).config
    two = load(str(inputs.recipe(executor=RANKS))).config
    assert settled(two) == settled(one)


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


@pytest.mark.parametrize(("memory", "engine"), [(1, "streaming"), (1 << 40, "resident")])
def test_the_engine_of_ranks_is_chosen_by_the_memory_of_one(
    inputs: Inputs, memory: int, engine: str
) -> None:
    choice = choose(prepared(inputs, "run", RANKS, memory_bytes=memory))
    assert choice.engine == engine
    assert choice.why.startswith("one of 2 ranks needs about")


@pytest.mark.parametrize(
    ("workers", "ranks", "shards", "processes"), [(4, 2, 6, 4), (5, 2, 6, 4), (8, 2, 3, 6)]
)
def test_free_memory_is_shared_by_all_ranks(
    inputs: Inputs, workers: int, ranks: int, shards: int, processes: int
) -> None:
    executor = {"kind": "ray", "workers": workers, "ranks_per_replica": ranks}
    run = prepare(load(str(inputs.recipe(executor=executor, calibrate__shards=shards))).config)
    assert worker_count(run) == processes
