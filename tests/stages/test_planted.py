"""A model whose merging has a known answer.

All experts of a layer are neuron permutations of one trained network, taken from the bundled
checkpoint. Whatever is merged with whatever, the original function must come back; without
alignment it must not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.arrow import write_table
from models.expert import Expert
from models.mapped.registration import register
from models.moe import MoeCheckpoint
from stages.align.matching import align, assignment, matching_gain
from stages.calibrate.config import CalibrateConfig
from stages.calibrate.stage import Replica, plan, reduce
from stages.calibrate.statistics import layers_of
from stages.corpus.blocks import Block
from stages.corpus.config import CorpusConfig, Source
from stages.export.config import ExportConfig
from stages.export.layout import sizes
from stages.group.config import Budget, McSmoe
from stages.group.decision import LayerDecision, from_labels
from stages.group.stage import decide
from tests.tiny import (
    PROPERTY,
    apply,
    compress,
    logits_of,
    open_model,
    random_ids,
    random_input,
    random_permutation,
    same,
    save_tiny,
)

BUNDLED = Path(__file__).parents[2] / "examples" / "bundled" / "model"
EXPERTS = 6
IDS = random_ids(4, 24, seed=5)


class Planted:
    """The checkpoint, and the networks and permutations that are hidden in it."""

    def __init__(self, folder: Path) -> None:
        source = MoeCheckpoint.open(BUNDLED)
        width, hidden = source.read_expert(source.layers[0], 0).up.shape
        self.seeds = [
            source.read_expert(layer, expert).map(Tensor.float)
            for layer, expert in ((source.layers[0], 0), (source.layers[-1], 1))
        ]
        self.permutations = {
            (layer, expert): random_permutation(width, 10 * layer + expert)
            for layer in range(2)
            for expert in range(EXPERTS)
        }
        dimensions = {"hidden_size": hidden, "intermediate_size": width}
        save_tiny(folder, "mixtral", **dimensions)
        tensors = load_file(folder / "model.safetensors")
        family = MoeCheckpoint.open(folder).family
        for (layer, expert), permutation in self.permutations.items():
            hidden_copy = self.seeds[layer].permuted(permutation).tensors()
            for part, name in family.expert_tensor_names(layer, expert).items():
                tensors[name] = hidden_copy[part].contiguous()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        self.moe = MoeCheckpoint.open(folder)
        self.logits = logits_of(open_model(folder), IDS)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    register()
    return Planted(tmp_path_factory.mktemp("planted"))


def deviation(planted: Planted, output: Path) -> float:
    """Relative distance of the logits from the original's."""
    found = logits_of(open_model(output), IDS)
    return float((found - planted.logits).norm() / planted.logits.norm())


def decisions_of(labels: list[int], weight: list[float]) -> list[LayerDecision]:
    return [from_labels(layer, labels, weight) for layer in range(2)]


def run_statistics(planted: Planted, folder: Path) -> Any:
    """Blocks to statistics, in two shards, without a cluster."""
    blocks = [Block("text", tuple(row)) for row in random_ids(8, 24, seed=6).tolist()]
    columns = {"domain": [b.domain for b in blocks], "tokens": [list(b.tokens) for b in blocks]}
    schema = pa.schema([("domain", pa.string()), ("tokens", pa.list_(pa.int32()))])
    write_table(folder / "tokens.arrow", pa.table(columns, schema=schema))
    data = CorpusConfig(sources=(Source(path="unused"),))
    units = plan(
        CalibrateConfig(data=data, shards=2, batch_size=4),
        blocks=len(blocks),
        corpus=folder / "tokens.arrow",
        model=planted.moe.checkpoint.folder,
        num_experts=EXPERTS,
        folder=folder / "shards",
        inputs={},
    )
    replica = Replica()
    for unit in units:
        replica.run_one(unit)
    return layers_of(reduce(units))


def test_alignment_recovers_every_planted_permutation(planted: Planted) -> None:
    for (layer, expert), permutation in planted.permutations.items():
        seed, hidden = planted.seeds[layer], planted.moe.read_expert(layer, expert)

        assert assignment(matching_gain(seed, hidden)).equal(permutation.argsort())
        assert same(align(seed, hidden), seed)


@pytest.mark.parametrize("form", ["mapped", "expanded"])
@pytest.mark.parametrize("scope", ["global", "uniform"])
@pytest.mark.parametrize("kept", [1, 2.5, 4])
def test_statistics_grouping_and_merging_give_back_the_original_function(
    planted: Planted, tmp_path: Path, form: Any, scope: Any, kept: float
) -> None:
    export = ExportConfig(format=form)
    config = McSmoe(scope=scope, budget=Budget(experts_per_layer=kept))
    decisions = decide(config, run_statistics(planted, tmp_path), sizes(planted.moe, export))

    output = compress(planted.moe, decisions, tmp_path, export)

    total = sum(len(each.representatives) for each in decisions)
    assert total == (int(2 * kept) if scope == "global" else 2 * int(kept))
    assert deviation(planted, output) <= 1e-5


@settings(PROPERTY, max_examples=15)
@given(
    labels=st.lists(st.integers(0, EXPERTS - 1), min_size=EXPERTS, max_size=EXPERTS),
    weight=st.lists(st.floats(0, 1), min_size=EXPERTS, max_size=EXPERTS),
)
def test_merging_any_groups_with_any_weights_gives_back_the_original_function(
    planted: Planted,
    tmp_path_factory: pytest.TempPathFactory,
    labels: list[int],
    weight: list[float],
) -> None:
    first = {label: labels.index(label) for label in labels}  # the group's representative
    decisions = decisions_of([first[label] for label in labels], weight)

    folder = tmp_path_factory.mktemp("any")
    output = compress(planted.moe, decisions, folder, ExportConfig(format="expanded"))

    assert deviation(planted, output) <= 1e-5


def test_without_alignment_the_function_is_lost(planted: Planted, tmp_path: Path) -> None:
    """The negative control: a thousand times the error that alignment leaves, and more."""
    decisions = decisions_of([0, 0, 0, 3, 3, 3], [1 / EXPERTS] * EXPERTS)
    export = ExportConfig(format="expanded")

    aligned = compress(planted.moe, decisions, tmp_path / "aligned", export)
    plain = compress(planted.moe, decisions, tmp_path / "plain", export, aligned=False)

    assert deviation(planted, aligned) <= 1e-5
    assert deviation(planted, plain) > 1e-2


def test_without_alignment_the_expert_itself_is_another_function(planted: Planted) -> None:
    x = random_input(64, planted.seeds[0].up.shape[1], 0)
    members = planted.moe.read_experts(0, list(range(EXPERTS)))
    averages = {
        name: torch.stack([member.tensors()[name] for member in members]).mean(dim=0)
        for name in members[0].tensors()
    }

    expected = apply(planted.seeds[0], x)

    lost = (apply(Expert(**averages), x) - expected).norm() / expected.norm()
    assert float(lost) > 0.3
