"""Mixture-of-experts language models with merged experts behind their original router.

The router keeps its E rows. `expert_map` sends each original expert id to one of the K stored
experts; K <= E may differ between layers. It acts after the family's own softmax, top-k and
renormalisation, so ids that meet in one stored expert add up their gates. This is the inference
rule of MC-SMoE (arXiv:2310.01334, Appendix A3). A router cut to K rows cannot express it, because
the softmax mass of a group is not the exponential of one linear row.

The file is copied beside the weights and loaded by transformers (`trust_remote_code=True`). It
therefore imports nothing but torch, transformers and the standard library.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

# Model type and class-name stem of each supported family. Its sparse block must have a router (of
# any kind, and with any biases), and `experts` that are called with hidden states, ids and gates.
FAMILIES = {
    "afmoe": "Afmoe",
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
    "ernie4_5_moe": "Ernie4_5_Moe",
    "glm4_moe": "Glm4Moe",
    "gpt_oss": "GptOss",
    "granitemoe": "GraniteMoe",
    "hunyuan_v1_moe": "HunYuanMoEV1",
    "jamba": "Jamba",
    "lfm2_moe": "Lfm2Moe",
    "minimax": "MiniMax",
    "minimax_m2": "MiniMaxM2",
    "mixtral": "Mixtral",
    "olmoe": "Olmoe",
    "phimoe": "Phimoe",
    "qwen2_moe": "Qwen2Moe",
    "qwen3_moe": "Qwen3Moe",
    "qwen3_next": "Qwen3Next",
}

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EXPERT_WIDTHS = ("moe_intermediate_size", "intermediate_size")
_ROUTERS = ("gate", "router")
_EXPERT_IDS = ("top_k_index", "router_indices")
_FAULTS_SHOWN = 20


class _MappedConfig:
    """Adds `experts_per_layer`: MoE layer index -> stored experts. The family's count stays E.

    `expert_width`, if there is one, is the width of the routed experts alone; other modules keep
    that of the family's own key.
    """

    experts_per_layer: dict[str, int] | None
    expert_width: int | None

    def __post_init__(self, **kwargs: object) -> None:
        # JSON has no integer keys; a config made in Python and one read from disk must be equal.
        if self.experts_per_layer is not None:
            self.experts_per_layer = {str(i): n for i, n in self.experts_per_layer.items()}
        super().__post_init__(**kwargs)  # type: ignore[misc]  # the family's config


class _MappedCausalLM(PreTrainedModel):
    """The part of `Coalesce<Family>ForCausalLM` that is the same for every family."""

    _auto_class = "AutoModelForCausalLM"  # save_pretrained then puts this file beside the weights

    def __init__(self, config: PreTrainedConfig) -> None:
        # E experts are never allocated, not even for a moment. Two, because some families take a
        # layer with one expert for a dense one.
        with _expert_count(config, 2):
            super().__init__(config)
        self.num_experts = _router_width(config)  # read by the load-balancing loss
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
    with _changed(config, _EXPERT_COUNTS, count):
        yield


@contextmanager
def _changed(config: PreTrainedConfig, keys: tuple[str, ...], value: int) -> Iterator[None]:
    before = {key: getattr(config, key) for key in keys if hasattr(config, key)}
    for key in before:
        setattr(config, key, value)
    try:
        yield
    finally:
        for key, old in before.items():
            setattr(config, key, old)


def _router_width(config: PreTrainedConfig) -> int:
    """E; families call it differently."""
    return next(int(getattr(config, key)) for key in _EXPERT_COUNTS if hasattr(config, key))


def _moe_blocks(model: PreTrainedModel) -> dict[int, Any]:
    """Decoder layer index -> its sparse block; dense layers are absent."""
    return {
        index: layer.get_submodule(path)
        for index, layer in enumerate(model.base_model.layers)
        if (path := _block_path(layer)) is not None
    }


def _block_path(layer: nn.Module) -> str | None:
    """Where the sparse block of a layer is; None in a dense layer."""
    for path, module in layer.named_modules():
        children = dict(module.named_children())
        if "experts" in children and any(router in children for router in _ROUTERS):
            return str(path)
    return None


def _insert_merged_experts(model: PreTrainedModel) -> None:
    config, blocks = model.config, _moe_blocks(model)
    _check_experts_per_layer(config, list(blocks))
    for index, block in blocks.items():
        layer = model.base_model.layers[index]
        kept = config.experts_per_layer[str(index)]
        layer.set_submodule(_block_path(layer), _mapped_block(block, config, index, kept))


def _mapped_block(block: Any, config: PreTrainedConfig, layer: int, kept: int) -> Any:
    """The family's block with a router for E experts, of which `kept` are stored."""
    parameters = inspect.signature(type(block)).parameters
    position = {"layer_idx": layer} if "layer_idx" in parameters else {}
    device = block.experts.down_proj.device
    with torch.device("meta"):  # the E experts that this makes have no memory
        wide = type(block)(config, **position)
    wide.experts = nn.Module()
    wide.to_empty(device=device)
    wide.experts = _merged_experts(type(block.experts), config, kept)
    wide.train(block.training)
    return wide


