"""What `benchmarks.compress` asks besides speed: the arithmetic of plans, the time of an SVD."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator import flops
from orchestrator.absolute import absolute
from orchestrator.commands.plan import standing_in
from orchestrator.load import load
from orchestrator.preflight import expected_decisions, expected_layouts, prepare
from stages.compress.lowrank import fast_factors, truncated_factors
from stages.compress.randomised import randomised_svd

PLANS = Path(__file__).resolve().parents[1] / "examples" / "plans"
RANKS = (32, 200)
# Tokens of source and of target that count in attention scores.
LENGTH = 512


def planned(name: str) -> dict[str, Any]:
    """Values, bytes and operations of one of `examples/plans`, from its config.json alone."""
    config = absolute(load(str(PLANS / f"{name}.yaml")).config)
    with tempfile.TemporaryDirectory() as folder:
        config = config.model_copy(update={"run_dir": Path(folder) / "run"})
        with standing_in(config) as imagined:
            run = prepare(imagined)
            moe, compress = run.moe, run.config.compress
            decisions = expected_decisions(run.variants[0], moe)
            before, after = flops.per_token(moe), flops.per_token(moe, decisions, compress)
            scores = flops.attention(moe, LENGTH)
            layouts = expected_layouts(run.variants[0], moe)
            return {
                "plan": name,
                "full": flops.parameters(moe),
                "merged": flops.parameters(moe, decisions),
                "decomposed": flops.parameters(moe, decisions, compress),
                "file_bytes_before": moe.checkpoint.file_bytes,
                "file_bytes_after": sum(each.file_bytes for each in layouts),
                "flops_before": before,
                "flops_after": after,
                "flops_share": after / before,
                "flops_share_with_attention": (after + scores) / (before + scores),
                "attention_tokens": LENGTH,
            }


def decompositions(height: int, width: int) -> list[dict[str, Any]]:
    """Seconds, and the error over the best one, of every way to a low rank of a random matrix."""
    torch.manual_seed(0)
    matrix = torch.randn(height, width)
    ways: dict[str, Callable[[int], tuple[Tensor, Tensor]]] = {
        "torch's full SVD": lambda rank: truncated_factors(matrix, rank),
        "`exact`": lambda rank: fast_factors(matrix, rank),
        "`randomised`": lambda rank: _projected(matrix, rank),
    }
    found: list[dict[str, Any]] = []
    for rank in RANKS:
        for name, way in ways.items():
            begun = time.process_time()
            left, right = way(rank)
            seconds = time.process_time() - begun
            error = float((matrix.double() - left.double() @ right.double()).norm())
            best = found[-1]["best"] if found and found[-1]["rank"] == rank else error
            row = {"way": name, "rank": rank, "seconds": seconds, "error_over_best": error / best}
            found.append(row | {"best": best, "height": height, "width": width})
    return found


def _projected(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    left, values, right = randomised_svd(matrix, rank)
    root = values.sqrt()
    return left * root, root[:, None] * right
