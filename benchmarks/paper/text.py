"""Windows of held-out text, and what a model is asked about them; the same for both kinds of model.

A window is a source and a target, neighbouring pieces of a document stream. Everything is scored by
the likelihood of a target after a source: a decoder reads both, an encoder-decoder one with each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK = 4  # tokens of each of the two pieces that change places
BATCH = 64
TASKS = ("continuation", "order", "domain")


@dataclass(frozen=True)
class Windows:
    """Sources and targets [N, piece] of every domain, in the order of their names."""

    domains: tuple[str, ...]
    sources: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]


def windows(streams: dict[str, Tensor], count: int, piece: int, seed: int) -> Windows:
    """`count` windows per domain at random places, none over another."""
    generator = torch.Generator().manual_seed(seed)
    names, sources, targets = sorted(streams), [], []
    for name in names:
        places = torch.randperm(len(streams[name]) // (2 * piece), generator=generator)[:count]
        rows = streams[name][places[:, None] * 2 * piece + torch.arange(2 * piece)]
        sources.append(rows[:, :piece].contiguous())
        targets.append(rows[:, piece:].contiguous())
    return Windows(tuple(names), tuple(sources), tuple(targets))


@torch.inference_mode()
def log_likelihood(model: Any, sources: Tensor, targets: Tensor) -> Tensor:
    """[N] fp64 log-probability of each target after its source."""
    found = []
    for start in range(0, len(sources), BATCH):
        source, target = sources[start : start + BATCH], targets[start : start + BATCH]
        if model.config.is_encoder_decoder:
            logits = model(input_ids=source, labels=target, use_cache=False).logits
        else:
            ids = torch.cat([source, target], dim=1)
            logits = model(input_ids=ids, use_cache=False).logits[:, source.shape[1] - 1 : -1]
        said = logits.float().log_softmax(-1).gather(2, target[:, :, None])
        found.append(said.sum(dim=(1, 2), dtype=torch.float64))
    return torch.cat(found)


def measure(model: Any, asked: Windows) -> dict[str, Any]:
    """Perplexity per domain and overall (geometric mean), and the share of right answers per task.

    continuation: the true target against those of two other windows of the domain. order: the true
    target against itself with the two pieces of 4 tokens in its middle exchanged. domain: the
    target after another window's source of its own domain against those of two other domains.
    """
    count, tokens = len(asked.domains), asked.targets[0].shape[1]
    right: dict[str, list[Tensor]] = {task: [] for task in TASKS}
    losses = {}
    for number, name in enumerate(asked.domains):
        source, target = asked.sources[number], asked.targets[number]
        true = log_likelihood(model, source, target)
        losses[name] = float(-true.mean() / tokens)
        others = [log_likelihood(model, source, target.roll(by, 0)) for by in (1, 2)]
        right["continuation"].append(true > torch.stack(others).amax(0))
        right["order"].append(true > log_likelihood(model, source, _exchanged(target)))
        contexts = [asked.sources[(number + by) % count].roll(1, 0) for by in (0, 1, 2)]
        first, *rest = (log_likelihood(model, context, target) for context in contexts)
        right["domain"].append(first > torch.stack(rest).amax(0))
    return {
        "loss": sum(losses.values()) / len(losses),
        "perplexity": {name: math.exp(loss) for name, loss in losses.items()},
        "tasks": {task: float(torch.cat(each).double().mean()) for task, each in right.items()},
    }


def _exchanged(target: Tensor) -> Tensor:
    order = torch.arange(target.shape[1])
    middle = len(order) // 2
    order[middle - CHUNK : middle + CHUNK] = order[middle - CHUNK : middle + CHUNK].roll(CHUNK)
    return target[:, order]
