"""Nothing is counted that a router chose among values that are no numbers."""

from __future__ import annotations

import numpy as np

from stages.calibrate.observer import Routed, Sums
from stages.corpus.blocks import Batch
from stages.errors import StatisticsError


def refuse_not_finite(layer: int, routed: Routed, batch: Batch, sums: Sums) -> None:
    """Looks at the logits of every token, and at what the experts made of it.

    Args:
        sums: those of `routed`. A sum of squares is finite where all values are (fp32 squares do
            not overflow fp64), so that only a refusal goes through the tokens once more.

    Raises:
        StatisticsError: layer, domain, batch, number of tokens and what to try.
    """
    if np.isfinite(sums["logit_gram"].trace() + sums["norm_sq"].sum()):
        return
    values = {"router logits": routed.logits, "expert outputs": routed.norms}
    for what, found in values.items():
        if found.isfinite().all():
            continue
        tokens = int((~found.isfinite()).any(dim=-1).sum())
        raise StatisticsError(
            f"layer {layer}: {what} of {tokens:,} of {len(found):,} tokens are not finite (domain"
            f" {batch.domain!r}, batch of blocks {batch.start} to"
            f" {batch.start + len(batch.blocks) - 1})",
            "set calibrate.dtype=float32 (float16 overflows); if that does not help, the"
            " checkpoint is damaged: download it again, and set model.verify=full",
        )
