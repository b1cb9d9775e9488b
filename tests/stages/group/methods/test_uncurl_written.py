"""What UNCURL decided, written: invariants of the checkpoint, not of the decision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models.mapped.registration import register
from models.moe import MoeCheckpoint
from stages.calibrate.statistics import LayerStatistics
from stages.export.config import ExportConfig
from stages.group.config import Uncurl
from stages.group.decision import LayerDecision
from stages.group.methods.uncurl import decide
from tests.stages.group.observed import random_layer
from tests.tiny import (
    EXPERTS,
    HIDDEN,
    WIDTH,
    compress,
    logits_of,
    open_model,
    random_ids,
    random_input,
    save_tiny,
)

LAYERS = [random_layer(EXPERTS, layer, layer=layer) for layer in range(2)]
IDS = random_ids(3, 12)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> MoeCheckpoint:
    register()
    return MoeCheckpoint.open(save_tiny(tmp_path_factory.mktemp("model"), "mixtral"))


def decided(kept: int, **fields: object) -> list[LayerDecision]:
    return decide(Uncurl.model_validate(fields), LAYERS, kept * len(LAYERS))


def test_as_many_clusters_as_experts_change_no_bit_of_a_logit(
    moe: MoeCheckpoint, tmp_path: Path
) -> None:
    output = compress(moe, decided(EXPERTS), tmp_path, ExportConfig(format="mapped"))

    assert logits_of(open_model(output), IDS).equal(
        logits_of(open_model(moe.checkpoint.folder), IDS)
    )


def test_one_cluster_opens_and_computes(moe: MoeCheckpoint, tmp_path: Path) -> None:
    decisions = decided(1)
    output = compress(moe, decisions, tmp_path, ExportConfig(format="mapped"))

    assert [len(each.representatives) for each in decisions] == [1, 1]
    assert logits_of(open_model(output), IDS).isfinite().all()


def test_logits_that_are_all_alike_are_still_cut_into_d_clusters() -> None:
    alike = [
        LayerStatistics(each.layer, each.sums | {"logit_gram": np.ones((EXPERTS, EXPERTS))})
        for each in LAYERS
    ]

    found = decide(Uncurl(), alike, 2 * 3)

    assert [len(each.representatives) for each in found] == [3, 3]
    assert all(None not in each.group for each in found)


def test_pruning_by_frequency_slices_rows_in_order_and_raises_the_first_gate(
    moe: MoeCheckpoint, tmp_path: Path
) -> None:
    decisions = decided(3, grouping="frequency_prune")

    output = MoeCheckpoint.open(compress(moe, decisions, tmp_path))

    for decision in decisions:
        kept = list(decision.representatives)
        assert kept == sorted(np.argsort(-LAYERS[decision.layer].frequency)[:3].tolist())
        rows = moe.read_router(decision.layer)
        assert output.read_router(decision.layer).equal(rows[kept])
        # The softmax is over fewer experts: a first choice that stays gets a larger share.
        logits = random_input(50, HIDDEN, decision.layer) @ rows.T
        stays = torch.isin(logits.argmax(dim=1), torch.tensor(kept))
        before = logits.softmax(dim=1).amax(dim=1)[stays]
        after = logits[:, kept].softmax(dim=1).amax(dim=1)[stays]
        assert stays.any() and (after > before).all()


@pytest.mark.parametrize("kept", [2, 4])
def test_parameters_are_those_of_the_experts_and_rows_that_went(
    moe: MoeCheckpoint, tmp_path: Path, kept: int
) -> None:
    """Per layer and expert three matrices of H x I and a router row of H."""
    output = compress(moe, decided(kept), tmp_path)

    before, after = (
        sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
        for folder in (moe.checkpoint.folder, output)
    )

    assert before - after == len(LAYERS) * (EXPERTS - kept) * (3 * HIDDEN * WIDTH + HIDDEN)


def test_a_cluster_that_was_never_used_is_averaged_evenly(
    moe: MoeCheckpoint, tmp_path: Path
) -> None:
    decisions = decided(1)
    idle = [replace(each, weight=(0.0,) * EXPERTS) for each in decisions]
    even = [replace(each, weight=(1.0,) * EXPERTS) for each in decisions]

    found, expected = (
        load_file(
            compress(moe, each, tmp_path / name, ExportConfig(format="mapped"))
            / "model.safetensors"
        )
        for name, each in (("idle", idle), ("even", even))
    )

    assert all(tensor.equal(expected[name]) for name, tensor in found.items())
