"""Every slot holds its group's expert: the mapped model's function in a plain checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from models.factored import AnyExpert, plain
from models.moe import MoeCheckpoint
from stages.errors import BudgetError
from stages.export.config import ExportConfig
from stages.export.formats.native import check_widths, named_experts, narrowed
from stages.group.decision import LayerDecision


class Expanded:
    """See `base.Format`. As large as the original; exact wherever the original opens."""

    needs_code = False

    def check(self, moe: MoeCheckpoint, decisions: Sequence[LayerDecision]) -> None:
        """Every expert needs a group to be redirected to."""
        refuse_dropped(decisions, "expanded")
        check_widths(moe, decisions)

    def layer_tensors(
        self,
        moe: MoeCheckpoint,
        decision: LayerDecision,
        merged: Sequence[AnyExpert],
        routers: Mapping[str, Tensor],
        config: ExportConfig,
    ) -> dict[str, Tensor]:
        """E experts, members of a group alike, and the router untouched."""
        whole = [plain(expert) for expert in merged]
        slots = [whole[group] for group in decision.group if group is not None]
        # safetensors stores no aliases: every slot needs memory of its own.
        copies = [expert.map(Tensor.clone) for expert in slots]
        return {
            **routers,
            **named_experts(moe, decision.layer, copies),
        }

    def dense_name(self, moe: MoeCheckpoint, name: str) -> str:
        """Unchanged."""
        return name

    def config_json(
        self, moe: MoeCheckpoint, decisions: Sequence[LayerDecision], config: ExportConfig
    ) -> dict[str, Any]:
        """As many experts as before."""
        original = moe.family.with_num_experts(moe.checkpoint.config, moe.num_experts)
        return narrowed(moe, decisions, original)

    def extra_files(self, moe: MoeCheckpoint) -> Mapping[str, Path]:
        """The family's classes, where transformers has none."""
        return {path.name: path for path in moe.family.code}


def refuse_dropped(decisions: Sequence[LayerDecision], name: str) -> None:
    """Redirecting needs a target: refuses decisions that drop an expert."""
    dropped = sum(group is None for decision in decisions for group in decision.group)
    if dropped:
        raise BudgetError(
            f"the {name} format redirects every expert to a group; the decision drops {dropped}",
            "pruning methods need export.format=native",
        )
