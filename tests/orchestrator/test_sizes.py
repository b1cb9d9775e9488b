"""Weights never travel: what a driver hands to workers, and gets back, is small."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import cluster.local
from cluster.executor import Heed, Job, ignore, never
from tests.orchestrator.tiny_run import Command, Inputs

pytestmark = pytest.mark.slow
LIMIT = 16 << 10


def test_units_and_results_of_a_whole_run_are_far_smaller_than_a_layer(
    coalesce: Command, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import cloudpickle

    sizes: dict[str, int] = {}

    class Weighing(cluster.local.LocalExecutor):
        def imap(
            self,
            job: Job[Any, Any],
            units: Sequence[Any],
            stop: Callable[[], bool] = never,
            heed: Heed = ignore,
        ) -> Iterator[tuple[int, Any]]:
            for index, result in super().imap(job, units, stop, heed):
                name = units[index].name
                sizes[name] = len(cloudpickle.dumps((job.make_worker, units[index])))
                sizes[f"result of {name}"] = len(cloudpickle.dumps(result))
                yield index, result

    monkeypatch.setattr(cluster.local, "LocalExecutor", Weighing)
    outcome = coalesce("run", inputs.recipe(), "--quiet")
    assert outcome.code == 0, outcome.err
    layers = Path(inputs.run_dir / "layers").glob("layer-*.safetensors")
    assert min(path.stat().st_size for path in layers) > 2 * LIMIT
    assert len(sizes) > 10
    assert max(sizes.values()) < LIMIT, sorted(sizes.items(), key=lambda item: -item[1])[:5]
    print(f"largest: {max(sizes.values())} bytes")
    shutil.rmtree(inputs.run_dir)
