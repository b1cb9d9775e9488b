"""Layers aligned by what their experts' neurons do on the layer's own sample."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.atomic import file_digest
from models.expert import Expert
from models.moe import MoeCheckpoint
from stages.align.activations import activation_gain
from stages.align.config import AlignConfig
from stages.align.sample import evenly, seen
from stages.errors import StatisticsError
from stages.export.config import ExportConfig
from stages.export.layout import file_layouts
from stages.group.decision import from_labels
from stages.inputs.read import LayerInputs
from stages.merge.config import MergeConfig
from stages.transform.stage import TransformUnit, plan, run_one
from stages.unit import execute
from tests.samples import store
from tests.tiny import (
    EXPERTS,
    HIDDEN,
    PROPERTY,
    TOP_K,
    WIDTH,
    apply,
    random_expert,
    random_input,
    random_permutation,
    save_tiny,
)

TOKENS = 300
ONE_GROUP = [2] * EXPERTS
CRITERIA: list[Any] = ["activations", "both"]


def silu_gated(gate: Tensor | None, up: Tensor) -> Tensor:
    assert gate is not None
    return F.silu(gate) * up


def sample(layer: int = 0, domains: int = 1) -> LayerInputs:
    """Random inputs; routing plays no part here."""
    return LayerInputs(
        layer=layer,
        hidden=random_input(TOKENS, HIDDEN, layer),
        ids=torch.zeros(TOKENS, TOP_K, dtype=torch.int64),
        gates=torch.ones(TOKENS, TOP_K),
        logits=torch.zeros(TOKENS, EXPERTS),
        block=torch.arange(TOKENS),
        position=torch.zeros(TOKENS, dtype=torch.int32),
        domain=(torch.arange(TOKENS) % domains).int(),
        domains=tuple("abcdef"[:domains]),
        seed=0,
        inputs={},
    )


class Planted:
    """Every expert of a layer is one network: neurons shuffled, weights perturbed by 2 %."""

    def __init__(self, folder: Path) -> None:
        save_tiny(folder, "mixtral")
        tensors = load_file(folder / "model.safetensors")
        family = MoeCheckpoint.open(folder).family
        self.seeds = [random_expert(WIDTH, HIDDEN, layer) for layer in range(2)]
        for layer, seed in enumerate(self.seeds):
            for expert in range(EXPERTS):
                number = 10 * layer + expert
                hidden = _perturbed(seed.permuted(random_permutation(WIDTH, number)), number)
                for part, name in family.expert_tensor_names(layer, expert).items():
                    tensors[name] = hidden.tensors()[part].contiguous()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        self.moe = MoeCheckpoint.open(folder)
        self.inputs = {i: store(sample(i), folder / f"inputs-{i}") for i in range(2)}


def _perturbed(expert: Expert, seed: int) -> Expert:
    noise = random_expert(expert.neurons, HIDDEN, 100 + seed).tensors()
    named = expert.tensors()
    return Expert(**{name: named[name] + 0.02 * noise[name] for name in named})


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return Planted(tmp_path_factory.mktemp("planted"))


def units(
    planted: Planted, folder: Path, align: AlignConfig, labels: list[int] = ONE_GROUP, **more: Any
) -> list[TransformUnit]:
    """The layers, with K = 1 in the mapped format."""
    decisions = [from_labels(layer, labels, [1.0] * EXPERTS) for layer in range(2)]
    export = ExportConfig(format="mapped")
    options: dict[str, Any] = {"inputs": planted.inputs} | more
    return plan(
        planted.moe,
        decisions,
        file_layouts(planted.moe, decisions, export),
        align=align,
        merge=MergeConfig(),
        export=export,
        folder=folder,
        model="fingerprint",
        **options,
    )[:2]


def merged_expert(unit: TransformUnit) -> Expert:
    """The one expert that is left, from the file."""
    tensors = load_file(unit.output)
    gate_up = next(t for name, t in tensors.items() if name.endswith("gate_up_proj"))[0]
    down = next(t for name, t in tensors.items() if name.endswith("down_proj"))[0]
    return Expert(up=gate_up[WIDTH:], gate=gate_up[:WIDTH], down=down)


def deviation(planted: Planted, unit: TransformUnit) -> float:
    """Relative distance of the merged expert's outputs from the planted network's."""
    assert unit.layer is not None
    x = random_input(200, HIDDEN, 77)
    expected = apply(planted.seeds[unit.layer], x)
    return float((apply(merged_expert(unit), x) - expected).norm() / expected.norm())


@pytest.mark.parametrize("by", CRITERIA)
def test_a_planted_network_is_found_again_by_what_its_neurons_do(
    planted: Planted, tmp_path: Path, by: Any
) -> None:
    for unit in units(planted, tmp_path / "aligned", AlignConfig(by=by)):
        run_one(unit)
        assert deviation(planted, unit) < 0.05
    for unit in units(planted, tmp_path / "plain", AlignConfig(enabled=False)):
        run_one(unit)
        assert deviation(planted, unit) > 0.5


def test_few_tokens_are_enough_for_a_planted_network(planted: Planted, tmp_path: Path) -> None:
    for unit in units(planted, tmp_path, AlignConfig(by="activations", tokens=40)):
        run_one(unit)
        assert deviation(planted, unit) < 0.05


def test_any_order_and_a_damaged_file_give_the_same_bytes(planted: Planted, tmp_path: Path) -> None:
    align = AlignConfig(by="activations")
    forward, backward = (units(planted, tmp_path / name, align) for name in "ab")
    for unit in [*forward, *reversed(backward)]:
        execute(unit, run_one)
    backward[0].output.write_bytes(b"cut")

    again = execute(backward[0], run_one)

    assert not again.resumed
    for one, other in zip(forward, backward, strict=True):
        assert file_digest(one.output) == file_digest(other.output)


def test_the_fingerprint_follows_the_sample_only_where_it_is_read(
    planted: Planted, tmp_path: Path
) -> None:
    other = {layer: (path, "another") for layer, (path, _) in planted.inputs.items()}

    def prints(by: Any, labels: list[int] = ONE_GROUP, **more: Any) -> object:
        return units(planted, tmp_path, AlignConfig(by=by), labels, **more)[0].fingerprint

    alone = list(range(EXPERTS))
    assert prints("activations") != prints("activations", inputs=other)
    assert prints("activations") != prints("activations", task={"a": 1.0})
    assert prints("activations") != prints("both")
    assert prints("weights") == prints("weights", inputs=other)
    assert prints("activations", alone) == prints("activations", alone, inputs=other)


def test_groups_that_are_merged_without_their_sample_are_refused(
    planted: Planted, tmp_path: Path
) -> None:
    unit = units(planted, tmp_path, AlignConfig(by="both"), inputs={})[0]

    with pytest.raises(StatisticsError, match=r"align\.by=both needs"):
        run_one(unit)


def test_singles_need_no_sample(planted: Planted, tmp_path: Path) -> None:
    labels = list(range(EXPERTS))

    unit = units(planted, tmp_path, AlignConfig(by="both"), labels, inputs={})[0]

    assert run_one(unit)["experts"] == EXPERTS


def test_a_task_without_a_sampled_token_is_refused() -> None:
    with pytest.raises(StatisticsError, match="layer 0 has no sampled token"):
        seen(sample(), silu_gated, 10, {"z": 1.0})


@PROPERTY
@given(seed=st.integers(0, 99), weight=st.integers(1, 4))
def test_a_domain_of_weight_w_counts_like_w_copies_of_its_tokens(seed: int, weight: int) -> None:
    pair = [random_expert(6, HIDDEN, seed), random_expert(6, HIDDEN, seed + 1)]
    inputs = sample(domains=2)
    order = torch.cat([inputs.rows_of("a").repeat(weight), inputs.rows_of("b")])
    copied = replace(inputs, hidden=inputs.hidden[order], domain=inputs.domain[order])

    weighted = seen(inputs, silu_gated, TOKENS, {"a": float(weight), "b": 1.0})
    plain = seen(copied, silu_gated, 10 * TOKENS)

    torch.testing.assert_close(
        activation_gain(*map(weighted, pair)), activation_gain(*map(plain, pair))
    )


@PROPERTY
@given(count=st.integers(1, 500), wanted=st.integers(1, 600))
def test_tokens_are_spread_evenly(count: int, wanted: int) -> None:
    found = evenly(count, wanted)

    assert len(found) == min(count, wanted)
    assert found[0] == 0 and found[-1] < count
    steps = found.diff()
    assert len(steps) == 0 or (steps.min() >= 1 and steps.max() - steps.min() <= 1)
