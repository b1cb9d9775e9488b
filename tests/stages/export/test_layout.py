"""Predicted bytes are the bytes that are written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from models.moe import MoeCheckpoint
from stages.export.config import ExportConfig
from stages.export.layout import file_layouts, placeholder, sizes
from stages.group.budget import total_experts
from stages.group.config import Budget
from stages.group.decision import LayerDecision, from_labels
from stages.transform.stage import run_one
from tests.tiny import EXPERTS, FAMILIES, PROPERTY, open_model, save_tiny, transform_units

FORMATS = ("native", "mapped", "expanded")


@pytest.fixture(scope="module", params=FAMILIES)
def moe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MoeCheckpoint:
    return MoeCheckpoint.open(save_tiny(tmp_path_factory.mktemp(request.param), request.param))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> MoeCheckpoint:
    """12 experts: some names have one digit more than others."""
    folder = tmp_path_factory.mktemp("many")
    return MoeCheckpoint.open(save_tiny(folder, "olmoe", torch.bfloat16, num_experts=12))


def decisions_of(moe: MoeCheckpoint, kept: int) -> list[LayerDecision]:
    return placeholder(moe, dict.fromkeys(moe.layers, kept))


def assert_exact(moe: MoeCheckpoint, kept: int, form: str, folder: Path) -> None:
    export, decisions = ExportConfig(format=form), decisions_of(moe, kept)
    units = transform_units(moe, decisions, folder, export)
    for unit, layout in zip(units, file_layouts(moe, decisions, export), strict=True):
        written = run_one(unit)["bytes"]
        tensors = load_file(unit.output).values()
        assert layout.layer == unit.layer
        assert layout.file_bytes == written == unit.output.stat().st_size
        assert layout.tensor_bytes == sum(tensor.nbytes for tensor in tensors)
        floats = [tensor.numel() for tensor in tensors if tensor.is_floating_point()]
        assert layout.parameters == sum(floats)


@pytest.mark.parametrize("kept", [1, 3, EXPERTS])
@pytest.mark.parametrize("form", FORMATS)
def test_bytes_are_predicted_exactly(
    moe: MoeCheckpoint, tmp_path: Path, form: str, kept: int
) -> None:
    assert_exact(moe, kept, form, tmp_path)


@pytest.mark.parametrize("kept", range(1, 13))
@pytest.mark.parametrize("form", FORMATS)
def test_bytes_are_predicted_exactly_for_every_number_of_experts(
    many: MoeCheckpoint, tmp_path: Path, form: str, kept: int
) -> None:
    assert_exact(many, kept, form, tmp_path)


@pytest.mark.parametrize("form", FORMATS)
def test_bytes_are_predicted_exactly_for_mixed_types(tmp_path: Path, form: str) -> None:
    """The library stores wider types first, whatever the names."""
    folder = save_tiny(tmp_path / "model", "mixtral", torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    kinds = {"gate": torch.float32, "norm": torch.float64, "q_proj": torch.float16}
    for name, tensor in tensors.items():
        kind = next((dtype for part, dtype in kinds.items() if part in name), tensor.dtype)
        tensors[name] = tensor.to(kind)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    assert_exact(MoeCheckpoint.open(folder), 3, form, tmp_path)


def test_layers_with_different_counts_have_their_own_sizes(moe: MoeCheckpoint) -> None:
    decisions = placeholder(moe, {moe.layers[0]: 2, moe.layers[1]: 5})

    layouts = {each.layer: each for each in file_layouts(moe, decisions, ExportConfig())}

    difference = layouts[moe.layers[1]].tensor_bytes - layouts[moe.layers[0]].tensor_bytes
    row = 32 * 4
    assert difference == 3 * (moe.expert_bytes(moe.layers[0]) + row)


def test_parameters_are_those_of_the_model(moe: MoeCheckpoint) -> None:
    decisions = decisions_of(moe, EXPERTS)

    total = sum(each.parameters for each in file_layouts(moe, decisions, ExportConfig()))

    model = open_model(moe.checkpoint.folder)
    assert total == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("form", ["native", "mapped"])
def test_merging_shrinks_the_files(moe: MoeCheckpoint, form: str) -> None:
    totals = [
        sum(each.file_bytes for each in file_layouts(moe, decisions_of(moe, kept), config))
        for kept in range(1, EXPERTS + 1)
        for config in [ExportConfig(format=form)]
    ]

    assert totals == sorted(set(totals))


def test_the_expanded_format_saves_nothing(moe: MoeCheckpoint) -> None:
    config = ExportConfig(format="expanded")

    totals = {
        sum(each.file_bytes for each in file_layouts(moe, decisions_of(moe, kept), config))
        for kept in (1, EXPERTS)
    }

    assert len(totals) == 1


@pytest.mark.parametrize("form", ["native", "mapped"])
@PROPERTY
@given(share=st.floats(0, 1))
def test_a_budget_in_bytes_is_met_to_one_expert(
    many: MoeCheckpoint, form: str, share: float
) -> None:
    """Headers differ by a few digits between experts: a twentieth of a tiny expert at most."""
    config = ExportConfig(format=form)
    parts = sizes(many, config)
    layers = len(many.layers)
    smallest = parts.fixed + layers * parts.per_expert
    target = int(smallest + share * (parts.per_expert * layers * (many.num_experts - 1)))
    total = total_experts(Budget(target_bytes=target), layers, many.num_experts, parts)
    kept = {layer: total // layers + (i < total % layers) for i, layer in enumerate(many.layers)}

    layouts = file_layouts(many, placeholder(many, kept), config)

    written = sum(each.file_bytes for each in layouts)
    assert target - 1.05 * parts.per_expert < written <= target + 0.05 * parts.per_expert * layers


def test_the_bytes_of_a_number_of_experts_lead_back_to_it_within_one(many: MoeCheckpoint) -> None:
    config = ExportConfig()
    parts, layers = sizes(many, config), len(many.layers)

    for kept in range(2, many.num_experts + 1):
        layouts = file_layouts(many, decisions_of(many, kept), config)
        budget = Budget(target_bytes=sum(each.file_bytes for each in layouts))
        assert abs(total_experts(budget, layers, many.num_experts, parts) - kept * layers) <= 1


def test_a_placeholder_has_the_asked_counts(moe: MoeCheckpoint) -> None:
    found = placeholder(moe, dict.fromkeys(moe.layers, 4))

    assert [len(each.representatives) for each in found] == [4] * len(moe.layers)
    assert all(group is not None for each in found for group in each.group)


def test_dropping_and_merging_to_one_count_take_the_same_bytes(moe: MoeCheckpoint) -> None:
    dropped = [from_labels(layer, [0, 1, 2, None, None, None], [1.0] * 6) for layer in moe.layers]

    layouts = [file_layouts(moe, each, ExportConfig()) for each in (dropped, decisions_of(moe, 3))]

    assert layouts[0] == layouts[1]
