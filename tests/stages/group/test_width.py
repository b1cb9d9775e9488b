"""From a budget to a width, exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import CheckpointError
from models.moe import MoeCheckpoint
from stages.errors import BudgetError
from stages.export.config import ExportConfig
from stages.export.formats import FORMATS
from stages.export.layout import file_layouts, sizes
from stages.group.config import Budget, Coalesce
from stages.group.decision import from_table, to_table
from stages.group.stage import decide
from stages.group.width import Widths, kept_steps, kept_width, spread
from tests.tiny import EXPERTS, FAMILIES, PROPERTY, WIDTH, save_tiny, statistics_of
from tests.tiny_families import save_family

WIDTHS = Widths(neurons=96, fixed=1000, per_neuron=10)


@pytest.mark.parametrize(
    ("budget", "width"),
    [
        (Budget(keep_ratio=0.5), 48),
        (Budget(keep_ratio=0.51), 48),
        (Budget(keep_ratio=1.0), 96),
        (Budget(experts_per_layer=4), 24),
        (Budget(target_bytes=1000 + 10 * 56), 56),
        (Budget(target_bytes=1000 + 10 * 56 - 1), 48),
        (Budget(target_bytes=10**9), 96),
    ],
    ids=str,
)
def test_the_width_is_the_largest_that_the_budget_allows(budget: Budget, width: int) -> None:
    assert kept_width(budget, 16, WIDTHS, 8) == width


@PROPERTY
@given(target=st.integers(1010, 3000), multiple=st.integers(1, 16))
def test_a_budget_in_bytes_is_met_and_used_up(target: int, multiple: int) -> None:
    try:
        width = kept_width(Budget(target_bytes=target), 16, WIDTHS, multiple)
    except BudgetError:
        assert target < 1000 + 10 * multiple
        return
    assert width % multiple == 0 and 1000 + 10 * width <= target
    assert width + multiple > 96 or 1000 + 10 * (width + multiple) > target


@PROPERTY
@given(target=st.integers(1080, 3000), layers=st.integers(1, 7))
def test_a_divided_budget_pays_for_every_step_and_no_more(target: int, layers: int) -> None:
    budget = Budget(target_bytes=target)
    steps = kept_steps(budget, 16, WIDTHS, 8, layers)
    widths = spread(steps, layers, 8)

    def size(neurons: int) -> float:
        return 1000 + 10 * neurons / layers  # a layer has its share of `per_neuron`

    assert sum(widths) == 8 * steps and max(widths) - min(widths) <= 8
    assert min(widths) >= kept_width(budget, 16, WIDTHS, 8)
    assert size(sum(widths)) <= target
    assert size(sum(widths) + 8) > target or sum(widths) == 96 * layers


def test_a_budget_for_no_neuron_says_what_everything_takes() -> None:
    with pytest.raises(BudgetError, match=r"leaves 4 of 96 neurons.*multiples of 8.*1,000 bytes"):
        kept_width(Budget(target_bytes=1045), 16, WIDTHS, 8)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("multiple", [1, 4, 8])
def test_bytes_follow_from_the_width(family: str, multiple: int, tmp_path: Path) -> None:
    """The arithmetic agrees with the exporter's own sizes, to within the text of the headers."""
    moe = MoeCheckpoint.open(save_tiny(tmp_path, family))
    found = sizes(moe, ExportConfig())
    assert found.widths is not None and found.widths.neurons == WIDTH
    statistics = [statistics_of(layer, [1] * EXPERTS) for layer in moe.layers]
    config = Coalesce(budget=Budget(keep_ratio=0.5), multiple=multiple)

    decisions = decide(config, statistics, found)

    width = WIDTH // 2 // multiple * multiple
    assert {decision.width for decision in decisions} == {width}
    assert from_table(to_table(decisions, {})) == decisions
    real = sum(each.file_bytes for each in file_layouts(moe, decisions, ExportConfig()))
    promised = found.widths.fixed + width * found.widths.per_neuron
    assert 0 <= promised - real < 8 * (len(moe.layers) + 1) * EXPERTS
    config_json = FORMATS["native"].config_json(moe, decisions, ExportConfig())
    assert config_json[moe.family.intermediate_key] == width


@pytest.mark.parametrize("field", [{"skip_layers": [0]}, {"protect_super_experts": True}], ids=str)
def test_what_a_width_for_all_experts_contradicts_is_refused(field: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        Coalesce.model_validate(field)


def test_a_width_that_other_modules_share_is_refused(tmp_path: Path) -> None:
    """Shared experts of DeepSeek are as wide as a number of routed ones."""
    moe = MoeCheckpoint.open(save_family(tmp_path, "DeepseekV3"))
    statistics = [statistics_of(layer, [1] * moe.num_experts) for layer in moe.layers]
    decisions = decide(Coalesce(), statistics, sizes(moe, ExportConfig()))

    with pytest.raises(CheckpointError, match=r"cannot be narrowed to 8 neurons alone.*shared"):
        FORMATS["native"].check(moe, decisions)
