"""K experts, K router rows, the family's own names: opens wherever the original opens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.factored import AnyExpert, plain
from models.moe import MoeCheckpoint
from models.skeleton import check_width
from stages.errors import BudgetError
from stages.export.config import ExportConfig
from stages.group.decision import LayerDecision
from stages.merge.mean import weighted_mean


class Native:
    """See `base.Format`. The router is approximated: a group's mass is no single linear row."""

    needs_code = False

    def check(self, moe: MoeCheckpoint, decisions: Sequence[LayerDecision]) -> None:
        """One K and one width for all layers, and K >= top-k."""
        check_widths(moe, decisions)
        counts = sorted({len(decision.representatives) for decision in decisions})
        if len(counts) > 1:
            raise BudgetError(
                f"the native format holds one number of experts for all layers; the decision has"
                f" {counts[0]} to {counts[-1]}",
                "use group.scope=uniform without skip_layers, or export.format=mapped",
            )
        if counts[0] >= moe.top_k and counts[0] != moe.native_count(counts[0]):
            _refuse_unbalanced(moe, counts[0])
        if counts[0] < moe.top_k:
            raise BudgetError(
                f"{counts[0]} experts per layer are fewer than the {moe.top_k} that the router"
                " selects for every token",
                f"keep at least {moe.native_count(1)} of {moe.num_experts}, or use"
                " export.format=mapped",
            )

    def layer_tensors(
        self,
        moe: MoeCheckpoint,
        decision: LayerDecision,
        merged: Sequence[AnyExpert],
        routers: Mapping[str, Tensor],
        config: ExportConfig,
    ) -> dict[str, Tensor]:
        """Experts 0..K-1 under the family's names, and K router rows."""
        _check_balance(moe, decision)
        axes = moe.family.router_axes(decision.layer)
        cut = {name: _cut(tensor, axes[name], decision, config) for name, tensor in routers.items()}
        return {**cut, **named_experts(moe, decision.layer, merged)}

    def dense_name(self, moe: MoeCheckpoint, name: str) -> str:
        """Unchanged."""
        return name

    def config_json(
        self, moe: MoeCheckpoint, decisions: Sequence[LayerDecision], config: ExportConfig
    ) -> dict[str, Any]:
        """The original config with K experts."""
        kept = len(decisions[0].representatives)
        original = moe.checkpoint.config
        return narrowed(moe, decisions, moe.family.with_num_experts(original, kept))

    def extra_files(self, moe: MoeCheckpoint) -> Mapping[str, Path]:
        """The family's classes, where transformers has none."""
        return {path.name: path for path in moe.family.code}


def narrowed(
    moe: MoeCheckpoint, decisions: Sequence[LayerDecision], config: dict[str, Any]
) -> dict[str, Any]:
    """`config` with the decided width of the experts, if one was decided."""
    width = one_width(decisions)
    return config if width is None else moe.family.with_width(config, width)


def one_width(decisions: Sequence[LayerDecision]) -> int | None:
    """The width of all layers' experts; None: that of the original.

    Raises:
        BudgetError: layers of several widths.
    """
    widths = {decision.width for decision in decisions}
    if len(widths) > 1:
        raise BudgetError(
            f"config.json holds one width of experts for all layers; the decision has {widths}",
            "give every layer the same width, or use export.format=mapped",
        )
    return widths.pop()


def check_widths(moe: MoeCheckpoint, decisions: Sequence[LayerDecision]) -> None:
    """One width for all layers, and one that the family's class can give to its experts alone."""
    if (width := one_width(decisions)) is not None:
        check_width(moe, width)


def named_experts(
    moe: MoeCheckpoint, layer: int, experts: Sequence[AnyExpert]
) -> dict[str, Tensor]:
    """Disk name -> tensor, as the family stores its experts: whole matrices."""
    prefix = moe.family.block_prefix(layer)
    packed = moe.family.experts.pack([plain(expert) for expert in experts])
    return {prefix + name: tensor for name, tensor in packed.items()}


def _cut(tensor: Tensor, axis: int, decision: LayerDecision, config: ExportConfig) -> Tensor:
    """K of the E entries along `axis` of a router's weight or bias."""
    entries = tensor.movedim(axis, 0)
    rows = entries[list(decision.representatives)]
    if config.router == "mean":
        rows = torch.stack([_mean_row(entries, decision, ids) for ids in decision.members])
    return rows.movedim(0, axis)


def _mean_row(router: Tensor, decision: LayerDecision, members: tuple[int, ...]) -> Tensor:
    """Frequency-weighted mean of the members' rows, `[H]`, or of their biases."""
    if len(members) == 1:
        return router[members[0]]
    rows = [router[expert] for expert in members]
    return weighted_mean(rows, [decision.weight[expert] for expert in members])


def _refuse_unbalanced(moe: MoeCheckpoint, kept: int) -> None:
    possible = moe.native_count(kept)
    raise BudgetError(
        f"{kept} of {moe.num_experts} experts cannot be shared out to the {moe.router_groups}"
        f" groups that the router of {moe.family.model_type} chooses among",
        f"keep {possible}, or use export.format=mapped",
    )


def _check_balance(moe: MoeCheckpoint, decision: LayerDecision) -> None:
    """A kept expert's place tells its router group, so that every group must keep the same number.

    Raises:
        BudgetError: the decision was made without regard to the groups.
    """
    size = moe.num_experts // moe.router_groups
    kept = Counter(expert // size for expert in decision.representatives)
    if len(kept) != moe.router_groups or len(set(kept.values())) > 1:
        raise BudgetError(
            f"layer {decision.layer} keeps {[kept[g] for g in range(moe.router_groups)]} experts in"
            f" the {moe.router_groups} router groups; the native format needs equal numbers",
            "use export.format=mapped",
        )
