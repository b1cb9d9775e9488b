"""What real ranks of a training do in tests (`tests/cluster/ranks.py` starts them)."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from stages.recover.config import PruneConfig, RecoverConfig
from stages.recover.ranks import Ranks
from tests.cluster.ranks import main, torch_save


def training(folder: Path, name: str) -> Any:
    """The training that `folder/NAME.json` describes."""
    from models.mapped.registration import register
    from stages.recover.trainer import Training

    register()
    wanted = json.loads((folder / f"{name}.json").read_text())
    return Training(
        student=Path(wanted["student"]),
        needs_code=False,
        corpus=Path(wanted["corpus"]),
        taught=tuple(map(Path, wanted["taught"])),
        config=RecoverConfig(**wanted["config"]),
        folder=folder / name,
        prune=PruneConfig(**wanted["prune"]) if wanted.get("prune") else None,
    )


def train(folder: Path, group: Any) -> None:
    """Trains what `job.json` describes; every rank writes what it has in the end."""
    from stages.recover.trainer import train

    done = train(training(folder, "job"), Ranks(group))
    found = {"step": done.step, "values": done.values, "kept": done.kept}
    torch_save(found, folder / f"rank-{group.rank}.pt")


def open_dealt_out(folder: Path, group: Any) -> None:
    """Opens the student alone; every rank writes what it holds of each value, and its size."""
    from stages.recover.opened import open_student

    found = training(folder, "job")
    model = open_student(found.student, found.config, Ranks(group), needs_code=True)
    sizes = {
        name: [value.numel(), value.ds_tensor.numel(), value.ds_numel]
        for name, value in model.named_parameters()
    }
    (folder / f"rank-{group.rank}.json").write_text(json.dumps(sizes))


def write(folder: Path, group: Any) -> None:
    """Trains, and writes the files."""
    from stages.recover.stage import TrainUnit, run_train

    found = training(folder, "job")
    unit = TrainUnit(
        student=found.student,
        needs_code=True,
        corpus=found.corpus,
        taught=(),
        config=found.config,
        files=(("model.safetensors", folder / "trained.safetensors"),),
        folder=found.folder,
        inputs=(),
    )
    run_train(unit, Ranks(group))


def die_after(folder: Path, group: Any) -> None:
    """Trains, and is killed on all ranks once four states were due."""
    from stages.recover.trainer import Loop

    found = training(folder, "job")
    loop = Loop(found, Ranks(group))
    while loop.step < 5:
        loop.advance()
        if loop.step % found.config.checkpoint_every == 0:
            loop.save()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(globals())
