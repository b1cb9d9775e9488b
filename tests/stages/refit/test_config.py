"""The preset of the refit: what it sets, and that what is written beside it counts first."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from stages.refit.config import PolishConfig, RefitConfig


def test_thorough_means_layer_after_layer_and_more_steps() -> None:
    plain, thorough = RefitConfig(), RefitConfig(preset="thorough")

    assert (plain.target, plain.polish.steps) == ("original", 150)
    assert (thorough.target, thorough.polish.steps) == ("sequential", 1500)
    assert (plain.polish.last_layer, thorough.polish.last_layer) == ("outputs", "logits")
    assert thorough.together == 1
    assert thorough.held_out < plain.held_out
    assert thorough.polish.batch == plain.polish.batch


def test_what_is_written_counts_before_the_preset() -> None:
    found = RefitConfig.model_validate(
        {"preset": "thorough", "target": "blockwise", "polish": {"steps": 7, "rate": 0.1}}
    )

    assert found.target == "blockwise"
    assert found.polish.last_layer == "outputs"  # what that target can do
    assert (found.polish.steps, found.polish.rate) == (7, 0.1)
    given = RefitConfig(preset="thorough", polish=PolishConfig(rate=0.1))
    assert (given.target, given.polish.steps) == ("sequential", 150)


def test_a_dumped_section_is_read_back_unchanged() -> None:
    given = (
        RefitConfig(polish=PolishConfig(steps=7)),
        RefitConfig(preset="parallel", block_layers=2),
    )
    for found in (RefitConfig(), *given, RefitConfig(preset="thorough", held_out=0.3)):
        assert RefitConfig.model_validate(found.model_dump(mode="json")) == found
        assert RefitConfig.model_validate_json(found.model_dump_json()) == found


def test_auto_takes_a_preset_behind_what_was_given() -> None:
    found = RefitConfig(held_out=0.3, polish=PolishConfig(steps=7))
    again = RefitConfig.model_validate(found.model_dump(mode="json"))
    for each in (found, again):
        thorough = each.as_preset("thorough")
        assert (thorough.held_out, thorough.polish.steps) == (0.3, 7)
        assert (thorough.target, thorough.solved_on) == ("sequential", 32.0)
    assert RefitConfig().as_preset("parallel").target == RefitConfig().target == "original"


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"thorough"):
        RefitConfig.model_validate({"preset": "slow"})


def test_the_last_layer_needs_its_stream() -> None:
    with pytest.raises(ValidationError, match="needs target=sequential"):
        RefitConfig.model_validate({"polish": {"last_layer": "logits"}})
    with pytest.raises(ValidationError, match="needs target=sequential"):
        RefitConfig.model_validate(
            {"preset": "thorough", "target": "blockwise", "polish": {"last_layer": "logits"}}
        )
