"""The base of every stage's Config."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Strict and frozen: an unknown key or a number that is not finite is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)
