"""The slow, obvious way to what is carried: both models whole, with hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from models.blocks import find_blocks
from models.streaming.model import hidden_of


@dataclass
class Oracle:
    """Both models whole, in plain transformers; everything is looked at by hooks."""

    original: Any
    reduced: Any

    def expected(self, ids: Tensor, start: int, layer: int, share: float) -> tuple[Tensor, Tensor]:
        """[S, H] input of the experts of a layer and their target, for one row [1, S].

        The reduced model runs up to layer `start`, the original one from there on.
        """
        entry, seen = self.entering(self.reduced, ids, start), dict[str, Tensor]()
        wanted = self.behind(self.original, ids, layer)
        experts = find_blocks(self.original)[layer].experts

        def remember(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            seen["given"], seen["made"] = args[0].reshape(ids.shape[1], -1), output

        first = self.original.base_model.layers[start]
        with replaced_input(first, entry), hooked(experts.register_forward_hook(remember)):
            had = self.behind(self.original, ids, layer)
        made = seen["made"].reshape(ids.shape[1], -1)
        return seen["given"], made + share * (wanted - had)

    def entering(self, model: Any, ids: Tensor, layer: int) -> Tensor:
        found = []

        def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])

        module = model.base_model.layers[layer]
        with hooked(module.register_forward_pre_hook(remember, with_kwargs=True)):
            model(input_ids=ids, use_cache=False)
        states: Tensor = found[0]
        return states

    def behind(self, model: Any, ids: Tensor, layer: int) -> Tensor:
        found = []

        def remember(_: nn.Module, _args: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)

        with hooked(model.base_model.layers[layer].register_forward_hook(remember)):
            model(input_ids=ids, use_cache=False)
        return hidden_of(found[0]).reshape(ids.shape[1], -1)


@contextmanager
def hooked(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replaced_input(module: nn.Module, states: Tensor) -> Iterator[None]:
    def put(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})

    with hooked(module.register_forward_pre_hook(put, with_kwargs=True)):
        yield
