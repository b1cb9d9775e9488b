"""An SMoE checkpoint: family, dimensions, and its layers one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from models.checkpoint import FLOAT_BYTES, Checkpoint, TensorInfo
from models.errors import CheckpointError
from models.expert import Expert
from models.families import Family, find_family
from models.quantised import Dequantised, dequantised


@dataclass(frozen=True)
class MoeCheckpoint:
    """A checkpoint of a known family whose expert grid is complete and of one shape."""

    checkpoint: Checkpoint
    family: Family
    layers: tuple[int, ...]
    num_experts: int
    top_k: int

    @classmethod
    def open(cls, folder: Path, *, allow_links: bool = False) -> MoeCheckpoint:
        """Reads headers, finds the family, checks that every expert tensor is there.

        Raises:
            CheckpointError: what is missing, extra or of the wrong shape or dtype.
        """
        stored = Checkpoint.open(folder, allow_links=allow_links)
        family = find_family(stored.config)
        checkpoint = dequantised(stored)
        layers = family.moe_layers(checkpoint.tensors)
        if not layers:
            raise CheckpointError(
                f"{folder} has no MoE layer: no tensor is named like {family.router_name(0)}"
            )
        experts, top_k = family.num_experts(checkpoint.config), family.top_k(checkpoint.config)
        if not 0 < top_k <= experts:
            raise CheckpointError(
                f"config.json selects {top_k} of {experts} experts for every token",
                "correct num_experts_per_tok in config.json",
            )
        moe = cls(checkpoint, family, layers, experts, top_k)
        _check_router_groups(moe)
        _check_expert_grid(moe)
        return moe

    @property
    def quantised(self) -> bool:
        """True where the files hold 4 or 8 bits and everything here is decoded from them."""
        return isinstance(self.checkpoint, Dequantised)

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.family.hidden(self.checkpoint.config)

    @property
    def router_groups(self) -> int:
        """Groups of neighbouring experts of which a token first chooses some; mostly 1."""
        return self.family.router_groups(self.checkpoint.config)

    def native_count(self, at_least: int) -> int:
        """The fewest experts, not fewer than asked for, that the family's own router can choose of.

        Every router group must keep the same number: as many as its score needs, and together with
        the other groups that a token may use, top-k.
        """
        groups = self.router_groups
        if groups == 1:
            return max(at_least, self.top_k)
        chosen = int(self.checkpoint.config.get("topk_group") or groups)
        each = max(-(-at_least // groups), -(-self.top_k // chosen))
        return groups * max(each, self.family.fewest_per_router_group)

    def read_expert(self, layer: int, expert: int) -> Expert:
        """One expert, as stored."""
        return self.read_experts(layer, [expert])[0]

    def read_experts(self, layer: int, experts: Sequence[int]) -> list[Expert]:
        """Several experts of a layer, as stored, opening each file once."""
        prefix, storage = self.family.block_prefix(layer), self.family.experts
        wanted = [
            {part: (prefix + name, index) for part, (name, index) in storage.pieces(each).items()}
            for each in experts
        ]
        found = self.checkpoint.read_pieces(p for each in wanted for p in each.values())
        return [storage.unpack({part: found[p] for part, p in each.items()}) for each in wanted]

    def read_router(self, layer: int) -> Tensor:
        """Router weight `[E, H]`, as stored."""
        name = self.family.router_name(layer)
        return self.checkpoint.read([name])[name]

    def router_names(self, layer: int) -> list[str]:
        """Disk names of the router's weight and of the biases that this checkpoint has."""
        axes = self.family.router_axes(layer)
        return [name for name in axes if name in self.checkpoint.tensors]

    def dense_names(self, layer: int | None) -> list[str]:
        """Tensors of a layer besides router and routed experts; None: those outside all layers."""
        return list(self._dense.get(layer, ()))

    @cached_property
    def _dense(self) -> dict[int | None, list[str]]:
        found: dict[int | None, list[str]] = {}
        for name in self.checkpoint.tensors:
            if not self.family.is_moe_tensor(name):
                found.setdefault(self.family.layer_of(name), []).append(name)
        return found

    def home(self, layer: int | None) -> str | None:
        """What units that read this layer on one node have in common (`Checkpoint.home`)."""
        return self.checkpoint.home(
            name for name in self.checkpoint.tensors if self.family.layer_of(name) == layer
        )

    def meta_expert(self, layer: int, expert: int = 0) -> Expert:
        """One expert without memory: shapes and types, from headers alone."""
        names = self.family.expert_tensor_names(layer, expert)
        pieces = self.family.experts.pieces(expert)
        found = {part: self.checkpoint.tensors[name].meta() for part, name in names.items()}
        return self.family.experts.unpack(
            {part: t if pieces[part][1] is None else t[0] for part, t in found.items()}
        )

    def expert_infos(self, layer: int, expert: int = 0) -> dict[str, TensorInfo]:
        """Field of `Expert` -> header entry; of a fused tensor, the expert's share."""
        names = self.family.expert_tensor_names(layer, expert)
        return {
            part: replace(
                self.checkpoint.tensors[names[part]],
                shape=tuple(tensor.shape),
                nbytes=tensor.nbytes,
            )
            for part, tensor in self.meta_expert(layer, expert).tensors().items()
        }

    def expert_bytes(self, layer: int) -> int:
        """Bytes of one routed expert of a layer."""
        return sum(tensor.nbytes for tensor in self.meta_expert(layer).tensors().values())

    def layer_bytes(self, layer: int) -> int:
        """Bytes of everything in a decoder layer."""
        infos = self.checkpoint.tensors.values()
        return sum(info.nbytes for info in infos if self.family.layer_of(info.name) == layer)


