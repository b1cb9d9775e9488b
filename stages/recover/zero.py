"""AdamW with values, gradients and moments dealt out to the ranks by DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from stages.recover.config import RecoverConfig
from stages.recover.ranks import Ranks


class Zero:
    """See `stages.recover.plain.Optimiser`. The group must have been joined."""

    def __init__(
        self, model: Any, trained: Mapping[str, nn.Parameter], config: RecoverConfig, ranks: Ranks
    ) -> None:
        raise NotImplementedError
