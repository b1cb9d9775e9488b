"""Nothing is counted that a router chose among values that are no numbers."""

from __future__ import annotations

from stages.calibrate.observer import Routed
from stages.corpus.blocks import Batch
from stages.errors import StatisticsError


def refuse_not_finite(layer: int, routed: Routed, batch: Batch) -> None:
    """Looks at the logits of every token, and at what the experts made of it.

    Raises:
        StatisticsError: layer, domain, batch, number of tokens and what to try.
    """
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
