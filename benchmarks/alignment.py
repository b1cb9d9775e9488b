"""Permutation alignment: seconds per pair of experts, by size and by how alike the experts are.

Related experts differ by noise, so the row maxima of the gain usually are a permutation and no
solver runs; unrelated ones are the worst case, a full assignment problem.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.output import show, wants_quick
from models.expert import Expert
from stages.align.matching import assignment, matching_gain


def random_expert(neurons: int, hidden: int, generator: torch.Generator) -> Expert:
    """gate, up [I, H] and down [H, I] of unit variance."""
    shapes = {"gate": (neurons, hidden), "up": (neurons, hidden), "down": (hidden, neurons)}
    return Expert(**{n: torch.randn(s, generator=generator) for n, s in shapes.items()})


def related(expert: Expert, noise: float, generator: torch.Generator) -> Expert:
    """The expert with its neurons shuffled and noise added."""
    order = torch.randperm(expert.neurons, generator=generator)
    return expert.permuted(order).map(
        lambda t: t + noise * torch.randn(t.shape, generator=generator)
    )


def measure(neurons: int, hidden: int, noise: float | None) -> dict[str, Any]:
    """Seconds of the two steps for one pair; noise None: unrelated experts."""
    generator = torch.Generator().manual_seed(neurons)
    reference = random_expert(neurons, hidden, generator)
    if noise is None:
        target = random_expert(neurons, hidden, generator)
    else:
        target = related(reference, noise, generator)
    start = time.perf_counter()
    gain = matching_gain(reference, target)
    middle = time.perf_counter()
    found = assignment(gain)
    end = time.perf_counter()
    return {
        "neurons": neurons,
        "hidden": hidden,
        "experts": "unrelated" if noise is None else f"noise {noise:g}",
        "solver": "none" if gain.argmax(dim=1).equal(found) else "lapjv",
        "gain_seconds": round(middle - start, 4),
        "assignment_seconds": round(end - middle, 4),
    }


def main() -> None:
    """Measures sizes up to Qwen3's experts, or up to Mixtral's."""
    sizes = [(160, 192), (768, 2048)] if wants_quick(str(__doc__)) else [(768, 2048), (14336, 4096)]
    noises: list[float | None] = [0.1, 1.0, None]
    show("alignment", [measure(i, h, noise) for i, h in sizes for noise in noises])


if __name__ == "__main__":
    main()
