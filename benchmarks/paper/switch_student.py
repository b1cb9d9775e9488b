"""A reduced Switch model in memory: members of a group share one module, and its gradient.

On disk a merged Switch model is `native` (fewer router rows) or `expanded` (every slot a copy), of
which neither keeps copies alike in training, nor U V + S apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.paper.cells import Cell
from models.blocks import find_blocks
from models.expert import Expert
from models.factored import Factored
from models.moe import MoeCheckpoint
from stages.align.config import AlignConfig
from stages.compress.config import CompressConfig
from stages.compress.layer import compress
from stages.compress.scores import curves
from stages.compress.threshold import share_out
from stages.group.decision import LayerDecision
from stages.merge.config import MergeConfig
from stages.merge.groups import merge_groups
from stages.recover.loss import recovery_loss, teacher_of


class FactoredLinear(nn.Module):
    """x -> x (U V + S)', never written out."""

    def __init__(self, made: Factored) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(made.left), nn.Parameter(made.right)
        self.s = nn.Parameter(made.kept)
        self.register_buffer("index", made.index)

    @property
    def weight(self) -> Tensor:
        """Its type is all that the family's module looks at."""
        return self.u

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., H]."""
        return (x @ self.v.T @ self.u.T).index_add(-1, self.get_buffer("index"), x @ self.s.T)


def reduce(
    model: Any,
    moe: MoeCheckpoint,
    decisions: Sequence[LayerDecision],
    cell: Cell,
    config: CompressConfig,
) -> None:
    """Puts the decided experts into an opened original."""
    blocks: dict[int, Any] = dict(find_blocks(model))
    if cell.method == "prune":
        for decision in decisions:
            _prune(blocks[decision.layer], decision)
        return
    align, merge = AlignConfig(enabled=cell.aligned), MergeConfig(weights=cell.weights)
    merged = {each.layer: merge_groups(moe, each, align, merge)[0] for each in decisions}
    if cell.threshold == "global":
        found = [each for layer in merged for each in curves(merged[layer], config, layer, None)]
        config = config.model_copy(update={"numbers": share_out(found, config.multiple)})
    for decision in decisions:
        block = blocks[decision.layer]
        modules = [block.experts[f"expert_{each}"] for each in decision.representatives]
        for module, expert in zip(modules, merged[decision.layer], strict=True):
            _fill(module, expert, config if cell.decomposed else None, decision.layer)
        for slot, group in enumerate(decision.group):
            assert group is not None
            block.experts[f"expert_{slot}"] = modules[group]


def _fill(module: Any, expert: Expert, config: CompressConfig | None, layer: int) -> None:
    if config is None:
        module.wi.weight.data.copy_(expert.up)
        module.wo.weight.data.copy_(expert.down)
        return
    made = compress(expert, config, layer)
    module.wi, module.wo = FactoredLinear(made.up), FactoredLinear(made.down)


def _prune(block: Any, decision: LayerDecision) -> None:
    """Dropped experts lose their router rows, as in the native format."""
    kept = list(decision.representatives)
    rows = block.router.classifier.weight.data[kept]
    block.router.classifier.weight = nn.Parameter(rows.clone())
    block.router.num_experts = block.experts.num_experts = len(kept)
    modules = [block.experts[f"expert_{each}"] for each in kept]
    for name in list(block.experts):
        del block.experts[name]
    for number, module in enumerate(modules):
        block.experts[f"expert_{number}"] = module


def recover(
    student: Any,
    teacher: Any,
    batches: Sequence[tuple[Tensor, Tensor]],
    *,
    alpha: float,
    temperature: float,
    rate: float,
) -> None:
    """Trains the experts alone, as `recover.mode=experts` does; the rate falls to zero.

    Args:
        batches: sources and targets [B, piece], one per step.
    """
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    chosen = {id(p): p for b in find_blocks(student).values() for p in b.experts.parameters()}
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(chosen.values(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    for step, (source, target) in enumerate(batches):
        with torch.no_grad():
            said = teacher(input_ids=source, labels=target).logits.flatten(0, 1)
        logits = student(input_ids=source, labels=target).logits.flatten(0, 1)
        known = teacher_of(said, temperature) if alpha else None
        loss, _ = recovery_loss(
            logits, target.flatten(), known, alpha=alpha, temperature=temperature
        )
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not type it
        torch.nn.utils.clip_grad_norm_(chosen.values(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = rate * (1 - step / len(batches))
        optimiser.step()
        optimiser.zero_grad()
