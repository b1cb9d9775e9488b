"""What differs between model families on disk: names and the config key that counts experts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from models.errors import CheckpointError

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Family:
    """Naming of one model family with gated three-matrix experts stored one by one.

    `block` is the MoE block on disk relative to its decoder layer, `memory_block` the same module
    in transformers. `expert_names` maps the fields of `models.expert.Expert` to tensor names.
    """

    model_type: str
    block: str
    memory_block: str = "mlp"
    router: str = "gate.weight"
    expert_names: dict[str, str] = field(
        default_factory=lambda: {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    )
    # transformers wrote either key into config.json over the years; all present ones are updated.
    count_keys: tuple[str, ...] = ("num_local_experts", "num_experts")
    intermediate_key: str = "moe_intermediate_size"

    def block_prefix(self, layer: int) -> str:
        """Disk prefix of the MoE block of a layer, with the final dot."""
        return f"model.layers.{layer}.{self.block}."

    def router_name(self, layer: int) -> str:
        """Disk name of the router weight `[E, H]`."""
        return self.block_prefix(layer) + self.router

    def expert_name(self, layer: int, expert: int, part: str) -> str:
        """Disk name of one matrix of one expert; `part` is gate, up or down."""
        return f"{self.block_prefix(layer)}experts.{expert}.{self.expert_names[part]}.weight"

    def expert_tensor_names(self, layer: int, expert: int) -> dict[str, str]:
        """Field of `Expert` -> disk name."""
        return {part: self.expert_name(layer, expert, part) for part in self.expert_names}

    def moe_layers(self, names: Iterable[str]) -> tuple[int, ...]:
        """Layers that have a router, in ascending order."""
        pattern = re.compile(rf"^model\.layers\.(\d+)\.{re.escape(f'{self.block}.{self.router}')}$")
        return tuple(sorted(int(m[1]) for name in names if (m := pattern.match(name))))

    def is_moe_tensor(self, name: str) -> bool:
        """True for routers and routed experts; shared experts belong to the dense rest."""
        block = re.escape(self.block)
        tail = rf"(?:experts\.|{re.escape(self.router)}$)"
        return re.match(rf"^model\.layers\.\d+\.{block}\.{tail}", name) is not None

    def memory_name(self, name: str) -> str:
        """The name that transformers gives a (non-expert) tensor in memory."""
        return re.sub(
            rf"^(model\.layers\.\d+)\.{re.escape(self.block)}\.", rf"\1.{self.memory_block}.", name
        )

    def num_experts(self, config: dict[str, Any]) -> int:
        """E, from config.json.

        Raises:
            CheckpointError: no key of this family counts the experts.
        """
        for key in self.count_keys:
            if isinstance(config.get(key), int):
                return int(config[key])
        raise CheckpointError(
            f"config.json of a {self.model_type} model has none of {', '.join(self.count_keys)}"
        )

    def top_k(self, config: dict[str, Any]) -> int:
        """Experts per token.

        Raises:
            CheckpointError: config.json does not say.
        """
        if not isinstance(config.get("num_experts_per_tok"), int):
            raise CheckpointError("config.json has no num_experts_per_tok")
        return int(config["num_experts_per_tok"])

    def with_num_experts(self, config: dict[str, Any], count: int) -> dict[str, Any]:
        """config.json with `count` experts per layer.

        Without `auto_map`: the code it points to is never copied, and the family's own class fits.
        """
        counts = {key: count for key in self.count_keys if key in config}
        return {key: value for key, value in config.items() if key != "auto_map"} | counts


def layer_of(name: str) -> int | None:
    """Decoder layer that a tensor belongs to; None for embeddings, final norm and head."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None