def _check_router_groups(moe: MoeCheckpoint) -> None:
    if moe.num_experts % moe.router_groups:
        raise CheckpointError(
            f"config.json divides {moe.num_experts} experts into {moe.router_groups} router groups",
            f"correct {moe.family.router_groups_key} in config.json",
        )


def _check_expert_grid(moe: MoeCheckpoint) -> None:
    """Every (layer, expert, matrix) exists with the shape and dtype the config promises."""
    config, tensors, family = moe.checkpoint.config, moe.checkpoint.tensors, moe.family
    hidden = family.hidden(config)
    expected: dict[str, tuple[int, ...]] = {}
    for layer in moe.layers:
        prefix, width = family.block_prefix(layer), family.width(config, layer)
        expected[family.router_name(layer)] = (moe.num_experts, hidden)
        shapes = family.experts.shapes(moe.num_experts, width, hidden)
        expected |= {prefix + name: shape for name, shape in shapes.items()}
    # A layer is known by its router; experts without one show that it is the router that is gone.
    routers = {family.router_name(layer) for layer in _expert_layers(moe)}
    missing = sorted(routers - set(tensors)) + [n for n in expected if n not in tensors]
    extra = [n for n in tensors if family.is_expert_tensor(n) and n not in expected]
    _refuse(missing, "missing", f"config.json promises {moe.num_experts} experts per layer")
    _refuse(extra, "unexpected", f"config.json promises {moe.num_experts} experts per layer")
    for name, shape in expected.items():
        _check_tensor(tensors[name], shape)


def _expert_layers(moe: MoeCheckpoint) -> set[int]:
    names = filter(moe.family.is_expert_tensor, moe.checkpoint.tensors)
    return {layer for name in names if (layer := moe.family.layer_of(name)) is not None}


def _refuse(names: list[str], what: str, why: str) -> None:
    if names:
        raise CheckpointError(
            f"{len(names)} expert tensor(s) {what}, first {names[0]}; {why}",
            "download the checkpoint again, or correct config.json",
        )


def _check_tensor(info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.shape != shape:
        raise CheckpointError(
            f"{info.name} has shape {list(info.shape)}, config.json promises {list(shape)}"
        )
    if info.dtype not in FLOAT_BYTES:
        raise CheckpointError(
            f"{info.name} has dtype {info.dtype}; experts can be merged in"
            f" {', '.join(FLOAT_BYTES)} only",
            "dequantise the checkpoint to bfloat16 first",
        )
