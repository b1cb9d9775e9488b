"""A training by two ranks on a real Ray: what one process makes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cluster.executor import Job, Replicas
from cluster.ray import RayExecutor
from models.checkpoint import Checkpoint
from stages.recover.ranks import Ranks
from stages.recover.stage import TrainUnit, make_rank, make_trainer, run_train
from stages.unit import execute
from tests.stages.recover.small import Small, config, make

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def unit_of(small: Small, folder: Path, **changes: Any) -> TrainUnit:
    files = Checkpoint.open(small.student).files
    return TrainUnit(
        student=small.student,
        needs_code=False,
        corpus=small.corpus,
        taught=(),
        config=config(alpha=0, **changes),
        files=tuple((name, folder / "layers" / name) for name in files),
        folder=folder,
        inputs=(),
    )


def test_ranks_on_ray_train_what_one_process_trains(tmp_path: Path) -> None:
    small = make(tmp_path)
    alone = unit_of(small, tmp_path / "alone")
    run_train(alone, Ranks())
    two = unit_of(small, tmp_path / "two", ranks=2, deepspeed={"zero_stage": 2})
    assert two.fingerprint == alone.fingerprint
    job: Job[Any, Any] = Job(make_trainer, stateful=True, replicas=Replicas(2, make_rank))
    with RayExecutor(workers=2) as executor:
        ((_, done),) = executor.imap(job, [two])
        # Finished: neither rank trains again.
        ((_, again),) = executor.imap(job, [two])
    assert done.result["steps"] == 6 and not done.resumed and again.resumed
    for (_, ours), (_, theirs) in zip(two.files, alone.files, strict=True):
        found, expected = load_file(ours), load_file(theirs)
        for name, tensor in expected.items():
            assert torch.allclose(found[name], tensor, atol=2e-5, rtol=1e-4), name
    # A third start, by one process: it is done.
    assert execute(replace(two, config=alone.config), lambda _: {}).resumed
