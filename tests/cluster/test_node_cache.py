"""Two nodes, a disk each: a weight file comes once from the store, and later stages find it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cluster.executor import Job
from cluster.placement import Homes
from cluster.ray import RayExecutor
from models.checkpoint import INDEX
from models.moe import MoeCheckpoint
from models.remote.origin import catalogue, held_here
from orchestrator.events import EventLog
from orchestrator.scheduler import Scheduler
from stages.export.config import ExportConfig
from stages.export.layout import placeholder
from stages.transform import stage as transform
from stages.verify import stage as verify
from tests.s3 import Store, serving, talking_to
from tests.tiny import EXPERTS, save_tiny, transform_units

pytestmark = pytest.mark.slow
LAYERS = 8


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with serving() as started, talking_to(started):
        yield started


@pytest.fixture
def disks(tmp_path: Path) -> dict[str, Path]:
    return {name: tmp_path / name for name in ("one", "two")}


@pytest.fixture
def executor(store: Store, disks: dict[str, Path]) -> Iterator[RayExecutor]:
    """Two nodes of one CPU, each with a disk of its own in its environment."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 << 20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NODE_DISK", str(disks["one"]))
        head = {"node_ip_address": "127.0.0.23"} | node
        cluster = Cluster(initialize_head=True, head_node_args=head)
        patch.setenv("NODE_DISK", str(disks["two"]))
        cluster.add_node(node_ip_address="127.0.0.24", **node)
        try:
            with RayExecutor(address=cluster.address) as started:
                yield started
        finally:
            cluster.shutdown()


def a_file_per_layer(folder: Path) -> Path:
    """A checkpoint whose files are its layers, and one for the rest."""
    save_tiny(folder, "mixtral", num_hidden_layers=LAYERS)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = [name.split(".")[2] if ".layers." in name else "rest" for name in sorted(tensors)]
    where = dict(zip(sorted(tensors), parts, strict=True))
    for part in set(parts):
        held = {name: tensors[name] for name in where if where[name] == part}
        save_file(held, folder / f"{part}.safetensors", metadata={"format": "pt"})
    weight_map = {name: f"{part}.safetensors" for name, part in where.items()}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@dataclass(frozen=True)
class Wake:
    """A unit that leaves its process as others leave it: with the libraries in memory."""

    name: str = "wake"


def make_wake() -> Callable[[Wake], None]:
    def wake(_: Wake) -> None:
        # Loaded for their weight alone: nothing of them is used.
        import s3fs  # noqa: F401
        import torch  # noqa: F401

        time.sleep(0.5)

    return wake


def fetched(disks: dict[str, Path]) -> list[str]:
    return sorted(path.name for disk in disks.values() for path in disk.rglob("*.safetensors"))


def test_the_layers_are_written_where_they_were_verified(
    executor: RayExecutor, store: Store, disks: dict[str, Path], tmp_path: Path
) -> None:
    local = MoeCheckpoint.open(a_file_per_layer(tmp_path / "model"))
    url = store.upload(tmp_path / "model", f"{store.bucket('layers')}/model")
    moe = MoeCheckpoint.open(catalogue(url, tmp_path / "run" / "fetched", "$NODE_DISK/cache"))
    dict(executor.imap(Job(make_wake), [Wake()] * 6))
    scheduler = Scheduler(executor, EventLog(tmp_path / "events.jsonl"), 0)
    scheduler.run("verify", verify.plan(moe.checkpoint, tmp_path / "verify"), verify.run_one, 0)
    names = sorted(moe.checkpoint.files)
    assert fetched(disks) == names
    assert all(len(fetched({"": disk})) >= 2 for disk in disks.values())

    decisions = placeholder(moe, dict.fromkeys(moe.layers, EXPERTS // 2))
    units = transform_units(moe, decisions, tmp_path / "run", ExportConfig())
    scheduler.run("transform", units, transform.run_one, 0)
    # At the end a node that has nothing left to do may take over what the other would read.
    assert len(fetched(disks)) <= len(names) + 3
    # Another driver begins with what the nodes say that they hold.
    executor.homes = Homes()
    executor.locate(partial(held_here, moe.checkpoint.folder))
    before = len(fetched(disks))
    again = transform_units(moe, decisions, tmp_path / "again", ExportConfig())
    scheduler.run("transform", again, transform.run_one, 0)
    assert len(fetched(disks)) <= before + 3
    plain = transform_units(local, decisions, tmp_path / "plain", ExportConfig())
    for unit, alike in zip(units, plain, strict=True):
        transform.run_one(alike)
        assert unit.output.read_bytes() == alike.output.read_bytes()
