"""MomentumSMoE as a transformers model: Mixtral's parts, and momentum from layer to layer.

A decoder layer receives and returns the states `[B, S, 1 + n, H]` of every token: the hidden state
and the n parts of the momentum, in one tensor, so that whatever carries a layer's output to the
next one (gradient checkpointing, layer streaming, pipeline stages) carries both. The first layer is
given embeddings `[B, S, H]`, where momentum is zero, and the last one returns `[B, S, H]`. Momentum
belongs to a token at a depth: it is no parameter and no buffer, and needs no cache.

The file is copied beside the weights and loaded by transformers (`trust_remote_code=True`), with
its two neighbours. It imports nothing else but torch, transformers and the standard library.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.mixtral.modeling_mixtral import (
    MixtralAttention,
    MixtralForCausalLM,
    MixtralModel,
    MixtralPreTrainedModel,
    MixtralRMSNorm,
    MixtralRotaryEmbedding,
    MixtralSparseMoeBlock,
)

from .configuration_momentum import MomentumConfig
from .momentum_steps import advanced, looked_ahead


class MomentumStep(nn.Module):
    """What a sparse layer does with its output; its only parameter is a learnable step."""

    def __init__(self, config: MomentumConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.first = layer_idx == config.sparse_layers[0]
        if config.learnable_step:
            self.gamma = nn.Parameter(torch.full((1,), config.rates.gamma))

    @property
    def _gamma(self) -> float | Tensor:
        return self.gamma if self.config.learnable_step else self.config.rates.gamma

    def look_ahead(self, hidden: Tensor, momentum: Tensor) -> Tensor:
        """`[B, S, H]`: where the router and the experts look."""
        return looked_ahead(hidden, momentum, self.config.rates, self._gamma)

    def forward(self, hidden: Tensor, update: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, S, H]` and `[B, S, n, H]`: hidden state and momentum behind the step."""
        return advanced(self.config, hidden, update, momentum, self._gamma, first=self.first)


class MomentumDecoderLayer(GradientCheckpointingLayer):  # type: ignore[misc]  # has no types
    """Attention, then experts or one dense network; momentum skips attention and dense networks."""

    def __init__(self, config: MomentumConfig, layer_idx: int) -> None:
        super().__init__()
        self.parts = config.momentum_parts
        self.is_last = layer_idx == config.num_hidden_layers - 1
        self.is_sparse = layer_idx in config.sparse_layers
        self.self_attn = MixtralAttention(config, layer_idx)
        self.mlp = MixtralSparseMoeBlock(config) if self.is_sparse else MistralMLP(config)
        self.momentum = MomentumStep(config, layer_idx) if self.is_sparse else None
        self._add_norms(config)

    def forward(self, states: Tensor, **kwargs: Any) -> Tensor:
        """`[B, S, 1 + n, H]` -> the same; `[B, S, H]` into the first and out of the last layer."""
        if states.ndim == 3:
            states = _with_momentum(states, self.parts)
        # Contiguous: other strides lead to other kernels, and those to other last bits.
        hidden, momentum = states[:, :, 0].contiguous(), states[:, :, 1:]
        hidden, momentum = self._run(hidden, momentum, kwargs)
        return hidden if self.is_last else torch.cat([hidden.unsqueeze(2), momentum], dim=2)

    def _add_norms(self, config: MomentumConfig) -> None:
        raise NotImplementedError

    def _run(self, hidden: Tensor, momentum: Tensor, kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _feed_forward(
        self, hidden: Tensor, momentum: Tensor, norm: nn.Module
    ) -> tuple[Tensor, Tensor]:
        """x + step of experts or of the dense network, applied to `norm` of where they look."""
        if self.momentum is None:
            return hidden + self.mlp(norm(hidden)), momentum
        seen = self.momentum.look_ahead(hidden, momentum)
        found: tuple[Tensor, Tensor] = self.momentum(hidden, self.mlp(norm(seen)), momentum)
        return found


class PreNormLayer(MomentumDecoderLayer):
    """Mixtral's block: each half normalises what it reads."""

    def _add_norms(self, config: MomentumConfig) -> None:
        self.input_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def _run(self, hidden: Tensor, momentum: Tensor, kwargs: Any) -> tuple[Tensor, Tensor]:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden), **kwargs)
        return self._feed_forward(hidden + attended, momentum, self.post_attention_layernorm)


