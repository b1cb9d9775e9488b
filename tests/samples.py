"""Samples of layer inputs on disk, as the inputs stage writes them."""

from __future__ import annotations

from pathlib import Path

from models.atomic import file_digest
from models.tensors import write_tensors
from stages.inputs.read import LayerInputs


def store(inputs: LayerInputs, path: Path) -> tuple[Path, str]:
    """Writes a sample; its path and digest are what a transform unit is given."""
    kinds = ("hidden", "ids", "gates", "logits", "block", "position", "domain")
    metadata = {"layer": inputs.layer, "domains": list(inputs.domains), "seed": 0, "inputs": {}}
    write_tensors(path, {kind: getattr(inputs, kind) for kind in kinds}, metadata)
    return path, file_digest(path)
