"""Whole runs whose model and text lie in an S3 store, and whose result goes there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.events import read_events
from tests.cluster.faults import Driver, Holds, environment, kill
from tests.orchestrator.tiny_run import Command, Inputs, snapshot
from tests.s3 import KEY, SECRET, Store, serving, talking_to

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


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
    places = {"model__path": f"{url}/model", "calibrate__data__sources": sources}
    return inputs.recipe(**(places | evaluated(sources) | changes))


def evaluated(sources: list[dict[str, Any]]) -> dict[str, Any]:
    data = {"sources": sources, "tokens": 256, "sequence_length": 16}
    return {"evaluate": {"data": data, "baselines": [], "kl_positions": 0}}


def output_of(run_dir: Path) -> dict[str, str]:
    """Digests of the checkpoint; the card tells where the model came from."""
    return {n: d for n, d in snapshot(run_dir / "output").items() if n != "README.md"}


def test_a_run_from_and_to_s3_on_ray_has_the_bytes_of_a_local_one(
    inputs: Inputs, finished: Inputs, store: Store
) -> None:
    remote_recipe(
        inputs,
        store,
        "whole",
        upload={"url": "s3://whole/out"},
        cache={"dir": str(inputs.root / "cache")},
        executor={"kind": "ray", "workers": 2},
    )
    with driver(inputs, store) as remote:
        remote.succeed()
    assert output_of(inputs.run_dir) == output_of(finished.run_dir)
    assert len(list(inputs.root.glob("cache/*/model.safetensors"))) == 1
    assert not list(inputs.run_dir.glob("fetched/*/model.safetensors"))
    sent = store.objects("s3://whole/out")
    output = inputs.run_dir / "output"
    assert set(sent) == {path.name for path in output.iterdir()} | {"coalesce.json"}
    assert all(sent[path.name] == path.read_bytes() for path in output.iterdir())
    assert leaked(inputs.root, SECRET, KEY) == []


def driver(inputs: Inputs, store: Store, holds: Path | None = None) -> Driver:
    return Driver(inputs, inputs.run_dir, env=environment(holds, **store.environment))


@pytest.mark.fault
def test_a_run_killed_while_it_fetches_and_while_it_sends_goes_on(
    inputs: Inputs, store: Store, tmp_path: Path
) -> None:
    inputs.split()
    upload = {"url": "s3://killed/out"}
    remote_recipe(inputs, store, "killed", upload=upload, evaluate=None)
    holds = Holds(tmp_path / "holds")
    holds.want("fetch", r"fetched/\w+/\.part-2\.safetensors\.")
    with driver(inputs, store, holds.folder) as first:
        kill(holds.taken("fetch", first))
        first.process.wait()
    fetched = list(inputs.run_dir.glob("fetched/*/part-*"))
    assert [path.name for path in fetched] == ["part-1.safetensors"]
    before = fetched[0].stat().st_mtime_ns
    assert set(store.objects("s3://killed/out")) == {"coalesce.json"}

    holds.want("send", r"upload/\w+/\.model-00002")
    with driver(inputs, store, holds.folder) as second:
        kill(holds.taken("send", second))
        second.process.wait()
    assert fetched[0].stat().st_mtime_ns == before
    half = store.modified("s3://killed/out")
    assert "model-00001-of-00003.safetensors" in half and "config.json" not in half

    with driver(inputs, store) as third:
        third.succeed()
    sent, output = store.objects("s3://killed/out"), inputs.run_dir / "output"
    assert {n: sent[n] for n in sent if n != "coalesce.json"} == {
        path.name: path.read_bytes() for path in output.iterdir()
    }
    whole = store.modified("s3://killed/out")
    assert whole["model-00001-of-00003.safetensors"] == half["model-00001-of-00003.safetensors"]
    assert whole["config.json"] == max(whole.values())
    assert not list(inputs.run_dir.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__path": "s3://no-such-bucket/model"}, "there is nothing at s3://no-such-bucket"),
        ({"model__path": "s3://refused/none"}, "s3://refused/none is no checkpoint"),
        ({"upload": {"url": "s3://no-such-bucket/out"}}, "there is nothing at s3://no-such"),
        ({"upload": {"url": "s3://refused/model"}}, "is not empty and does not belong to this run"),
        (
            {"calibrate__data__sources": [{"path": "s3://refused/text/*.parquet"}]},
            "there is no text at s3://refused/text/*.parquet",
        ),
    ],
)
def test_what_is_not_there_is_one_message_before_any_work(
    inputs: Inputs, store: Store, coalesce: Command, changes: dict[str, Any], message: str
) -> None:
    if "refused" not in [each["Name"] for each in store.client.list_buckets()["Buckets"]]:
        remote_recipe(inputs, store, "refused")
    before = store.objects("s3://refused")
    outcome = coalesce("run", inputs.recipe(**changes))
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert not (inputs.run_dir / "events.jsonl").exists()
    assert store.objects("s3://refused") == before


def test_wrong_keys_and_missing_permissions_are_refused_before_any_work(
    inputs: Inputs, coalesce: Command
) -> None:
    with serving() as server:
        recipe = remote_recipe(inputs, server, "guarded", evaluate=None)
        reader, stranger = server.users(reader="s3:*", stranger="s3:ListAllMyBuckets")
        wrong = replace(reader, secret="wrong/" + SECRET)
        for who, said in ((wrong, "SignatureDoesNotMatch|signature"), (stranger, "Access ?Denied")):
            with talking_to(who):
                outcome = coalesce("run", recipe)
            assert outcome.code == 2, outcome.err
            assert "the store refuses access to s3://guarded/model" in outcome.err
            assert re.search(said, outcome.err) and who.secret not in outcome.err
            assert not (inputs.run_dir / "events.jsonl").exists()
        with talking_to(reader):
            assert coalesce("validate", recipe).code == 0


def test_a_store_that_is_down_is_for_another_time(inputs: Inputs, coalesce: Command) -> None:
    with serving() as server:
        recipe = remote_recipe(inputs, server, "down", evaluate=None)
    with talking_to(server):
        outcome = coalesce("run", recipe)
    assert outcome.code == 75 and "no answer for s3://down/model" in outcome.err


def test_a_finished_run_is_sent_later_and_read_from_a_cache_as_the_same_model(
    finished: Inputs, coalesce: Command, tmp_path: Path
) -> None:
    run_dir, target = tmp_path / "run", tmp_path / "store" / "out"
    shutil.copytree(finished.run_dir, run_dir)
    inputs = Inputs(tmp_path)
    same = {
        "model__path": str(finished.model),
        "calibrate__data__sources": [{"path": str(finished.text), "domain": "prose"}],
        "upload": {"url": f"file://{target}"},
    }
    cache = {"dir": str(tmp_path / "cache"), "local_paths": True}
    recipe = inputs.recipe(**same, cache=cache)
    outcome = coalesce("run", recipe)
    assert outcome.code == 0, outcome.err
    output = run_dir / "output"
    assert {path.name for path in target.iterdir()} == {
        "coalesce.json",
        *(path.name for path in output.iterdir()),
    }
    started, *ended = [
        each["resumed"]
        for each in read_events(run_dir / "events.jsonl")
        if each["event"] == "unit_done" and each.get("stage") == "verify"
    ]
    # Other tests may have gone on with this run before.
    assert not started and ended and all(ended)
    # Another run may not write there.
    other = inputs.recipe(**same, run_dir=str(tmp_path / "other"))
    outcome = coalesce("run", other)
    assert outcome.code == 2 and "does not belong to this run" in outcome.err
    assert not (tmp_path / "other").exists()


def leaked(folder: Path, *secrets: str) -> list[Path]:
    return [
        path
        for path in folder.rglob("*")
        if path.is_file() and any(each.encode() in path.read_bytes() for each in secrets)
    ]
