"""One unit per weight file: it can be read to the end, and every value is finite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.atomic import text_digest
from models.checkpoint import Checkpoint
from models.errors import CheckpointError
from stages.unit import Fingerprint

VERSION = 1


@dataclass(frozen=True)
class VerifyUnit:
    """Checks the tensors of one file."""

    checkpoint: Checkpoint
    file: str
    marker: Path

    @property
    def name(self) -> str:
        """`verify/model-00001-of-00019.safetensors`."""
        return f"verify/{self.file}"

    @property
    def outputs(self) -> Sequence[Path]:
        """Nothing but the marker."""
        return ()

    @property
    def fingerprint(self) -> Fingerprint:
        """The file's identity."""
        identity = self.checkpoint.identity(self.file)
        return {"code": f"verify-{VERSION}", "model": {self.file: identity}}

    @property
    def near(self) -> str | None:
        """Where the file is fetched to first, it is read again later."""
        infos = self.checkpoint.tensors.values()
        return self.checkpoint.home(each.name for each in infos if each.file == self.file)


def plan(checkpoint: Checkpoint, folder: Path) -> list[VerifyUnit]:
    """One unit per weight file."""
    return [
        VerifyUnit(checkpoint, file, folder / f"{file.replace('/', '--')}.json")
        for file in checkpoint.files
    ]


def run_one(unit: VerifyUnit) -> dict[str, Any]:
    """Reads the file tensor by tensor.

    Raises:
        CheckpointError: naming the first tensor that holds NaN or infinity.
    """
    infos = [info for info in unit.checkpoint.tensors.values() if info.file == unit.file]
    for info, tensor in unit.checkpoint.stream(infos):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise CheckpointError(
                f"{info.name} in {unit.checkpoint.folder / unit.file} holds {bad:,} values that"
                f" are NaN or infinite, of {tensor.numel():,}",
                "download the file again",
            )
    return {"tensors": len(infos), "bytes": sum(info.nbytes for info in infos)}


def identity(checkpoint: Checkpoint) -> str:
    """Fingerprint of a model: config and the identity of every weight file."""
    files = {file: checkpoint.identity(file) for file in checkpoint.files}
    return text_digest({"config": checkpoint.config, "files": files})
