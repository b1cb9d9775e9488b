"""The paper's semantics (arXiv 2310.01334, A3): E router rows, an `expert_map`, K_l experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.expert import Expert
from models.factored import AnyExpert, FactoredExpert, plain
from models.families.storage import Fused
from models.mapped.registration import code_files, config_json
from models.moe import MoeCheckpoint
from models.support import require
from stages.compress.config import CompressConfig
from stages.compress.layer import applies, shapes
from stages.export.config import ExportConfig
from stages.export.formats.expanded import refuse_dropped
from stages.group.decision import LayerDecision


class Mapped:
    """See `base.Format`. Names are those of the model in memory, because transformers applies no
    conversion to a model type of our own."""

    needs_code = True

    def check(self, moe: MoeCheckpoint, decisions: Sequence[LayerDecision]) -> None:
        """Every expert needs a group; any number and width per layer will do."""
        require(moe.family, "mapped")
        refuse_dropped(decisions, "mapped")

    def layer_tensors(
        self,
        moe: MoeCheckpoint,
        decision: LayerDecision,
        merged: Sequence[AnyExpert],
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
            **{block + name: tensor for name, tensor in _packed(storage, merged).items()},
            block + "experts.expert_map": torch.tensor(decision.group, dtype=torch.int64),
        }

    def dense_name(self, moe: MoeCheckpoint, name: str) -> str:
        """As transformers calls it in memory."""
        return moe.family.memory_name(name)

    def config_json(
        self, moe: MoeCheckpoint, decisions: Sequence[LayerDecision], config: ExportConfig
    ) -> dict[str, Any]:
        """The model type of the modeling file, and the number of experts per layer."""
        counts = {decision.layer: len(decision.representatives) for decision in decisions}
        widths = {each.layer: each.width for each in decisions if each.width is not None}
        one = {each.width for each in decisions}
        width = one.pop() if len(one) == 1 else widths
        factors = {
            decision.layer: _factors(moe, decision, config.compress)
            for decision in decisions
            if config.compress is not None and applies(config.compress, decision.layer)
        }
        axis = None if config.compress is None else config.compress.axis
        return config_json(moe.checkpoint.config, counts, width, factors or None, axis)

    def extra_files(self, moe: MoeCheckpoint) -> Mapping[str, Path]:
        """The modeling file, and the family's classes where transformers has none."""
        files = *code_files(moe.family.model_type), *moe.family.code
        return {path.name: path for path in files}


def _packed(storage: Fused, merged: Sequence[AnyExpert]) -> dict[str, Tensor]:
    """Name below the block -> tensor [K, ...]; every matrix of its own where it is decomposed."""
    small = [expert for expert in merged if isinstance(expert, FactoredExpert)]
    if not small:
        return storage.pack([plain(expert) for expert in merged])
    return {
        f"experts.{field}_proj.{part}": torch.stack(
            [expert.matrices()[field].tensors()[part] for expert in small]
        )
        for field, matrix in small[0].matrices().items()
        for part in matrix.tensors()
    }


def _factors(
    moe: MoeCheckpoint, decision: LayerDecision, config: CompressConfig
) -> dict[str, list[int]]:
    """Matrix -> rank and kept rows (or columns), for config.json."""
    found = shapes(kept_expert(moe, decision), config, decision.layer)
    return {f"{field}_proj": [each.rank, each.kept] for field, each in found.items()}


def kept_expert(moe: MoeCheckpoint, decision: LayerDecision) -> Expert:
    """One expert of a layer without memory, of the width that is written."""
    expert = moe.meta_expert(decision.layer)
    if decision.width is None:
        return expert
    return expert.select(torch.arange(decision.width, device="meta"))
