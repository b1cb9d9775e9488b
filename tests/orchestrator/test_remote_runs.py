"""Whole runs whose model and text lie in an S3 store, and whose result goes there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.load import load
from orchestrator.preflight import prepare
from orchestrator.run import run
from tests.orchestrator.tiny_run import Command, Inputs, snapshot
from tests.s3 import KEY, SECRET, Store, serving, talking_to

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with serving() as started, talking_to(started):
        yield started


def remote_recipe(inputs: Inputs, store: Store, bucket: str, **changes: Any) -> Path:
    """The recipe with model, calibration and evaluation text in the store."""
    url = store.bucket(bucket)
    store.upload(inputs.model, f"{url}/model")
    store.put(f"{url}/text/text.jsonl", inputs.text.read_bytes())
    sources = [{"path": f"{url}/text/text.jsonl", "domain": "prose"}]
    return inputs.recipe(
        model__path=f"{url}/model",
        calibrate__data__sources=sources,
        **evaluated(sources),
        **changes,
    )


def evaluated(sources: list[dict[str, Any]]) -> dict[str, Any]:
    data = {"sources": sources, "tokens": 256, "sequence_length": 16}
    return {"evaluate": {"data": data, "baselines": ["reap"], "kl_positions": 32}}


def output_of(run_dir: Path) -> dict[str, str]:
    """Digests of the checkpoint; the card tells where the model came from."""
    return {n: d for n, d in snapshot(run_dir / "output").items() if n != "README.md"}


def test_a_run_from_and_to_s3_has_the_bytes_of_a_local_one(
    inputs: Inputs, store: Store, coalesce: Command
) -> None:
    local = inputs.recipe(
        run_dir=str(inputs.root / "local"),
        **evaluated([{"path": str(inputs.text), "domain": "prose"}]),
    )
    run(prepare(load(str(local)).config))
    recipe = remote_recipe(inputs, store, "whole", upload={"url": "s3://whole/out"})
    outcome = coalesce("run", recipe)
    assert outcome.code == 0, outcome.err
    assert output_of(inputs.run_dir) == output_of(inputs.root / "local")
    sent = store.objects("s3://whole/out")
    output = inputs.run_dir / "output"
    assert set(sent) == {path.name for path in output.iterdir()} | {"coalesce.json"}
    assert all(sent[path.name] == path.read_bytes() for path in output.iterdir())
    assert leaked(inputs.run_dir, SECRET, KEY) == []


def leaked(folder: Path, *secrets: str) -> list[Path]:
    return [
        path
        for path in folder.rglob("*")
        if path.is_file() and any(each.encode() in path.read_bytes() for each in secrets)
    ]
