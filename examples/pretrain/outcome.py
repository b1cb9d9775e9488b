"""What a comparison keeps of one trained model: losses while training and on held-out text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from inspect_model import mean_loss, windows
from train import Progress


def kept(result: Path) -> dict[str, Any] | None:
    """What was measured of this model before; None: nothing yet."""
    if not result.exists():
        return None
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def measured(
    model: Any, progress: Progress, held_out: Mapping[str, Tensor], length: int, result: Path
) -> dict[str, Any]:
    """Cross-entropy in nats per domain of a trained model, written to `result`.

    Args:
        model: as it was saved.
        held_out: [N] tokens of every domain, cut into windows of `length`.
    """
    losses = {
        domain: mean_loss(model, windows(stream, len(stream), length))
        for domain, stream in held_out.items()
    }
    made = {
        "losses": progress.losses,
        "seconds": progress.seconds,
        "held_out_loss": losses,
        "held_out_perplexity": math.exp(sum(losses.values()) / len(losses)),
    }
    result.write_text(json.dumps(made))
    return made
