"""An SMoE checkpoint: family, dimensions, and its layers one at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from models.checkpoint import FLOAT_BYTES, Checkpoint, TensorInfo
from models.errors import CheckpointError
from models.expert import Expert
from models.families import Family, find_family, layer_of


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
        checkpoint = Checkpoint.open(folder, allow_links=allow_links)
        family = find_family(checkpoint.config)
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
        _check_expert_grid(moe)
        return moe

    def read_expert(self, layer: int, expert: int) -> Expert:
        """One expert, as stored."""
        return self.read_experts(layer, [expert])[0]

    def read_experts(self, layer: int, experts: list[int]) -> list[Expert]:
        """Several experts of a layer, as stored, opening each file once."""
        names = [self.family.expert_tensor_names(layer, expert) for expert in experts]
        tensors = self.checkpoint.read([n for each in names for n in each.values()])
        return [Expert(**{part: tensors[name] for part, name in each.items()}) for each in names]

    def read_router(self, layer: int) -> Tensor:
        """Router weight `[E, H]`, as stored."""
        name = self.family.router_name(layer)
        return self.checkpoint.read([name])[name]

    def dense_names(self, layer: int | None) -> list[str]:
        """Tensors of a layer besides router and routed experts; None: those outside all layers."""
        names = (n for n in self.checkpoint.tensors if layer_of(n) == layer)
        return [name for name in names if not self.family.is_moe_tensor(name)]

    def expert_infos(self, layer: int, expert: int = 0) -> dict[str, TensorInfo]:
        """Field of `Expert` -> header entry."""
        names = self.family.expert_tensor_names(layer, expert)
        return {part: self.checkpoint.tensors[name] for part, name in names.items()}

    def expert_bytes(self, layer: int) -> int:
        """Bytes of one routed expert of a layer."""
        return sum(info.nbytes for info in self.expert_infos(layer).values())

    def layer_bytes(self, layer: int) -> int:
        """Bytes of everything in a decoder layer."""
        infos = self.checkpoint.tensors.values()
        return sum(info.nbytes for info in infos if layer_of(info.name) == layer)


def _check_expert_grid(moe: MoeCheckpoint) -> None:
    """Every (layer, expert, matrix) exists with the shape and dtype the config promises."""
    config, tensors = moe.checkpoint.config, moe.checkpoint.tensors
    keys = ("hidden_size", moe.family.intermediate_key)
    if absent := [key for key in keys if not isinstance(config.get(key), int)]:
        raise CheckpointError(f"config.json has no {' and no '.join(absent)}")
    hidden, width = (int(config[key]) for key in keys)
    shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    expected: dict[str, tuple[int, ...]] = {}
    for layer in moe.layers:
        expected[moe.family.router_name(layer)] = (moe.num_experts, hidden)
        for expert in range(moe.num_experts):
            names = moe.family.expert_tensor_names(layer, expert)
            expected |= {name: shapes[part] for part, name in names.items()}
    # A layer is known by its router; experts without one show that it is the router that is gone.
    routers = {moe.family.router_name(layer) for layer in _expert_layers(moe)}
    missing = sorted(routers - set(tensors)) + [n for n in expected if n not in tensors]
    extra = [n for n in tensors if moe.family.is_moe_tensor(n) and n not in expected]
    _refuse(missing, "missing", f"config.json promises {moe.num_experts} experts per layer")
    _refuse(extra, "unexpected", f"config.json promises {moe.num_experts} experts per layer")
    for name, shape in expected.items():
        _check_tensor(tensors[name], shape)


def _expert_layers(moe: MoeCheckpoint) -> set[int]:
    names = filter(moe.family.is_moe_tensor, moe.checkpoint.tensors)
    return {layer for name in names if (layer := layer_of(name)) is not None}


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
