"""What a checkpoint format decides: tensors of a layer, config.json, and what it can express."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from models.factored import AnyExpert
from models.moe import MoeCheckpoint
from stages.export.config import ExportConfig
from stages.group.decision import LayerDecision


class Format(Protocol):
    """A checkpoint format. All functions are pure; tensors may be on the meta device."""

    # Opens only with the modeling file that is written beside the weights.
    needs_code: bool

    def check(self, moe: MoeCheckpoint, decisions: Sequence[LayerDecision]) -> None:
        """Raises BudgetError when the format cannot express the decisions."""

    def layer_tensors(
        self,
        moe: MoeCheckpoint,
        decision: LayerDecision,
        merged: Sequence[AnyExpert],
        routers: Mapping[str, Tensor],
        config: ExportConfig,
    ) -> dict[str, Tensor]:
        """Name -> tensor of router and experts.

        Args:
            moe: the original.
            decision: what becomes of the layer.
            merged: one expert per group; decomposed where the config asks for it.
            routers: disk name -> the router's weight and biases, with all E entries.
            config: how the router is cut.
        """

    def dense_name(self, moe: MoeCheckpoint, name: str) -> str:
        """The name of a tensor outside router and experts."""

    def config_json(
        self, moe: MoeCheckpoint, decisions: Sequence[LayerDecision], config: ExportConfig
    ) -> dict[str, Any]:
        """The config.json of the output."""

    def extra_files(self, moe: MoeCheckpoint) -> Mapping[str, Path]:
        """File name -> source of files that belong beside the weights."""
