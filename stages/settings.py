"""The base of every stage's Config."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Strict and frozen: an unknown key is an error, and a resolved config never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)
