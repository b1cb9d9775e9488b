"""Config of the align stage."""

from __future__ import annotations

from stages.settings import Settings

VERSION = 1


class AlignConfig(Settings):
    """Whether members of a group are aligned to its representative before they are averaged."""

    enabled: bool = True
