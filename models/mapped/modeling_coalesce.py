"""Mixture-of-experts language models with merged experts behind their original router.

The router keeps its E rows. `expert_map` sends each original expert id to one of the K stored
experts; K <= E may differ between layers. It acts after the family's own softmax, top-k and
renormalisation, so ids that meet in one stored expert add up their gates. This is the inference
rule of MC-SMoE (arXiv:2310.01334, Appendix A3). A router cut to K rows cannot express it, because
the softmax mass of a group is not the exponential of one linear row.

Layers that `expert_factors` names store every matrix of their experts as U V + S, a product of two
thin factors and a few whole rows or columns, and are computed in that form.

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

    `expert_width`, if there is one, is the width of the routed experts alone, of all layers or by
    layer; other modules, and layers that it does not name, keep that of the family's own key.
    `expert_factors`: layer -> gate_proj, up_proj and down_proj -> rank of U V and number of kept
    rows of S, or of its columns if `factor_axis` says so.
    """

    experts_per_layer: dict[str, int] | None
    expert_width: int | dict[str, int] | None
    expert_factors: dict[str, dict[str, list[int]]] | None
    factor_axis: str | None

    def __post_init__(self, **kwargs: object) -> None:
        # JSON has no integer keys; a config made in Python and one read from disk must be equal.
        if self.experts_per_layer is not None:
            self.experts_per_layer = {str(i): n for i, n in self.experts_per_layer.items()}
        if isinstance(self.expert_width, dict):
            self.expert_width = {str(i): n for i, n in self.expert_width.items()}
        if self.expert_factors is not None:
            self.expert_factors = {str(i): each for i, each in self.expert_factors.items()}
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
        if config._experts_implementation == "grouped_mm" and not _has_whole_rows(self):
            self.set_experts_implementation("eager")
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


def _has_whole_rows(model: PreTrainedModel) -> bool:
    """Whether rows of all experts are whole 16 bytes, in 32 and in 16 bits: the default kernel
    takes nothing else."""
    experts = [block.experts.parameters() for block in _moe_blocks(model).values()]
    return all(each.shape[-1] % 8 == 0 for some in experts for each in some if each.ndim == 3)


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
    width = config.expert_width
    width = width.get(str(layer)) if isinstance(width, dict) else width
    factors = (config.expert_factors or {}).get(str(layer))
    wide.experts = _merged_experts(type(block.experts), config, kept, width, factors)
    wide.train(block.training)
    return wide


def _merged_experts(
    family: type[nn.Module],
    config: PreTrainedConfig,
    kept: int,
    width: int | None,
    factors: dict[str, list[int]] | None,
) -> nn.Module:
    """The family's fused experts, [K, ...] instead of [E, ...], or their factors; and the map."""
    widths = _EXPERT_WIDTHS if width else ()
    with _expert_count(config, kept), _changed(config, widths, width or 0):
        if factors is None:
            experts = family(config)
        else:
            with torch.device("meta"):  # shapes and activation; the whole experts have no memory
                whole = family(config)
            experts = _FactoredExperts(whole, kept, factors, config.factor_axis)
    expert_map = torch.arange(_router_width(config)) % kept
    experts.register_buffer("expert_map", expert_map)  # int64 [E]
    experts.register_forward_pre_hook(_redirect, with_kwargs=True)
    return experts


