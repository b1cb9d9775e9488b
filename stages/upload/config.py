"""Config of the upload stage."""

from __future__ import annotations

from stages.settings import Settings

VERSION = 1


class UploadConfig(Settings):
    """Where a copy of the finished checkpoint goes."""

    # A prefix that holds nothing, or what this run has sent there before.
    url: str
