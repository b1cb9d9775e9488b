"""DeepSpeed's AutoEP: MoE blocks replaced by layers that route, exchange and add by themselves.

The one module that knows AutoEP's names. `deepspeed.initialize` would want the whole model in every
process and, with transformers 5.23, fails where it points transformers' recording of router logits
at the new layers; both are avoided by replacing one layer at a time, without that recording.
Private: `AutoEP._replace_moe_layer_without_retarget`, `auto_ep_layer.combine_from_routed`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cluster.expert_parallel import ExpertGroup

# Is given the outputs [T, k, H] of one layer.
Watcher = Callable[[Tensor], None]


class Replacement:
    """What AutoEP found in a model, to be replaced block by block.

    Args:
        model: with or without memory.
        settings: fields of DeepSpeed's `expert_parallel` section, such as patterns of a family that
            it has no preset for.

    Raises:
        ValueError: DeepSpeed does not know the family, or refuses it; in its words.
    """

    def __init__(self, model: Any, group: ExpertGroup, **settings: Any) -> None:
        from deepspeed.module_inject.auto_ep import AutoEP
        from deepspeed.module_inject.auto_ep_config import (
            parse_autoep_config,
            validate_autoep_post_detection,
        )

        config = parse_autoep_config({"enabled": True, "autoep_size": group.size} | settings)
        self._group = group
        self._auto = AutoEP(model, config)
        self._specs = {spec.moe_module_name: spec for spec in self._auto.ep_parser()}
        if not self._specs:
            raise ValueError(f"AutoEP finds no MoE block in {model.config.model_type}")
        validate_autoep_post_detection(config, list(self._specs.values()))

    def replace(self, path: str) -> None:
        """Puts AutoEP's layer in the place of the blocks below `path`, which are in memory."""
        for name, spec in self._specs.items():
            if not f"{name}.".startswith(f"{path}."):
                continue
            group = self._group
            layer, _ = self._auto._replace_moe_layer_without_retarget(spec, group.size, group.rank)
            layer.set_deepspeed_parallelism()
            layer.requires_grad_(False).eval()
            if layer.score_apply != "post":
                raise ValueError(f"AutoEP weights the inputs of the experts of {name}")
            layer.forward = _guarded(layer.forward, group)


def is_replaced(block: nn.Module) -> bool:
    """Whether a block is AutoEP's."""
    return getattr(block, "_is_autoep_layer", False) is True


@contextmanager
def watching_outputs(watch: Watcher) -> Iterator[None]:
    """Within the context `watch` gets every layer's outputs before they are weighted."""
    from deepspeed.module_inject import auto_ep_layer

    own = auto_ep_layer.combine_from_routed

    def combine(expert_output: Tensor, **rest: Any) -> Tensor:
        outputs = torch.empty_like(expert_output)
        outputs[rest["token_indices_sorted"]] = expert_output
        watch(outputs.view(-1, rest["top_k"], expert_output.shape[-1]))
        combined: Tensor = own(expert_output, **rest)
        return combined

    auto_ep_layer.combine_from_routed = combine
    try:
        yield
    finally:
        auto_ep_layer.combine_from_routed = own


def _guarded(forward: Callable[..., Any], group: ExpertGroup) -> Callable[..., Any]:
    def reached(*args: Any, **kwargs: Any) -> Any:
        with group.reached():
            return forward(*args, **kwargs)

    return reached