class _FactoredMatrices(nn.Module):
    """K matrices W = U V + S [out, in]; S holds n whole rows, or columns, of every matrix.

    u [K, out, r], v [K, r, in], s [K, n, in] (rows) or [K, n, out] (columns), index int64 [K, n].
    """

    def __init__(self, count: int, shape: torch.Size, factors: list[int], axis: str | None) -> None:
        super().__init__()
        (out, width), (rank, kept) = shape, factors
        self.by_rows, self.size = axis != "columns", out
        self.along = out if self.by_rows else width  # what `index` counts
        # Zeros, not random numbers; a checkpoint fills them all or is refused.
        self.u = nn.Parameter(torch.zeros(count, out, rank))
        self.v = nn.Parameter(torch.zeros(count, rank, width))
        if kept:
            self.s = nn.Parameter(torch.zeros(count, kept, width if self.by_rows else out))
            self.register_buffer("index", torch.arange(kept).repeat(count, 1))

    def forward(self, x: torch.Tensor, ids: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """[P, in] -> [P, out]; row p goes to expert ids[p], and ids ascend up to `ends` [K]."""
        made = _grouped_linear(_grouped_linear(x, self.v, ends), self.u, ends)
        if not hasattr(self, "s"):
            return made
        index = self.get_buffer("index")[ids]  # [P, n]
        if self.by_rows:
            return made.scatter_add_(1, index, _grouped_linear(x, self.s, ends))
        return made + _grouped_linear(x.gather(1, index), self.s.transpose(1, 2), ends)

    def dense(self) -> torch.Tensor:
        """[K, out, in] fp32: the matrices themselves."""
        whole = self.u.float() @ self.v.float()
        if hasattr(self, "s"):
            turned = whole if self.by_rows else whole.transpose(1, 2)
            index = self.get_buffer("index")[:, :, None].expand(-1, -1, turned.shape[2])
            turned.scatter_add_(1, index, self.s.float())
        return whole


class _FactoredExperts(nn.Module):
    """The family's gated experts with every matrix as U V + S, and the map.

    Only experts that are hit compute, all of them together, and each once per token: gates of ids
    that meet in one expert are added first.
    """

    def __init__(
        self, whole: nn.Module, count: int, factors: dict[str, list[int]], axis: str | None
    ) -> None:
        super().__init__()
        gate_up, down = whole.get_parameter("gate_up_proj"), whole.get_parameter("down_proj")
        half = torch.Size((gate_up.shape[1] // 2, gate_up.shape[2]))
        self.num_experts = count
        self.act_fn: Any = whole.act_fn
        self.gate_proj = _FactoredMatrices(count, half, factors["gate_proj"], axis)
        self.up_proj = _FactoredMatrices(count, half, factors["up_proj"], axis)
        self.down_proj = _FactoredMatrices(count, down.shape[1:], factors["down_proj"], axis)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, H], stored ids [T, k] and gates [T, k] -> [T, H]."""
        shape = len(hidden_states), self.num_experts
        gates = top_k_weights.new_zeros(shape).scatter_add(1, top_k_index, top_k_weights)
        hit = torch.zeros(shape, dtype=torch.bool, device=gates.device)
        ids, tokens = hit.scatter_(1, top_k_index, True).T.nonzero(as_tuple=True)
        ends = hit.sum(dim=0).cumsum(0, dtype=torch.int32)
        x = hidden_states[tokens]
        neurons = self.act_fn(self.gate_proj(x, ids, ends)) * self.up_proj(x, ids, ends)
        made = self.down_proj(neurons, ids, ends) * gates[tokens, ids, None]
        # Added in fp32 and rounded once, whatever the type of the model.
        total = torch.zeros_like(hidden_states, dtype=torch.float32)
        return total.index_add(0, tokens, made.float()).to(hidden_states.dtype)

    def dense_tensors(self) -> dict[str, torch.Tensor]:
        """The family's own fused tensors of the same experts, in fp32."""
        halves = [self.gate_proj.dense(), self.up_proj.dense()]
        return {"gate_up_proj": torch.cat(halves, dim=1), "down_proj": self.down_proj.dense()}

    def check_indices(self, layer: int) -> None:
        """Every index must be int64, ascend and lie inside its matrix."""
        for name, part in self.named_children():
            index = getattr(part, "index", None)
            if not isinstance(part, _FactoredMatrices) or index is None:
                continue
            inside = bool((index >= 0).all() and (index < part.along).all())
            if index.dtype != torch.int64 or not inside or bool((index.diff(dim=1) <= 0).any()):
                raise ValueError(
                    f"index of {name} in layer {layer} must be int64, ascend and lie in"
                    f" 0..{part.along - 1}"
                )


def _grouped_linear(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """[P, in] and [K, out, in] -> [P, out]; rows up to ends[0] with the first matrix, and so on."""
    turned = weight.transpose(-2, -1)
    x = x.to(weight.dtype)
    aligned = all(n * x.element_size() % 16 == 0 for n in weight.shape[1:])
    known = x.dtype == torch.bfloat16 or (x.device.type == "cpu" and x.dtype == torch.float32)
    if aligned and known and len(x) and hasattr(nn.functional, "grouped_mm"):
        return nn.functional.grouped_mm(x.contiguous(), turned, offs=ends)
    # The kernel takes these types alone and rows of whole 16 bytes; the same in one batch, padded
    # to the longest group.
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    longest = int((ends - starts).max()) if len(x) else 0
    place = starts[:, None] + torch.arange(longest, device=x.device)
    inside = place < ends[:, None]
    padded = x[place.clamp(max=max(len(x) - 1, 0))] * inside[:, :, None]
    return (padded @ turned)[inside]


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
        if found.is_meta:  # opened for its names and shapes
            continue
        if found.dtype != torch.int64 or set(found.tolist()) != set(range(kept)):
            raise ValueError(
                f"expert_map of layer {layer} must be int64 and use each of 0..{kept - 1}; "
                f"found {found.dtype} {sorted(set(found.tolist()))}"
            )
        if isinstance(block.experts, _FactoredExperts):
            block.experts.check_indices(layer)


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
        "__annotations__": dict(_MappedConfig.__annotations__),
        **dict.fromkeys(_MappedConfig.__annotations__),
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
