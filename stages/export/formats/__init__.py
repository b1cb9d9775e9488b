"""Checkpoint formats. A new one is a file, a literal in the config, and a line here."""

from stages.export.formats.base import Format
from stages.export.formats.expanded import Expanded
from stages.export.formats.mapped import Mapped
from stages.export.formats.native import Native

FORMATS: dict[str, Format] = {"native": Native(), "mapped": Mapped(), "expanded": Expanded()}

__all__ = ["FORMATS", "Format"]
