"""Presets set what is not given beside them, and survive being written down."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from stages.recover.config import RecoverConfig


@pytest.mark.parametrize("preset", ["paper", "long"])
def test_a_preset_gives_way_to_what_stands_beside_it(preset: str) -> None:
    plain, asked = RecoverConfig(), RecoverConfig(preset=preset)
    changed = {n for n, v in plain if v != getattr(asked, n)} - {"preset"}
    assert "alpha" in changed
    given = RecoverConfig(preset=preset, alpha=0.5)
    assert given == asked.model_copy(update={"alpha": 0.5})
    assert RecoverConfig.model_validate(asked.model_dump(mode="json")) == asked


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ValidationError, match="preset"):
        RecoverConfig.model_validate({"preset": "longer"})
