"""AdamW with values, gradients and moments dealt out to the ranks by DeepSpeed (ZeRO).

What the ranks hold is gathered by name for a state, and dealt out again from one, through
`deepspeed.utils.safe_{get,set}_full_*`. DeepSpeed lets Adam make its moments in the first step, and
looks for those of all groups of parameters once the first group has stepped, when the others have
none (0.19.8). Here they are made beforehand; `_lazy_init_hp_params_optimizer_state`, by which
DeepSpeed takes notice of them, and `fp32_partitioned_groups_flat` are no public names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stages.recover.config import DeepSpeedConfig, RecoverConfig
from stages.recover.plain import adamw
from stages.recover.ranks import Ranks
from stages.recover.state import Named

_MOMENTS = ("exp_avg", "exp_avg_sq")
# DeepSpeed computes the norm of a gradient only where it clips it.
_NO_CLIP = 1e30


class Zero:
    """See `stages.recover.plain.Optimiser`; the ranks must have joined a group.

    The model is wrapped once per process: a second wrapping would meet the first one's hooks.
    """

    def __init__(
        self, model: Any, trained: Mapping[str, nn.Parameter], config: RecoverConfig, ranks: Ranks
    ) -> None:
        import deepspeed

        section = config.deepspeed or DeepSpeedConfig()
        self._stage, self._size = section.zero_stage, ranks.size
        self._clip = _NO_CLIP if config.clip is None else config.clip
        self._trained = dict(trained)
        # fp32 as they are on disk: wrapping may round the model.
        start = {name: p.detach().float().clone() for name, p in trained.items()}
        self._engine, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=adamw(trained, config),
            config=_settings(section, config, ranks.size, 0.0 if self._stage == 0 else self._clip),
            dist_init_required=False,
        )
        self.model = self._engine
        self._make_moments(0)
        if section.bf16:
            self._set_values(start)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Optimiser`. DeepSpeed divides by the ranks, and the loss is divided already."""
        self._engine.backward(loss * self._size, scale_wrt_gas=False)
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

    def values(self) -> Named:
        """See `Optimiser`."""
        from deepspeed.utils import safe_get_full_fp32_param as gathered

        plain = self._stage == 0
        return {n: _on_cpu(p if plain else gathered(p)) for n, p in self._trained.items()}

    def moments(self) -> tuple[Named, Named]:
        """See `Optimiser`."""
        first, second = (
            {name: _on_cpu(self._moment(p, which)) for name, p in self._trained.items()}
            for which in _MOMENTS
        )
        return first, second

    def load(self, values: Named, first: Named, second: Named, step: int) -> None:
        """See `Optimiser`."""
        self._set_values(values)
        self._make_moments(step)
        for which, moments in zip(_MOMENTS, (first, second), strict=True):
            for name, parameter in self._trained.items():
                self._set_moment(parameter, which, moments[name])

    @property
    def _held(self) -> Any:
        """State of the optimiser inside, by the (flat) tensors that it updates."""
        return self._engine.basic_optimizer

    def _moment(self, parameter: nn.Parameter, which: str) -> Tensor:
        if self._stage == 0:
            found: Tensor = self._held.state[parameter][which]
            return found
        from deepspeed.utils import safe_get_full_optimizer_state

        gathered: Tensor = safe_get_full_optimizer_state(parameter, which)
        return gathered

    def _set_moment(self, parameter: nn.Parameter, which: str, moment: Tensor) -> None:
        if self._stage == 0:
            self._held.state[parameter][which].copy_(moment)
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, moment.to(parameter.device), which)

    def _make_moments(self, step: int) -> None:
        """Zeros of the right shapes, as if `step` updates had been made."""
        groups = [each["params"] for each in self._held.param_groups]
        if self._stage == 3:
            groups = [self._engine.optimizer.fp32_partitioned_groups_flat]
        for held in (each for group in groups for each in group):
            self._held.state[held] = {
                "step": torch.tensor(float(step)),
                **{which: torch.zeros_like(held.data) for which in _MOMENTS},
            }
        optimiser = self._engine.optimizer
        if hasattr(optimiser, "_lazy_init_hp_params_optimizer_state"):
            # Those that it knows already are no longer the ones that are updated.
            optimiser._hp_optimizer_states_linked = False
            optimiser._lazy_init_hp_params_optimizer_state()

    def _set_values(self, values: Named) -> None:
        """Into the fp32 values that are updated, and into those that the model runs with."""
        from deepspeed.utils import safe_set_full_fp32_param

        for name, parameter in self._trained.items():
            value = values[name].to(parameter.device)
            if self._stage:
                safe_set_full_fp32_param(parameter, value)
            with self._gathered(parameter):
                parameter.data.copy_(value)

    def _gathered(self, parameter: nn.Parameter) -> Any:
        from contextlib import nullcontext

        import deepspeed

        if self._stage < 3:
            return nullcontext()
        return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def _settings(
    section: DeepSpeedConfig, config: RecoverConfig, ranks: int, clip: float
) -> dict[str, Any]:
    passes = -(-config.batch // (ranks * config.micro_batch))
    zero: dict[str, Any] = {"stage": section.zero_stage}
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


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().clone()