class PostNormLayer(MomentumDecoderLayer):
    """The block of the released code: the sparse layer has a residual inside and one around."""

    def _add_norms(self, config: MomentumConfig) -> None:
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_momentum_layernorm = nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_feedforward_layernorm = nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)

    def _run(self, hidden: Tensor, momentum: Tensor, kwargs: Any) -> tuple[Tensor, Tensor]:
        attended, _ = self.self_attn(hidden_states=hidden, **kwargs)
        hidden = self.post_attention_layernorm(hidden + attended)
        moved, momentum = self._feed_forward(hidden, momentum, nn.Identity())
        moved = self.post_momentum_layernorm(moved)
        return self.post_feedforward_layernorm(hidden + moved), momentum


_LAYERS = {"pre_ln": PreNormLayer, "post_ln": PostNormLayer}


def _with_momentum(hidden: Tensor, parts: int) -> Tensor:
    """`[B, S, H]` -> `[B, S, 1 + parts, H]`; nothing was accumulated yet."""
    zeros = hidden.new_zeros(*hidden.shape[:2], parts, hidden.shape[-1])
    return torch.cat([hidden.unsqueeze(2), zeros], dim=2)


# transformers has no types: here, and in the two classes below.
class MomentumPreTrainedModel(MixtralPreTrainedModel):  # type: ignore[misc]
    """What the model shares with its causal LM."""

    config: MomentumConfig
    config_class = MomentumConfig
    # As transformers spells them: its own classes and readers expect plain class attributes.
    _no_split_modules = ["PreNormLayer", "PostNormLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        **MixtralPreTrainedModel._can_record_outputs,
        "hidden_states": MomentumDecoderLayer,
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """transformers looks for a decorator in this file; it is in Mixtral's."""
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MomentumStep) and self.config.learnable_step:
            init.constant_(module.gamma, self.config.rates.gamma)


class MomentumModel(MomentumPreTrainedModel, MixtralModel):  # type: ignore[misc]
    """Mixtral's forward over layers that hand on momentum."""

    def __init__(self, config: MomentumConfig) -> None:
        _use_names_of_mixtral(config.model_type)
        # Not MixtralModel's: it would make layers of its own.
        MixtralPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        kind = _LAYERS[config.block_style]
        self.layers = nn.ModuleList(kind(config, i) for i in range(config.num_hidden_layers))
        self.norm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MixtralRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """As MixtralModel; `hidden_states`, if asked for, are `[B, S, H]` without momentum."""
        output = super().forward(*args, **kwargs)
        if output.hidden_states is not None:
            output.hidden_states = tuple(
                each if each is None or each.ndim == 3 else each[:, :, 0]
                for each in output.hidden_states
            )
        return output if return_dict else output.to_tuple()


class MomentumForCausalLM(MomentumPreTrainedModel, MixtralForCausalLM):  # type: ignore[misc]
    """The model with a head for the next token."""

    _auto_class = "AutoModelForCausalLM"  # save_pretrained then puts these files beside the weights

    def __init__(self, config: MomentumConfig) -> None:
        MixtralPreTrainedModel.__init__(self, config)
        self.model = MomentumModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts = config.num_local_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.post_init()


def _use_names_of_mixtral(model_type: str) -> None:
    """On disk experts are stored one by one, as Mixtral's.

    Called by the constructor and not on import: a folder's own copy of this file needs it as well.
    """
    names = get_checkpoint_conversion_mapping("mixtral")
    register_checkpoint_conversion_mapping(model_type, names, overwrite=True)
