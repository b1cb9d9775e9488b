"""The per-layer job that joins the shards' sampled inputs, in the order of the corpus.

The file of a layer depends on the sample alone, not on how the corpus was cut into shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.atomic import text_digest
from models.tensors import write_tensors
from stages.calibrate.sampled import KINDS
from stages.calibrate.stage import ShardUnit
from stages.errors import StatisticsError
from stages.unit import Fingerprint, OneFile, read_digests

VERSION = 1
PLACES = ("block", "position", "domain")


@dataclass(frozen=True)
class InputsUnit(OneFile):
    """Joins one layer of all shards."""

    layer: int
    parts: tuple[Path, ...]  # in the order of the corpus
    upstream: str  # digest of all parts
    domains: tuple[str, ...]  # sorted; the sample's `domain` counts in it
    seed: int
    # What the sample was taken from: model, tokenizer and corpus digests.
    inputs: tuple[tuple[str, str], ...]
    output: Path

    @property
    def name(self) -> str:
        """`inputs/layer-00003`."""
        return f"inputs/layer-{self.layer:05d}"

    @property
    def fingerprint(self) -> Fingerprint:
        """The shards' files, which carry everything else."""
        return {"code": f"inputs-{VERSION}", "layer": self.layer, "upstream": self.upstream}


def plan(
    shards: Sequence[ShardUnit], layers: Sequence[int], domains: Sequence[str], folder: Path
) -> list[InputsUnit]:
    """One unit per MoE layer, from finished shards; none when nothing was sampled."""
    if not shards or not shards[0].sample.count:
        return []
    upstream = text_digest([read_digests(unit.marker) for unit in shards])
    return [
        InputsUnit(
            layer=layer,
            parts=tuple(unit.sampled for unit in shards),
            upstream=upstream,
            domains=tuple(domains),
            seed=shards[0].sample.seed,
            inputs=shards[0].inputs,
            output=folder / file_name(layer),
        )
        for layer in layers
    ]


def file_name(layer: int) -> str:
    """`layer-00003.safetensors`."""
    return f"layer-{layer:05d}.safetensors"


def run_one(unit: InputsUnit) -> dict[str, Any]:
    """Writes the layer's file (schema: `stages.inputs.read`).

    Raises:
        StatisticsError: a shard lacks the layer.
    """
    found = [_read(path, unit.layer) for path in unit.parts]
    tensors = {name: torch.cat([each[name] for each in found]) for name in (*KINDS, *PLACES)}
    metadata = {
        "layer": unit.layer,
        "domains": list(unit.domains),
        "seed": unit.seed,
        "inputs": dict(unit.inputs),
    }
    write_tensors(unit.output, tensors, metadata)
    return {"tokens": len(tensors["block"]), "bytes": unit.output.stat().st_size}


def tokens_in(path: Path) -> int:
    """Sampled tokens of a layer's file, from its header; 0: it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            return int(handle.get_slice("block").get_shape()[0])
    except (OSError, SafetensorError):  # who reads it says what is wrong
        return 0


def _read(path: Path, layer: int) -> dict[str, Tensor]:
    """One layer of one shard; the others are not read."""
    from safetensors import SafetensorError, safe_open

    names = {kind: f"{layer}.{kind}" for kind in KINDS} | {name: name for name in PLACES}
    try:
        with safe_open(path, framework="pt") as handle:
            return {kind: handle.get_tensor(name) for kind, name in names.items()}
    except (OSError, SafetensorError) as error:
        raise StatisticsError(f"cannot read layer {layer} from {path}: {error}") from error
