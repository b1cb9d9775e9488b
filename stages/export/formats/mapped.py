"""The paper's semantics (arXiv 2310.01334, A3): E router rows, an `expert_map`, K_l experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.expert import Expert
from models.mapped.registration import code_files, config_json
from models.moe import MoeCheckpoint
from models.support import require
from stages.export.config import ExportConfig
from stages.export.formats.expanded import refuse_dropped
from stages.export.formats.native import one_width
from stages.group.decision import LayerDecision


class Mapped:
    """See `base.Format`. Names are those of the model in memory, because transformers applies no
    conversion to a model type of our own."""

    needs_code = True

    def check(self, moe: MoeCheckpoint, decisions: Sequence[LayerDecision]) -> None:
        """Every expert needs a group; any number per layer will do."""
        require(moe.family, "mapped")
        refuse_dropped(decisions, "mapped")
        one_width(decisions)

    def layer_tensors(
        self,
        moe: MoeCheckpoint,
        decision: LayerDecision,
        merged: Sequence[Expert],
        routers: Mapping[str, Tensor],
        config: ExportConfig,
    ) -> dict[str, Tensor]:
        """Fused experts [K, ...], expert_map [E], and the router untouched, all as in memory."""
        require(moe.family, "mapped")
        storage = moe.family.memory_experts
        assert storage is not None
        block = moe.family.memory_prefix(decision.layer)
        return {
            **{moe.family.memory_name(name): tensor for name, tensor in routers.items()},
            **{block + name: tensor for name, tensor in storage.pack(merged).items()},
            block + "experts.expert_map": torch.tensor(decision.group, dtype=torch.int64),
        }

    def dense_name(self, moe: MoeCheckpoint, name: str) -> str:
        """As transformers calls it in memory."""
        return moe.family.memory_name(name)

    def config_json(self, moe: MoeCheckpoint, decisions: Sequence[LayerDecision]) -> dict[str, Any]:
        """The model type of the modeling file, and the number of experts per layer."""
        counts = {decision.layer: len(decision.representatives) for decision in decisions}
        return config_json(moe.checkpoint.config, counts, one_width(decisions))

    def extra_files(self, moe: MoeCheckpoint) -> Mapping[str, Path]:
        """The modeling file, and the family's classes where transformers has none."""
        files = *code_files(moe.family.model_type), *moe.family.code
        return {path.name: path for path in files}
