"""What differs between model families: names on disk and in memory, and keys of config.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from models.errors import CheckpointError
from models.families.storage import GATED, IN_MEMORY, Fused, Storage

# Families and versions of transformers differ in the key that counts experts, and some checkpoints
# carry two of them: the first is read, all that are there are written.
_COUNT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# Engines that predict several tokens read as many extra layers, with as many experts each.
_EXTRA_LAYERS = "num_nextn_predict_layers"


@dataclass(frozen=True)
class RouterTensor:
    """A tensor with an entry per expert beside the router's weight: a bias of the choice.

    `name` is relative to the MoE block on disk, `memory` (if it differs) in transformers.
    """

    name: str
    memory: str | None = None
    axis: int = 0


@dataclass(frozen=True)
class Stack:
    """A list of layers. An encoder-decoder has two, whose layers are counted on."""

    path: str = "model.layers"
    depth_key: str = "num_hidden_layers"
    block: str | None = None  # where it is not the family's
    width_key: str | None = None  # where it is not the family's


def _nothing(_: Mapping[str, Any]) -> None:
    return None


def _no_gains(_: Mapping[str, Any]) -> Mapping[int, float]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Family:
    """Declaration of one model family; the defaults are those of most.

    `block` is the MoE block on disk relative to its layer, `memory_block` the same module in
    transformers; `router` the router's weight `[E, H]` relative to the block. Layers are numbered
    from 0; in an encoder-decoder, decoder layer j is layer (number of encoder layers) + j.
    """

    model_type: str
    block: str = "mlp"
    memory_block: str = "mlp"
    router: str = "gate.weight"
    memory_router: str | None = None  # where it is not `router`
    router_biases: tuple[RouterTensor, ...] = ()
    experts: Storage = GATED
    # None: transformers calls experts otherwise than with ids and gates; no mapped form.
    memory_experts: Fused | None = IN_MEMORY
    stacks: tuple[Stack, ...] = (Stack(),)
    hidden_key: str = "hidden_size"
    intermediate_key: str = "moe_intermediate_size"
    top_k_key: str = "num_experts_per_tok"
    fixed_top_k: int | None = None
    # Experts compete in this many groups of neighbours first; 2 of each are summed for that.
    router_groups_key: str | None = None
    fewest_per_router_group: int = 1
    encoder_decoder: bool = False
    states: int = 1  # vectors of size H that a layer hands on for each token, at most
    # config.json -> what a layer does with its experts' sum besides scaling it, before it is in the
    # residual stream, so that no error of the stream can be handed to the experts; None: nothing.
    behind_experts: Callable[[Mapping[str, Any]], str | None] = _nothing
    # config.json -> layer -> how much of an error in its output reaches the end; 1 where absent.
    error_gains: Callable[[Mapping[str, Any]], Mapping[int, float]] = _no_gains
    # Files of the family's classes and what config.json calls them, where transformers has none.
    code: tuple[Path, ...] = ()
    auto_map: Mapping[str, str] = field(default_factory=dict)
    # Feature (models.support) -> why this family cannot have it.
    unsupported: Mapping[str, str] = field(default_factory=dict)
    # Layers per stack; known once a config was read (`bound`).
    depths: tuple[int, ...] | None = None

    def bound(self, config: dict[str, Any]) -> Family:
        """This family with the depths of one model.

        Raises:
            CheckpointError: config.json does not say how many layers there are.
        """
        depths = tuple(_integer(config, stack.depth_key) for stack in self.stacks)
        return replace(self, depths=depths)

    @property
    def auto_class(self) -> str:
        """The class of transformers that opens it."""
        return f"AutoModelFor{'Seq2SeqLM' if self.encoder_decoder else 'CausalLM'}"

    # Names ----------------------------------------------------------------------------------------

    def layer_of(self, name: str) -> int | None:
        """Layer that a tensor belongs to; None for embeddings, final norm and head."""
        found = self._locate(name)
        return found[0] if found else None

    def block_prefix(self, layer: int) -> str:
        """Disk prefix of the MoE block of a layer, with the final dot."""
        stack, index = self._stack(layer)
        return f"{stack.path}.{index}.{stack.block or self.block}."

    def memory_prefix(self, layer: int) -> str:
        """In-memory prefix of the MoE block of a layer, with the final dot."""
        stack, index = self._stack(layer)
        return f"{stack.path}.{index}.{stack.block or self.memory_block}."

    def router_name(self, layer: int) -> str:
        """Disk name of the router weight `[E, H]`."""
        return self.block_prefix(layer) + self.router

    def router_axes(self, layer: int) -> dict[str, int]:
        """Disk name -> axis of the experts, of the router and its biases (which may be absent)."""
        prefix = self.block_prefix(layer)
        biases = {prefix + bias.name: bias.axis for bias in self.router_biases}
        return {self.router_name(layer): 0} | biases

    def expert_tensor_names(self, layer: int, expert: int) -> dict[str, str]:
        """Field of `Expert` -> disk name of the tensor that holds it."""
        prefix = self.block_prefix(layer)
        return {part: prefix + name for part, (name, _) in self.experts.pieces(expert).items()}

    def moe_layers(self, names: Iterable[str]) -> tuple[int, ...]:
        """Layers that have a router, in ascending order."""
        found = (self._in_block(name) for name in names)
        return tuple(sorted(each[0] for each in found if each and each[1] == self.router))

    def is_expert_tensor(self, name: str) -> bool:
        """True for tensors of routed experts on disk; shared ones belong to the dense rest."""
        found = self._in_block(name)
        return found is not None and self.experts.owns(found[1])

    def is_moe_tensor(self, name: str) -> bool:
        """True for routers with their biases, and routed experts."""
        found = self._in_block(name)
        return found is not None and (found[1] in self._router_names or self.experts.owns(found[1]))

    def memory_name(self, name: str) -> str:
        """The name that transformers gives a (non-expert) tensor in memory."""
        found = self._in_block(name)
        if found is None:
            return name
        layer, inner = found
        return self.memory_prefix(layer) + self._router_names.get(inner, inner)

    def memory_router_layer(self, name: str) -> int | None:
        """The layer whose router weight has this name in memory."""
        layer = self.layer_of(name)
        if layer is None or not name.endswith(self._router_names[self.router]):
            return None
        return layer if name == self.memory_name(self.router_name(layer)) else None

    def is_memory_expert(self, name: str) -> bool:
        """True for tensors of routed experts in memory: `experts` is their module everywhere."""
        layer = self.layer_of(name)
        return layer is not None and name.startswith(f"{self.memory_prefix(layer)}experts.")

    # config.json ----------------------------------------------------------------------------------

    def num_experts(self, config: dict[str, Any]) -> int:
        """E, from config.json.

        Raises:
            CheckpointError: no key counts the experts.
        """
        for key in _COUNT_KEYS:
            if isinstance(config.get(key), int):
                return int(config[key])
        raise CheckpointError(
            f"config.json of a {self.model_type} model has none of {', '.join(_COUNT_KEYS)}"
        )

    def top_k(self, config: dict[str, Any]) -> int:
        """Experts per token.

        Raises:
            CheckpointError: config.json does not say, or says otherwise for every layer.
        """
        if self.fixed_top_k is not None:
            return self.fixed_top_k
        value = config.get(self.top_k_key)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if not isinstance(value, int):
            raise CheckpointError(f"config.json has no {self.top_k_key}, the same for all layers")
        return value

    def router_groups(self, config: dict[str, Any]) -> int:
        """Groups of experts of which a token first chooses some; 1: it chooses among all."""
        if self.router_groups_key is None or config.get("topk_method") == "greedy":
            return 1
        return int(config.get(self.router_groups_key) or 1)

    def width(self, config: dict[str, Any], layer: int) -> int:
        """I, neurons of a routed expert."""
        return _integer(config, self._stack(layer)[0].width_key or self.intermediate_key)

    def hidden(self, config: dict[str, Any]) -> int:
        """H, hidden size."""
        return _integer(config, self.hidden_key)

    def with_num_experts(self, config: dict[str, Any], count: int) -> dict[str, Any]:
        """config.json with `count` experts per layer.

        Without its `auto_map`: the code it points to is never copied, and the family's own class
        fits; one that transformers does not have lies beside the weights.
        Layers that predict further tokens keep their experts, so that they no longer fit: none are
        announced.
        """
        changes: dict[str, Any] = {key: count for key in _COUNT_KEYS if key in config}
        if _EXTRA_LAYERS in config and count != self.num_experts(config):
            changes[_EXTRA_LAYERS] = 0
        if self.auto_map:
            changes["auto_map"] = dict(self.auto_map)
        return {key: value for key, value in config.items() if key != "auto_map"} | changes

    def with_width(self, config: dict[str, Any], width: int) -> dict[str, Any]:
        """config.json with experts of `width` neurons; other modules may read the same key."""
        keys = {stack.width_key or self.intermediate_key for stack in self.stacks}
        return config | dict.fromkeys(keys, width)

    # ----------------------------------------------------------------------------------------------

    @cached_property
    def _router_names(self) -> dict[str, str]:
        """Name on disk -> in memory of what belongs to the router, relative to the block."""
        biases = {bias.name: bias.memory or bias.name for bias in self.router_biases}
        return {self.router: self.memory_router or self.router} | biases

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        """First layer of every stack."""
        depths = self.depths or (0,) * len(self.stacks)
        return tuple(sum(depths[:index]) for index in range(len(depths)))

    def _stack(self, layer: int) -> tuple[Stack, int]:
        """The stack of a layer, and its index there."""
        pairs = zip(reversed(self.stacks), reversed(self._starts), strict=True)
        return next((stack, layer - start) for stack, start in pairs if layer >= start)

    def _locate(self, name: str) -> tuple[int, str, Stack] | None:
        """Layer of a tensor, its name below the layer, and the stack."""
        for index, (stack, start) in enumerate(zip(self.stacks, self._starts, strict=True)):
            if not name.startswith(f"{stack.path}."):
                continue
            number, _, inner = name[len(stack.path) + 1 :].partition(".")
            last = index == len(self.stacks) - 1
            if number.isdecimal() and (last or not self.depths or int(number) < self.depths[index]):
                return start + int(number), inner, stack
        return None

    def _in_block(self, name: str) -> tuple[int, str] | None:
        """Layer, and name below its MoE block; None elsewhere and behind the last layer.

        Layers behind the last predict further tokens (MTP); they are no part of the model.
        """
        found = self._locate(name)
        if found is None or (self.depths and found[0] >= sum(self.depths)):
            return None
        layer, inner, stack = found
        block = f"{stack.block or self.block}."
        return (layer, inner.removeprefix(block)) if inner.startswith(block) else None


def _integer(config: dict[str, Any], key: str) -> int:
    if not isinstance(config.get(key), int):
        raise CheckpointError(f"config.json has no {key}")
    return int(config[key])
