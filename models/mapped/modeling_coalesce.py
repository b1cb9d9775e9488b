"""Mixture-of-experts language models with merged experts behind their original router.

The router keeps its E rows. `expert_map` sends each original expert id to one of the K stored
experts; K <= E may differ between layers. It acts after the family's own softmax, top-k and
renormalisation, so ids that meet in one stored expert add up their gates. This is the inference
rule of MC-SMoE (arXiv:2310.01334, Appendix A3). A router cut to K rows cannot express it, because
the softmax mass of a group is not the exponential of one linear row.

The file is copied beside the weights and loaded by transformers (`trust_remote_code=True`). It
therefore imports nothing but torch, transformers and the standard library.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

# Model type and class-name stem of each supported family. Its sparse block must have a `gate`, and
# `experts` that are called with hidden states, expert ids and gates.
FAMILIES = {
    "mixtral": "Mixtral",
    "olmoe": "Olmoe",
    "qwen2_moe": "Qwen2Moe",
    "qwen3_moe": "Qwen3Moe",
}

_EXPERTS_ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")
_FAULTS_SHOWN = 20


class _MappedConfig:
    """Adds `experts_per_layer`: MoE layer index -> stored experts. `num_experts` stays E."""

    experts_per_layer: dict[str, int] | None

    def __post_init__(self, **kwargs: object) -> None:
        # JSON has no integer keys; a config made in Python and one read from disk must be equal.
        if self.experts_per_layer is not None:
            self.experts_per_layer = {str(i): n for i, n in self.experts_per_layer.items()}
        super().__post_init__(**kwargs)  # type: ignore[misc]  # the family's config


class _MappedCausalLM(PreTrainedModel):
    """The part of `Coalesce<Family>ForCausalLM` that is the same for every family."""

    _auto_class = "AutoModelForCausalLM"  # save_pretrained then puts this file beside the weights

    def __init__(self, config: PreTrainedConfig) -> None:
        # E experts are never allocated, not even for a moment: the family builds blocks with one.
        with _expert_count(config, 1):
            super().__init__(config)
        self.num_experts = config.num_experts  # read by the load-balancing loss
        _insert_merged_experts(self)
        self.init_weights()  # skips what the family has initialised already
        self.register_load_state_dict_post_hook(_check_expert_maps)

    @classmethod
    def from_pretrained(
        cls, *args: object, **kwargs: object
    ) -> PreTrainedModel | tuple[PreTrainedModel, dict[str, Any]]:
        """Refuses a checkpoint that does not fit; transformers would draw random weights for it."""
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True  # refused here instead, by name
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        _refuse_faults(info)
        _check_expert_maps(model)
        return (model, info) if wants_info else model

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """transformers looks for a decorator in this file; it is in the family's."""
        return True


@contextmanager
def _expert_count(config: PreTrainedConfig, count: int) -> Iterator[None]:
    """Lets the family's constructors see another number of experts.

    The config is changed and put back rather than copied: modules keep a reference to it, and
    later changes, such as another attention or experts implementation, must reach all of them.
    """
    router_width = config.num_experts
    config.num_experts = count
    try:
        yield
    finally:
        config.num_experts = router_width


def _moe_blocks(model: PreTrainedModel) -> dict[int, Any]:
    """Decoder layer index -> its sparse block; dense layers are absent."""
    return {
        index: module
        for index, layer in enumerate(model.base_model.layers)
        for module in layer.modules()
        if hasattr(module, "gate") and hasattr(module, "experts")
    }


def _insert_merged_experts(model: PreTrainedModel) -> None:
    config, blocks = model.config, _moe_blocks(model)
    _check_experts_per_layer(config, list(blocks))
    for layer, block in blocks.items():
        block.gate = type(block.gate)(config)  # weight [E, H]
        kept = config.experts_per_layer[str(layer)]
        block.experts = _merged_experts(type(block.experts), config, kept)


def _merged_experts(family: type[nn.Module], config: PreTrainedConfig, kept: int) -> nn.Module:
    """The family's fused experts, gate_up_proj [K, 2I, H] and down_proj [K, H, I], and the map."""
    with _expert_count(config, kept):
        experts = family(config)
    experts.register_buffer("expert_map", torch.arange(config.num_experts) % kept)  # int64 [E]
    experts.register_forward_pre_hook(_redirect, with_kwargs=True)
    return experts


def _redirect(
    experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replaces original expert ids [T, k] by stored ones. Gates stay as they are."""
    call = dict(zip(_EXPERTS_ARGUMENTS, args, strict=False)) | kwargs
    call["top_k_index"] = experts.get_buffer("expert_map")[call["top_k_index"]]
    return tuple(call[name] for name in _EXPERTS_ARGUMENTS), {}


def _check_experts_per_layer(config: PreTrainedConfig, layers: list[int]) -> None:
    kept = config.experts_per_layer or {}
    if set(kept) != {str(layer) for layer in layers}:
        raise ValueError(f"experts_per_layer names layers {list(kept)}; MoE layers are {layers}")
    if wrong := {layer: n for layer, n in kept.items() if not 1 <= n <= config.num_experts}:
        raise ValueError(f"experts_per_layer must lie in 1..{config.num_experts}, found {wrong}")


def _check_expert_maps(model: PreTrainedModel, _: object = None) -> None:
    """Every map must be int64 and onto 0..K-1: grouped kernels silently drop ids beyond K."""
    for layer, block in _moe_blocks(model).items():
        found, kept = block.experts.expert_map, block.experts.num_experts
        if found.dtype != torch.int64 or set(found.tolist()) != set(range(kept)):
            raise ValueError(
                f"expert_map of layer {layer} must be int64 and use each of 0..{kept - 1}; "
                f"found {found.dtype} {sorted(set(found.tolist()))}"
            )


def _refuse_faults(info: dict[str, Any]) -> None:
    faults = [f"missing {key}" for key in sorted(info["missing_keys"])]
    faults += [f"unexpected {key}" for key in sorted(info["unexpected_keys"])]
    faults += [
        f"{key} has shape {list(found)} instead of {list(expected)}"
        for key, found, expected in sorted(info["mismatched_keys"])
    ]
    if faults:
        shown = "; ".join(faults[:_FAULTS_SHOWN])
        raise ValueError(f"checkpoint and config.json disagree in {len(faults)} places: {shown}")


def _config_class(family: str, stem: str) -> type[PreTrainedConfig]:
    bases = (_MappedConfig, getattr(transformers, f"{stem}Config"))
    body = {
        "__module__": __name__,
        "__annotations__": {"experts_per_layer": dict[str, int] | None},
        "experts_per_layer": None,
        "model_type": f"coalesce_{family}",
        "_auto_class": "AutoConfig",
    }
    return type(f"Coalesce{stem}Config", bases, body)


def _model_class(stem: str, config: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    bases = (_MappedCausalLM, getattr(transformers, f"{stem}ForCausalLM"))
    body = {"__module__": __name__, "config_class": config}
    return type(f"Coalesce{stem}ForCausalLM", bases, body)


# transformers looks these classes up as attributes of the module.
for _family, _stem in FAMILIES.items():
    _config = _config_class(_family, _stem)
    globals()[_config.__name__] = _config
    _model = _model_class(_stem, _config)
    globals()[_model.__name__] = _model
