"""Config of the narrow stage: how neurons are chosen."""

from __future__ import annotations

from pydantic import Field

from stages.settings import Settings

VERSION = 1


class NarrowConfig(Settings):
    """Second-order saliency on the Gram matrix of the gated activations."""

    # Added to the Gram's diagonal, in units of its mean: how much tokens count that were not seen.
    # Never less than 1e-9, whatever is given: a singular Gram is solved.
    ridge: float = Field(default=0.01, ge=0)
    # Tokens per kept neuron below which an expert borrows the tokens of the whole layer.
    tokens_per_neuron: float = Field(default=2.0, ge=0)
