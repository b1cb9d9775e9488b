"""K experts, K router rows, the family's own names: opens wherever the original opens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.expert import Expert
from models.moe import MoeCheckpoint
from stages.errors import BudgetError
from stages.export.config import ExportConfig
from stages.group.decision import LayerDecision
from stages.merge.mean import weighted_mean


class Native:
    """See `base.Format`. The router is approximated: a group's mass is no single linear row."""

    needs_code = False

    def check(self, moe: MoeCheckpoint, decisions: Sequence[LayerDecision]) -> None:
        """One K for all layers, and K >= top-k."""
        counts = sorted({len(decision.representatives) for decision in decisions})
        if len(counts) > 1:
            raise BudgetError(
                f"the native format holds one number of experts for all layers; the decision has"
                f" {counts[0]} to {counts[-1]}",
                "use group.scope=uniform without skip_layers, or export.format=mapped",
            )
        if counts[0] < moe.top_k:
            raise BudgetError(
                f"{counts[0]} experts per layer are fewer than the {moe.top_k} that the router"
                " selects for every token",
                f"keep at least {moe.top_k} of {moe.num_experts}, or use export.format=mapped",
            )

    def layer_tensors(
        self,
        moe: MoeCheckpoint,
        decision: LayerDecision,
        merged: Sequence[Expert],
        router: Tensor,
        config: ExportConfig,
    ) -> dict[str, Tensor]:
        """Experts 0..K-1 under the family's names, and K router rows."""
        rows = router[list(decision.representatives)]
        if config.router == "mean":
            rows = torch.stack([_mean_row(router, decision, ids) for ids in decision.members])
        return {
            moe.family.router_name(decision.layer): rows,
            **named_experts(moe, decision.layer, merged),
        }

    def dense_name(self, moe: MoeCheckpoint, name: str) -> str:
        """Unchanged."""
        return name

    def config_json(self, moe: MoeCheckpoint, decisions: Sequence[LayerDecision]) -> dict[str, Any]:
        """The original config with K experts."""
        kept = len(decisions[0].representatives)
        return moe.family.with_num_experts(moe.checkpoint.config, kept)

    def extra_files(self) -> Mapping[str, Path]:
        """None."""
        return {}


def named_experts(moe: MoeCheckpoint, layer: int, experts: Sequence[Expert]) -> dict[str, Tensor]:
    """Disk name -> tensor for experts stored one by one."""
    return {
        moe.family.expert_name(layer, index, part): tensor
        for index, expert in enumerate(experts)
        for part, tensor in expert.tensors().items()
    }


def _mean_row(router: Tensor, decision: LayerDecision, members: tuple[int, ...]) -> Tensor:
    """[H] frequency-weighted mean of the members' router rows."""
    if len(members) == 1:
        return router[members[0]]
    rows = [router[expert] for expert in members]
    return weighted_mean(rows, [decision.weight[expert] for expert in members])
