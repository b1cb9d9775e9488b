"""AdamW with values, gradients and moments dealt out to the ranks by DeepSpeed (ZeRO).

What the ranks hold is gathered by name for a state, and dealt out again from one, one value at a
time, through `deepspeed.utils.safe_{get,set}_{full,local}_*`. DeepSpeed lets Adam make its moments
in the first step, and looks for those of all groups of parameters once the first group has stepped,
when the others have none (0.19.8). Here they are made beforehand;
`_lazy_init_hp_params_optimizer_state`, by which DeepSpeed takes notice of them, and
`fp32_partitioned_groups_flat` are no public names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stages.recover.config import DeepSpeedConfig, RecoverConfig
from stages.recover.layers import largest_layer
from stages.recover.plain import MOMENTS, adamw, shape_of
from stages.recover.ranks import Ranks
from stages.recover.state import Kind, State

# DeepSpeed computes the norm of a gradient only where it clips it.
_NO_CLIP = 1e30
# Values that are sent at once; DeepSpeed's own choice.
_LARGEST_BUCKET = 500_000_000


class Zero:
    """See `stages.recover.plain.Optimiser`; the ranks must have joined a group.

    The model is wrapped once per process: a second wrapping would meet the first one's hooks.
    """

    def __init__(
        self, model: Any, trained: Mapping[str, nn.Parameter], config: RecoverConfig, ranks: Ranks
    ) -> None:
        import deepspeed

        section = config.deepspeed or DeepSpeedConfig()
        self._stage, self._ranks = section.zero_stage, ranks
        self._clip = _NO_CLIP if config.clip is None else config.clip
        self._trained = dict(trained)
        clip = 0.0 if self._stage == 0 else self._clip
        if self._stage == 3:
            # Where no input of a module has a gradient, as behind frozen embeddings, DeepSpeed
            # would take its values away before its backward pass.
            model.enable_input_require_grads()
        self._engine, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=adamw(trained, config),
            config=_settings(section, config, ranks.size, clip, _layer_size(model)),
            dist_init_required=False,
        )
        self.model = self._engine
        self._make_moments(0)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Optimiser`. DeepSpeed divides by the ranks, and the loss is divided already."""
        self._engine.backward(loss * self._ranks.size, scale_wrt_gas=False)
        if not last:
            self._engine.step()  # counts the pass

    def step(self, rate: float) -> float:
        """See `Optimiser`."""
        for group in self._held.param_groups:
            group["lr"] = rate
        if self._stage == 0:  # without ZeRO, DeepSpeed clips and does not say the norm
            norm = float(nn.utils.clip_grad_norm_(self._trained.values(), self._clip))
            self._engine.step()
            return norm
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        # DeepSpeed says -1 where it is no number.
        return norm if norm >= 0 else float("nan")

    def gathered(self, kind: Kind) -> Iterator[tuple[str, Tensor]]:
        """See `Optimiser`."""
        for name, parameter in self._trained.items():
            found = self._value(parameter) if kind == "values" else self._moment(parameter, kind)
            yield name, found.detach().float().cpu()

    def load(self, state: State) -> None:
        """See `Optimiser`."""
        for name, parameter in self._trained.items():
            self._set_value(parameter, state.read("values", name))
        self._make_moments(state.step)
        for name, parameter in self._trained.items():
            for kind in MOMENTS:
                self._set_moment(parameter, kind, state.read(kind, name))

    def begin_with(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """Sets the fp32 values that are updated, by name; the model runs with rounded ones."""
        for name, value in values:
            self._set_exact(self._trained[name], value)

    @property
    def _held(self) -> Any:
        """State of the optimiser inside, by the (flat) tensors that it updates."""
        return self._engine.basic_optimizer

    def _value(self, parameter: nn.Parameter) -> Tensor:
        if self._stage == 0:
            return parameter
        from deepspeed.utils import safe_get_full_fp32_param

        gathered: Tensor = safe_get_full_fp32_param(parameter)
        return gathered

    def _moment(self, parameter: nn.Parameter, kind: Kind) -> Tensor:
        if self._stage == 0:
            found: Tensor = self._held.state[parameter][MOMENTS[kind]]
            return found
        from deepspeed.utils import safe_get_full_optimizer_state

        gathered: Tensor = safe_get_full_optimizer_state(parameter, MOMENTS[kind])
        return gathered

    def _set_moment(self, parameter: nn.Parameter, kind: Kind, moment: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        moment = moment.to(parameter.device)
        if self._stage == 0:
            self._held.state[parameter][MOMENTS[kind]].copy_(moment)
        elif self._stage == 3:
            own = _own_part(parameter, moment, self._ranks.rank)
            safe_set_local_optimizer_state(parameter, own, MOMENTS[kind])
        else:
            safe_set_full_optimizer_state(parameter, moment, MOMENTS[kind])

    def _set_exact(self, parameter: nn.Parameter, value: Tensor) -> None:
        """The fp32 value that is updated, which is another one than the model runs with."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        value = value.to(parameter.device)
        if self._stage == 3:
            # Its own function for whole values wants sizes that the ranks divide evenly.
            own = _own_part(parameter, value, self._ranks.rank)
            safe_set_local_fp32_param(parameter, own)
        elif self._stage:
            safe_set_full_fp32_param(parameter, value)

    def _make_moments(self, step: int) -> None:
        """Zeros of the right shapes, as if `step` updates had been made."""
        groups = [each["params"] for each in self._held.param_groups]
        if self._stage == 3:
            groups = [self._engine.optimizer.fp32_partitioned_groups_flat]
        for held in (each for group in groups for each in group):
            self._held.state[held] = {
                "step": torch.tensor(float(step)),
                **{which: torch.zeros_like(held.data) for which in MOMENTS.values()},
            }
        optimiser = self._engine.optimizer
        if hasattr(optimiser, "_lazy_init_hp_params_optimizer_state"):
            # Those that it knows already are no longer the ones that are updated.
            optimiser._hp_optimizer_states_linked = False
            optimiser._lazy_init_hp_params_optimizer_state()

    def _set_value(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Both: the one that is updated and the one that the model runs with."""
        self._set_exact(parameter, value)
        with self._gathered(parameter):
            parameter.data.copy_(value.to(parameter.device))

    def _gathered(self, parameter: nn.Parameter) -> Any:
        from contextlib import nullcontext

        import deepspeed

        if self._stage < 3:
            return nullcontext()
        return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def _settings(
    section: DeepSpeedConfig, config: RecoverConfig, ranks: int, clip: float, layer: int
) -> dict[str, Any]:
    """DeepSpeed's config; what it holds beside a rank's share is at most about a layer's size."""
    passes = -(-config.batch // (ranks * config.micro_batch))
    bucket = min(layer, _LARGEST_BUCKET)
    zero: dict[str, Any] = {
        "stage": section.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "sub_group_size": layer,
        "stage3_max_live_parameters": layer,
        "stage3_max_reuse_distance": layer,
        "stage3_prefetch_bucket_size": min(layer // 4, _LARGEST_BUCKET),
    }
    if section.cpu_offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": section.bf16},
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }


def _layer_size(model: Any) -> int:
    """Values of the largest layer."""
    return largest_layer({n: shape_of(p).numel() for n, p in model.named_parameters()})


def _own_part(parameter: Any, value: Tensor, rank: int) -> Tensor:
    """What a rank holds of a value with ZeRO 3: equal parts, the last ones filled up with zeros."""
    size = parameter.ds_tensor.numel()
    own = value.flatten()[rank * size : (rank + 1) * size]
    return nn.functional.pad(own, (0, size - len(own)))
