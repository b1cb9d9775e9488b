"""Every layer is rewritten on its own, and only what was merged changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.atomic import file_digest
from models.errors import CheckpointError
from models.moe import MoeCheckpoint
from stages.align.config import AlignConfig
from stages.align.matching import align
from stages.export.config import ExportConfig
from stages.group.decision import LayerDecision, from_labels
from stages.merge.config import MergeConfig
from stages.merge.groups import merge_groups
from stages.merge.mean import merge
from stages.transform.stage import run_one
from stages.unit import execute
from tests.tiny import (
    EXPERTS,
    FAMILIES,
    compress,
    logits_of,
    open_model,
    random_ids,
    same,
    same_bits,
    save_tiny,
    transform_units,
)

FORMATS = ("native", "mapped", "expanded")
WEIGHT = [0.3, 0.05, 0.25, 0.2, 0.15, 0.05]
# Expert -> representative: {0, 2, 5} around 2, {1, 3} around 1, and 4 alone.
LABELS = [2, 1, 2, 1, 4, 2]


@pytest.fixture(scope="module", params=FAMILIES)
def moe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MoeCheckpoint:
    return MoeCheckpoint.open(save_tiny(tmp_path_factory.mktemp(request.param), request.param))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> MoeCheckpoint:
    return MoeCheckpoint.open(save_tiny(tmp_path_factory.mktemp("mixtral"), "mixtral"))


def merging(moe: MoeCheckpoint) -> list[LayerDecision]:
    return [from_labels(layer, LABELS, WEIGHT) for layer in moe.layers]


def keeping(moe: MoeCheckpoint) -> list[LayerDecision]:
    return [from_labels(layer, range(EXPERTS), WEIGHT) for layer in moe.layers]


def stored(outputs: Sequence[Path]) -> dict[str, torch.Tensor]:
    return {name: t for path in outputs for name, t in load_file(path).items()}


@pytest.mark.parametrize("form", ["native", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeping_every_expert_gives_a_bit_identical_checkpoint(
    tmp_path: Path, form: str, dtype: torch.dtype
) -> None:
    for family in FAMILIES:
        moe = MoeCheckpoint.open(save_tiny(tmp_path / family, family, dtype))
        export = ExportConfig(format=form)

        output = compress(moe, keeping(moe), tmp_path / f"{family}-out", export)

        before = load_file(moe.checkpoint.folder / "model.safetensors")
        after = load_file(output / "model.safetensors")
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert same_bits(after[name], tensor), name


def test_keeping_every_expert_keeps_every_logit(moe: MoeCheckpoint, tmp_path: Path) -> None:
    output = compress(moe, keeping(moe), tmp_path)

    expected = logits_of(open_model(moe.checkpoint.folder), random_ids(2, 9))
    assert logits_of(open_model(output), random_ids(2, 9)).equal(expected)


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_not_merged_is_copied_bit_for_bit(
    moe: MoeCheckpoint, tmp_path: Path, form: str
) -> None:
    units = transform_units(moe, merging(moe), tmp_path, ExportConfig(format=form))
    for unit in units:
        run_one(unit)
    found = stored([unit.output for unit in units])
    original = load_file(moe.checkpoint.folder / "model.safetensors")

    for name, tensor in original.items():
        if not moe.family.is_moe_tensor(name):
            assert found[moe.family.memory_name(name) if form == "mapped" else name].equal(tensor)


def test_members_are_aligned_to_the_representative_and_weighted(mixtral: MoeCheckpoint) -> None:
    decision = merging(mixtral)[1]
    experts = [mixtral.read_expert(1, expert) for expert in range(EXPERTS)]

    merged, _ = merge_groups(mixtral, decision, AlignConfig(), MergeConfig())

    # Groups in the order of their representatives: 1, 2, 4.
    first = merge([experts[1], align(experts[1], experts[3])], [0.05, 0.2])
    second = [align(experts[2], experts[0]), experts[2], align(experts[2], experts[5])]
    assert same(merged[0], first)
    assert same(merged[1], merge(second, [0.3, 0.25, 0.05]))
    assert same(merged[2], experts[4])


def test_alignment_can_be_switched_off(mixtral: MoeCheckpoint) -> None:
    decision = merging(mixtral)[0]
    experts = mixtral.read_experts(0, [1, 3])

    merged, distances = merge_groups(mixtral, decision, AlignConfig(enabled=False), MergeConfig())

    assert same(merged[0], merge(experts, [0.05, 0.2]))
    assert distances["distance_after"] == distances["distance_before"]


def test_uniform_weights_ignore_the_frequencies(mixtral: MoeCheckpoint) -> None:
    decision = merging(mixtral)[0]
    experts = mixtral.read_experts(0, [1, 3])

    merged, _ = merge_groups(mixtral, decision, AlignConfig(), MergeConfig(weights="uniform"))

    assert same(merged[0], merge([experts[0], align(*experts)], [1.0, 1.0]))


def test_alignment_brings_members_nearer(moe: MoeCheckpoint, tmp_path: Path) -> None:
    for unit in transform_units(moe, merging(moe), tmp_path, ExportConfig()):
        result = run_one(unit)
        if unit.decision is not None:
            assert 0 < result["distance_after"] < result["distance_before"]


def test_dropped_experts_are_not_read_or_stored(mixtral: MoeCheckpoint, tmp_path: Path) -> None:
    decisions = [from_labels(layer, [None, 1, None, 3, None, None], WEIGHT) for layer in (0, 1)]

    output = compress(mixtral, decisions, tmp_path)

    found = MoeCheckpoint.open(output)
    assert found.num_experts == 2
    assert same(found.read_expert(1, 0), mixtral.read_expert(1, 1))
    assert same(found.read_expert(1, 1), mixtral.read_expert(1, 3))


def test_files_cover_every_tensor_once(moe: MoeCheckpoint, tmp_path: Path) -> None:
    units = transform_units(moe, keeping(moe), tmp_path, ExportConfig())
    for unit in units:
        run_one(unit)

    names = [name for unit in units for name in load_file(unit.output)]

    assert sorted(names) == sorted(moe.checkpoint.tensors)
    assert [unit.output.name for unit in units][-1] == "rest.safetensors"
    assert units[0].output.name == "layer-00000.safetensors"


@pytest.mark.parametrize("form", FORMATS)
def test_any_order_and_any_repetition_give_the_same_bytes(
    moe: MoeCheckpoint, tmp_path: Path, form: str
) -> None:
    export = ExportConfig(format=form)
    forward = transform_units(moe, merging(moe), tmp_path / "a", export)
    backward = transform_units(moe, merging(moe), tmp_path / "b", export)
    for unit in [*forward, *reversed(backward), backward[0]]:
        run_one(unit)

    for one, other in zip(forward, backward, strict=True):
        assert file_digest(one.output) == file_digest(other.output)


def test_a_killed_layer_is_written_again_with_the_same_bytes(
    mixtral: MoeCheckpoint, tmp_path: Path
) -> None:
    unit = transform_units(mixtral, merging(mixtral), tmp_path, ExportConfig())[0]
    whole = execute(unit, run_one)
    unit.output.write_bytes(unit.output.read_bytes()[:100])

    again = execute(unit, run_one)

    assert not again.resumed
    assert again.digests == whole.digests


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    folder = save_tiny(tmp_path / "model", "mixtral")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.experts.4.w2.weight"][3, 3] = value
    save_file(tensors, folder / "model.safetensors")
    moe = MoeCheckpoint.open(folder)
    units = transform_units(moe, merging(moe), tmp_path, ExportConfig())

    run_one(units[0])
    with pytest.raises(CheckpointError, match=r"experts\.2\.w2\.weight holds values"):
        run_one(units[1])
    assert not units[1].output.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_member_that_is_not_finite_is_matched_somehow_and_refused(
    tmp_path: Path, value: float
) -> None:
    """Matching must end, whatever it is given; what comes of it is not written."""
    folder = save_tiny(tmp_path / "model", "mixtral")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.block_sparse_moe.experts.3.w1.weight"][2, 5] = value
    save_file(tensors, folder / "model.safetensors")
    moe = MoeCheckpoint.open(folder)
    unit = transform_units(moe, merging(moe), tmp_path, ExportConfig())[0]

    with pytest.raises(CheckpointError, match=r"experts\.0\.w1\.weight holds values"):
        run_one(unit)
    assert not unit.output.exists()


def test_the_fingerprint_follows_decision_and_config(
    mixtral: MoeCheckpoint, tmp_path: Path
) -> None:
    def first(decisions: list[LayerDecision], **options: object) -> object:
        export = ExportConfig(router="mean" if options.get("router") else "representative")
        aligned = not options.get("unaligned")
        return transform_units(mixtral, decisions, tmp_path, export, aligned=aligned)[0].fingerprint

    base = first(merging(mixtral))

    assert first(merging(mixtral)) == base
    assert first(keeping(mixtral)) != base
    assert first(merging(mixtral), router=True) != base
    assert first(merging(mixtral), unaligned=True) != base


def test_another_layers_decision_does_not_touch_this_one(
    mixtral: MoeCheckpoint, tmp_path: Path
) -> None:
    mixed = [merging(mixtral)[0], keeping(mixtral)[1]]

    units = [
        transform_units(mixtral, each, tmp_path, ExportConfig())[0]
        for each in (mixed, merging(mixtral))
    ]

    assert units[0].fingerprint == units[1].fingerprint