def _merged_experts(family: type[nn.Module], config: PreTrainedConfig, kept: int) -> nn.Module:
    """The family's fused experts, [K, ...] instead of [E, ...], and the map."""
    widths = _EXPERT_WIDTHS if config.expert_width else ()
    with _expert_count(config, kept), _changed(config, widths, config.expert_width or 0):
        experts = family(config)
    expert_map = torch.arange(_router_width(config)) % kept
    experts.register_buffer("expert_map", expert_map)  # int64 [E]
    experts.register_forward_pre_hook(_redirect, with_kwargs=True)
    return experts


def _redirect(
    experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replaces original expert ids [T, k] by stored ones. Gates stay as they are."""
    expert_map = experts.get_buffer("expert_map")
    if len(args) > 1:  # hidden states, ids, gates
        return (args[0], expert_map[args[1]], *args[2:]), kwargs
    name = next(name for name in _EXPERT_IDS if name in kwargs)
    return args, kwargs | {name: expert_map[kwargs[name]]}


def _check_experts_per_layer(config: PreTrainedConfig, layers: list[int]) -> None:
    kept = config.experts_per_layer or {}
    if set(kept) != {str(layer) for layer in layers}:
        raise ValueError(f"experts_per_layer names layers {list(kept)}; MoE layers are {layers}")
    width = _router_width(config)
    if wrong := {layer: n for layer, n in kept.items() if not 1 <= n <= width}:
        raise ValueError(f"experts_per_layer must lie in 1..{width}, found {wrong}")


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


def config_class(family: str, base: type[PreTrainedConfig], module: str) -> type[PreTrainedConfig]:
    """`Coalesce<Family>Config` for a family's own config, as if it stood in `module`."""
    body = {
        "__module__": module,
        "__annotations__": {"experts_per_layer": dict[str, int] | None, "expert_width": int | None},
        "experts_per_layer": None,
        "expert_width": None,
        "model_type": f"coalesce_{family}",
        "_auto_class": "AutoConfig",
    }
    return type(f"Coalesce{base.__name__}", (_MappedConfig, base), body)


def model_class(
    base: type[PreTrainedModel], config: type[PreTrainedConfig], module: str
) -> type[PreTrainedModel]:
    """`Coalesce<Family>ForCausalLM` for a family's own causal LM."""
    body = {"__module__": module, "config_class": config}
    return type(f"Coalesce{base.__name__}", (_MappedCausalLM, base), body)


# transformers looks these classes up as attributes of the module.
for _family, _stem in FAMILIES.items():
    _config = config_class(_family, getattr(transformers, f"{_stem}Config"), __name__)
    globals()[_config.__name__] = _config
    _model = model_class(getattr(transformers, f"{_stem}ForCausalLM"), _config, __name__)
    globals()[_model.__name__] = _model
