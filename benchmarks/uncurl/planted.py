"""Experts that are copies of each other: a reduction has to find them and lose nothing.

Every expert of a trained model is copied with its neurons in another order, its router row with a
little noise. With one expert per token and gates that are shares of the softmax over all experts,
a copy is chosen with the gate of its original over the number of copies; the down projections are
multiplied by that number, so that the model computes what it did before.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.errors import CheckpointError

_EXPERT = re.compile(r"(.*\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight")
_ROUTER = re.compile(r".*\.mlp\.gate\.weight")


def clone(source: Path, target: Path, copies: int, noise: float, seed: int) -> None:
    """Writes an OLMoE checkpoint in float32 with `copies` copies of every expert.

    Expert e of E stands at e, E + e, 2 E + e and so on.

    Args:
        noise: standard deviation that is added to router rows, over that of the rows.

    Raises:
        CheckpointError: more than one expert works on a token; copies would then crowd out others.
    """
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    if config["num_experts_per_tok"] != 1:
        raise CheckpointError(
            f"{source} sends a token to {config['num_experts_per_tok']} experts",
            "copy experts of a model with num_experts_per_tok=1",
        )
    experts = int(config["num_experts"])
    generator = torch.Generator().manual_seed(seed)
    shutil.copytree(source, target, dirs_exist_ok=True)
    orders: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}
    for name, tensor in sorted(load_file(source / "model.safetensors").items()):
        wide = tensor.float()
        if found := _EXPERT.fullmatch(name):
            front, expert, part = found[1], int(found[2]), found[3]
            for copy in range(copies):
                place = f"{front}{copy * experts + expert}"
                order = orders.setdefault(place, _order(wide, part, generator))
                moved = wide[:, order] * copies if part == "down" else wide[order]
                made[f"{place}.{part}_proj.weight"] = moved.contiguous()
        elif _ROUTER.fullmatch(name):
            rows = wide.repeat(copies, 1)
            drawn = torch.randn(rows.shape, generator=generator)
            made[name] = rows + noise * wide.std() * drawn
        else:
            made[name] = wide
    save_file(made, target / "model.safetensors", metadata={"format": "pt"})
    changed = {"num_experts": experts * copies, "dtype": "float32"}
    (target / "config.json").write_text(json.dumps(config | changed))


def adjusted_rand(first: Sequence[int], second: Sequence[int]) -> float:
    """Agreement of two partitions (Hubert and Arabie 1985): 1 if they are the same, about 0 by
    chance."""
    table = np.zeros((max(first) + 1, max(second) + 1))
    np.add.at(table, (list(first), list(second)), 1)

    def pairs(counts: Any) -> float:
        return float((counts * (counts - 1) / 2).sum())

    both, ours, theirs = pairs(table), pairs(table.sum(axis=1)), pairs(table.sum(axis=0))
    expected = ours * theirs / pairs(np.array([len(first)]))
    largest = (ours + theirs) / 2
    return 1.0 if largest == expected else (both - expected) / (largest - expected)


def _order(tensor: Tensor, part: str, generator: torch.Generator) -> Tensor:
    neurons = tensor.shape[1] if part == "down" else tensor.shape[0]
    return torch.randperm(neurons, generator=generator)
