"""A mapped checkpoint written out in the family's own form, one layer at a time.

Every slot of the original router gets its expert, U V + S as whole matrices: the same function for
engines that know no map and no factors, in a checkpoint as large as the original.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from models.atomic import attempt, write_json
from models.checkpoint import INDEX, Checkpoint
from models.errors import CheckpointError
from models.expert import Expert
from models.factored import Axis, Factored
from models.families import Family, find_family
from models.mapped.registration import stems
from stages.export.stage import is_companion, target_name

_PREFIX = "coalesce_"
# What config.json of a mapped checkpoint has beside the family's own keys.
_OWN = ("auto_map", "experts_per_layer", "expert_width", "expert_factors", "factor_axis")
_FIELDS = ("gate", "up", "down")


@dataclass(frozen=True)
class Mapped:
    """A mapped checkpoint that was opened, and the family that it came from."""

    checkpoint: Checkpoint
    family: Family
    config: dict[str, Any]  # of the plain model

    @classmethod
    def open(cls, folder: Path) -> Mapped:
        """Reads headers and config.

        Raises:
            CheckpointError: another format, or narrowed experts.
        """
        checkpoint = Checkpoint.open(folder)
        kind = str(checkpoint.config.get("model_type", ""))
        name = kind.removeprefix(_PREFIX)
        if not kind.startswith(_PREFIX) or name not in stems():
            raise CheckpointError(
                f"{folder} is no mapped checkpoint: its model type is {kind!r}",
                "give the folder that a run with export.format=mapped wrote",
            )
        if checkpoint.config.get("expert_width") is not None:
            raise CheckpointError(
                f"{folder} has experts of {checkpoint.config['expert_width']} neurons, which not"
                " every family can give to its routed experts alone",
                "narrow with export.format=native, which finds that out",
            )
        kept = {key: value for key, value in checkpoint.config.items() if key not in _OWN}
        config = kept | {"model_type": name, "architectures": [f"{stems()[name]}ForCausalLM"]}
        family = find_family(config)
        if family.auto_map:
            config["auto_map"] = dict(family.auto_map)
        return cls(checkpoint, family, config)

    @property
    def layers(self) -> list[int]:
        """MoE layers, ascending."""
        return sorted(int(layer) for layer in self.checkpoint.config["experts_per_layer"])

    def layer(self, layer: int) -> dict[str, Tensor]:
        """Disk name -> tensor of all routed experts of a layer, E of them."""
        start = f"{self.family.memory_prefix(layer)}experts."
        names = [name for name in self.checkpoint.tensors if name.startswith(start)]
        found = {n.removeprefix(start): t for n, t in self.checkpoint.read(names).items()}
        if "expert_map" not in found:
            raise CheckpointError(f"{start}expert_map is missing from {self.checkpoint.folder}")
        slots = found.pop("expert_map").tolist()
        try:
            made = list(self._experts(layer, found))
        except KeyError as error:
            raise CheckpointError(
                f"{start}{error.args[0]} is missing from {self.checkpoint.folder}",
                "download the checkpoint again",
            ) from error
        # safetensors stores no aliases: every slot needs memory of its own.
        copies = [made[slot].map(Tensor.clone) for slot in slots]
        prefix = self.family.block_prefix(layer)
        return {prefix + name: t for name, t in self.family.experts.pack(copies).items()}

    def _experts(self, layer: int, found: Mapping[str, Tensor]) -> Iterator[Expert]:
        count = self.checkpoint.config["experts_per_layer"][str(layer)]
        factors = (self.checkpoint.config.get("expert_factors") or {}).get(str(layer))
        axis: Axis = "columns" if self.checkpoint.config.get("factor_axis") == "columns" else "rows"
        for expert in range(count):
            if factors is not None:
                yield Expert(**{field: _dense(found, field, expert, axis) for field in _FIELDS})
                continue
            storage = self.family.memory_experts
            assert storage is not None
            pieces = storage.pieces(expert).items()
            parts = {part: found[name.removeprefix("experts.")][i] for part, (name, i) in pieces}
            yield storage.unpack(parts)

    def disk_name(self, name: str) -> str:
        """The family's name on disk of a tensor that is no routed expert."""
        layer = self.family.layer_of(name)
        if layer is None or not name.startswith(self.family.memory_prefix(layer)):
            return name
        inner = name.removeprefix(self.family.memory_prefix(layer))
        block = self.family.block_prefix(layer)
        routers = {self.family.memory_name(each): each for each in self.family.router_axes(layer)}
        return routers.get(name, block + inner)


def _dense(found: Mapping[str, Tensor], field: str, expert: int, axis: Axis) -> Tensor:
    """One matrix of one expert from its stacked factors."""
    part = {n: found[f"{field}_proj.{n}"][expert] for n in ("u", "v")}
    if f"{field}_proj.s" in found:
        index, kept = (found[f"{field}_proj.{n}"][expert] for n in ("index", "s"))
    else:
        index = part["u"].new_empty(0).long()
        kept = part["u"].new_empty(0, 0)
    return Factored(part["u"], part["v"], index, kept, axis).dense()


def densify(source: Path, target: Path) -> int:
    """Writes `target` from the mapped checkpoint `source`; returns the bytes of its weights.

    Raises:
        CheckpointError: the source is of another kind, or the target is not empty.
    """
    mapped = Mapped.open(source)
    if target.exists() and any(target.iterdir()):
        raise CheckpointError(f"{target} is not empty", "name a folder that is not there yet")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.{attempt()}.tmp")
    staging.mkdir()
    try:
        total = _write(mapped, staging)
        os.replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return total


def _write(mapped: Mapped, folder: Path) -> int:
    from safetensors.torch import save_file

    layers: list[int | None] = [*mapped.layers, None]
    weight_map: dict[str, str] = {}
    total = 0
    for index, layer in enumerate(layers):
        tensors = _rest(mapped) if layer is None else mapped.layer(layer)
        name = target_name(index, len(layers))
        contiguous = {n: tensor.contiguous() for n, tensor in tensors.items()}
        save_file(contiguous, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    (folder / "config.json").write_text(json.dumps(mapped.config, indent=2, sort_keys=True) + "\n")
    for path in sorted(mapped.checkpoint.folder.iterdir()):
        if is_companion(path):
            shutil.copyfile(path, folder / path.name)
    for path in mapped.family.code:
        shutil.copyfile(path, folder / path.name)
    return total


def _rest(mapped: Mapped) -> dict[str, Tensor]:
    """Everything but routed experts, under the names of the family's files."""
    names = [n for n in mapped.checkpoint.tensors if not mapped.family.is_memory_expert(n)]
    return {mapped.disk_name(n): tensor for n, tensor in mapped.checkpoint.read(names).items()}
