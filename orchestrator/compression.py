"""Whether the experts can be decomposed as a run asks for; asked before a byte is written."""

from __future__ import annotations

from collections.abc import Sequence

from models.moe import MoeCheckpoint
from orchestrator.config import RunConfig
from orchestrator.errors import ConfigError
from stages.compress.check import check
from stages.export.formats.mapped import kept_expert
from stages.group.decision import LayerDecision


def check_compression(
    config: RunConfig, moe: MoeCheckpoint, decisions: Sequence[LayerDecision]
) -> None:
    """Refuses ranks that do not exist, factors that save nothing, and budgets without a meaning.

    Args:
        decisions: of the main variant, as the budget lets them expect.

    Raises:
        UserError: with the sizes.
    """
    if config.compress is None:
        return
    if config.group.narrows and config.group.budget.target_bytes is not None:
        raise ConfigError(
            f"group.budget.target_bytes is {config.group.budget.target_bytes:,}; how many neurons"
            " that leaves is not known where what is left of them is decomposed",
            "use group.budget.keep_ratio, or a method that merges or drops experts",
        )
    if config.compress.threshold == "global" and config.group.budget.target_bytes is not None:
        raise ConfigError(
            f"group.budget.target_bytes is {config.group.budget.target_bytes:,};"
            " compress.threshold=global decides the last bytes after the layers were looked at",
            "use group.budget.keep_ratio, or compress.threshold=layer",
        )
    experts = [(decision.layer, kept_expert(moe, decision)) for decision in decisions]
    check(config.compress, moe, experts, small=config.export.format == "mapped")
