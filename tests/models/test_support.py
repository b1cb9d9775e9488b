"""What `coalesce ls families` claims is done here, family by family; what it denies is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.blocks import find_blocks
from models.checkpoint import Checkpoint
from models.errors import CheckpointError, UnknownFamily, UnsupportedFeature
from models.families import FAMILIES, REFUSED, find_family
from models.mapped import registration
from models.moe import MoeCheckpoint
from models.skeleton import check_dense_tensors
from models.streaming.model import StreamedModel
from models.support import FEATURES, matrix, require
from stages.align.config import AlignConfig
from stages.compress.config import CompressConfig
from stages.export.config import ExportConfig
from stages.export.formats import FORMATS
from stages.export.layout import file_layouts
from stages.group.decision import LayerDecision, from_labels
from stages.merge.config import MergeConfig
from stages.merge.groups import merge_groups
from tests.planted_families import (
    EXPERTS,
    KEPT,
    STEMS,
    open_family,
    outputs,
    planted_model,
    with_experts,
)
from tests.tiny import compress, random_ids, same, same_bits

REPRESENTATIVES = range(0, EXPERTS, EXPERTS // KEPT)
TOLERANCE = 1e-5  # neurons are summed in another order; logits are about 1


class Planted:
    """A checkpoint in which experts 2i and 2i+1 are one function, and what is made of it."""

    def __init__(self, folder: Path, family: str) -> None:
        self.folder, self.model = folder, planted_model(family)
        self.model.save_pretrained(folder / "original")
        self.moe = MoeCheckpoint.open(folder / "original")
        labels = [expert // 2 * 2 for expert in range(EXPERTS)]
        weight = [float(1 + expert) for expert in range(EXPERTS)]
        self.decisions = [from_labels(layer, labels, weight) for layer in self.moe.layers]
        self.expected = outputs(self.model)
        self.written = cache(self._written)

    def _written(self, form: Any) -> tuple[Path, Any]:
        """The folder in a format, and the model that transformers opens from it."""
        folder = compress(self.moe, self.decisions, self.folder / form, ExportConfig(format=form))
        model, info = open_family(folder)
        faults = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        assert not any(info.get(fault) for fault in faults), info
        return folder, model


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Planted]:
    registration.register()
    return cache(lambda family: Planted(tmp_path_factory.mktemp(family), family))


# What is supported --------------------------------------------------------------------------------


def observe(found: Planted) -> None:
    """Layers have the same numbers in the files and in the live model; all tensors are known."""
    assert tuple(find_blocks(found.model)) == found.moe.layers
    assert check_dense_tensors(found.moe) == set()


def streaming(found: Planted) -> None:
    ids = random_ids(2, 9)
    streamed = StreamedModel(Checkpoint.open(found.moe.checkpoint.folder))
    calls = streamed.calls(input_ids=ids)
    hidden = calls[0].hidden
    for index, call in enumerate(calls):
        with streamed.layer(index) as layer, torch.inference_mode():
            hidden = call.run(layer, hidden)
    assert same_bits(streamed.logits(hidden, input_ids=ids), found.expected)


@torch.inference_mode()
def replicas(found: Planted) -> None:
    """The experts are called with ids and gates, and halves of them add up to the whole."""
    experts = next(iter(find_blocks(found.model).values())).experts
    hidden = torch.randn(EXPERTS, found.moe.hidden_size)
    ids = torch.arange(EXPERTS).reshape(-1, 1)  # token t goes to expert t alone
    gates = torch.full((EXPERTS, 1), 0.5)
    half = EXPERTS // 2
    parts = [_half(experts, start)(hidden[start : start + half], ids[:half], gates[:half])
             for start in (0, half)]  # fmt: skip
    torch.testing.assert_close(torch.cat(parts), experts(hidden, ids, gates))


def _half(experts: Any, start: int) -> Any:
    part = copy.deepcopy(experts)
    for name, tensor in list(part.named_parameters(recurse=False)):
        setattr(part, name, nn.Parameter(tensor[start : start + EXPERTS // 2].clone()))
    part.num_experts = EXPERTS // 2
    return part


def merge(found: Planted) -> None:
    """Copies with permuted neurons become the very expert that they were copied from."""
    for decision in found.decisions:
        merged, distance = merge_groups(found.moe, decision, AlignConfig(), MergeConfig())
        originals = found.moe.read_experts(decision.layer, list(REPRESENTATIVES))
        assert all(same(ours, theirs) for ours, theirs in zip(merged, originals, strict=True))
        assert distance["distance_before"] > 1 and distance["distance_after"] == 0


def native(found: Planted) -> None:
    """The model itself with some of its experts: every router row and bias, nothing else."""
    folder, model = found.written("native")
    expected, state = with_experts(found.model, REPRESENTATIVES), model.state_dict()
    assert state.keys() == expected.keys()
    assert [name for name in state if not same_bits(state[name], expected[name])] == []
    assert found.moe.family.num_experts(MoeCheckpoint.open(folder).checkpoint.config) == KEPT
    assert outputs(model).isfinite().all()


def mapped(found: Planted) -> None:
    """The function of the expanded model, with every tensor of the router as it was."""
    folder, model = found.written("mapped")
    assert (outputs(model) - outputs(found.written("expanded")[1])).abs().max() < TOLERANCE
    state, original = model.state_dict(), found.model.state_dict()
    routed = [name for name in state if ".experts." in name]
    assert {name: list(t.shape) for name, t in state.items() if name not in routed} == {
        name: list(t.shape) for name, t in original.items() if ".experts." not in name
    }
    assert all(same_bits(state[name], original[name]) for name in state if name not in routed)
    assert {state[name].shape[0] for name in routed if "expert_map" not in name} == {KEPT}
    assert json.loads((folder / "config.json").read_text())["experts_per_layer"]


def expanded(found: Planted) -> None:
    folder, model = found.written("expanded")
    assert type(model) is type(found.model)
    assert (outputs(model) - found.expected).abs().max() < TOLERANCE
    stored = found.moe.checkpoint.tensors
    written = Checkpoint.open(folder).tensors
    assert {n: t.shape for n, t in written.items()} == {n: t.shape for n, t in stored.items()}


def compress_experts(found: Planted) -> None:
    """U V + S behind the map computes what U V + S written out into every slot does."""
    section, logits = CompressConfig(rank=3, sparse=0.25), {}
    for form in ("mapped", "expanded"):
        export = ExportConfig(format=form, compress=section)
        folder = compress(found.moe, found.decisions, found.folder / f"small-{form}", export)
        model, info = open_family(folder)
        assert not any(info.get(fault) for fault in ("missing_keys", "unexpected_keys"))
        logits[form] = outputs(model)
        if form == "mapped":
            assert any(name.endswith("experts.down_proj.u") for name in model.state_dict())
    assert (logits["mapped"] - logits["expanded"]).abs().max() < TOLERANCE


DONE: dict[str, Callable[[Planted], None]] = {
    each.__name__: each for each in (observe, streaming, replicas, merge, native, mapped, expanded)
} | {"compress": compress_experts}


# What is not --------------------------------------------------------------------------------------


def not_streamed(found: Planted) -> None:
    with pytest.raises(CheckpointError):
        StreamedModel(Checkpoint.open(found.moe.checkpoint.folder))


def not_in_replicas(found: Planted) -> None:
    assert all(isinstance(b.experts, nn.ModuleDict) for b in find_blocks(found.model).values())
    with pytest.raises(UnsupportedFeature, match="dispatch masks"):
        require(found.moe.family, "replicas")


def not_mapped(found: Planted) -> None:
    with pytest.raises(UnsupportedFeature, match="capacity"):
        FORMATS["mapped"].check(found.moe, found.decisions)


def not_compressed(found: Planted) -> None:
    with pytest.raises(UnsupportedFeature, match=r"capacity|gate of their own"):
        require(found.moe.family, "compress")


REFUSES: dict[str, Callable[[Planted], None]] = {
    "streaming": not_streamed,
    "replicas": not_in_replicas,
    "mapped": not_mapped,
    "compress": not_compressed,
}
CELLS = [(f, feature, cell) for f, row in matrix().items() for feature, cell in row.items()]


@pytest.mark.parametrize(
    ("family", "feature", "cell"), CELLS, ids=[f"{f}-{feature}" for f, feature, _ in CELLS]
)
def test_the_support_matrix_is_true(
    family: str, feature: str, cell: str, planted: Callable[[str], Planted]
) -> None:
    if family in REFUSED:
        reason = cell.removeprefix("unsupported: ")
        with pytest.raises(UnknownFamily, match=reason[:20]):
            find_family({"model_type": family})
        return
    check = DONE if cell == "supported" else REFUSES
    check[feature](planted(family))


def test_every_family_and_feature_has_a_cell() -> None:
    assert set(matrix()) == {*FAMILIES, *REFUSED}
    assert set(FAMILIES) == set(STEMS)
    assert all(tuple(row) == FEATURES for row in matrix().values())
    assert len(FAMILIES) == 21


# Router tensors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "ernie4_5_moe"])
def test_the_mean_router_averages_rows_and_biases(
    family: str, planted: Callable[[str], Planted]
) -> None:
    found = planted(family)
    layer, decision = found.moe.layers[-1], found.decisions[-1]
    routers = found.moe.checkpoint.read(found.moe.router_names(layer))
    assert len(routers) == (1 if family == "mixtral" else 2)

    cut = FORMATS["native"].layer_tensors(
        found.moe,
        decision,
        found.moe.read_experts(layer, list(REPRESENTATIVES)),
        routers,
        ExportConfig(router="mean"),
    )

    for name, tensor in routers.items():
        assert cut[name].shape == _expected_mean(tensor, decision).shape
        torch.testing.assert_close(cut[name], _expected_mean(tensor, decision))


def _expected_mean(tensor: Tensor, decision: LayerDecision) -> Tensor:
    axis = list(tensor.shape).index(EXPERTS)
    means = []
    for first in REPRESENTATIVES:
        a, b = (tensor.select(axis, expert) for expert in (first, first + 1))
        w, v = decision.weight[first], decision.weight[first + 1]
        means.append((a * w + b * v) / (w + v))
    return torch.stack(means, dim=axis)


@pytest.mark.parametrize("form", ["native", "mapped", "expanded"])
@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss", "deepseek_v3", "jamba"])
def test_bytes_are_predicted_to_the_byte(
    family: str, form: Any, planted: Callable[[str], Planted]
) -> None:
    found = planted(family)
    layouts = file_layouts(found.moe, found.decisions, ExportConfig(format=form))
    found.written(form)

    written = sorted((found.folder / form / "layers").glob("*.safetensors"))

    assert [each.stat().st_size for each in written] == [each.file_bytes for each in layouts]


def test_only_the_asked_for_expert_of_a_fused_tensor_is_read(
    planted: Callable[[str], Planted], monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = planted("granitemoe").moe
    asked: list[tuple[str, int | None]] = []
    read = Checkpoint.read_pieces

    def recorded(self: Checkpoint, pieces: Any) -> Any:
        wanted = list(pieces)
        asked.extend(wanted)
        return read(self, wanted)

    monkeypatch.setattr(Checkpoint, "read_pieces", recorded)
    moe.read_expert(1, 5)

    assert {index for _, index in asked} == {5}
