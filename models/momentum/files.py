"""The files that a MomentumSMoE folder carries, so that it opens without Coalesce. No torch."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent
CODE = tuple(
    _HERE / f"{name}.py"
    for name in ("configuration_momentum", "momentum_steps", "modeling_momentum")
)
AUTO_MAP = {
    "AutoConfig": "configuration_momentum.MomentumConfig",
    "AutoModelForCausalLM": "modeling_momentum.MomentumForCausalLM",
}
