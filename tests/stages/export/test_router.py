"""Rows of a native router that are fitted to their groups or drawn anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.atomic import file_digest
from models.errors import CheckpointError
from models.moe import MoeCheckpoint
from stages.errors import StatisticsError
from stages.export.config import ExportConfig
from stages.export.router import check_router, fit_rows, group_logits, settled_routers
from stages.group.decision import LayerDecision, from_labels
from stages.inputs.read import LayerInputs
from stages.transform.stage import run_one
from tests.samples import store
from tests.tiny import (
    EXPERTS,
    HIDDEN,
    PROPERTY,
    TOP_K,
    compress,
    logits_of,
    open_model,
    random_ids,
    random_input,
    same_bits,
    save_tiny,
    transform_units,
)
from tests.tiny_families import save_family

TOKENS = 400
# {0, 3} around 0, {1, 2} around 2, {4, 5} around 4.
LABELS = [0, 2, 2, 0, 4, 4]
FIT = ExportConfig(router="least_squares")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> MoeCheckpoint:
    return MoeCheckpoint.open(save_tiny(tmp_path_factory.mktemp("model"), "mixtral"))


def sample(moe: MoeCheckpoint, layer: int, constant: float = 0.0, domains: int = 1) -> LayerInputs:
    """What a layer's router says of random inputs; `constant`: every token's first component."""
    hidden = random_input(TOKENS, HIDDEN, layer)
    if constant:
        hidden[:, 0] = constant
    logits = hidden @ moe.read_router(layer).float().T
    gates, ids = logits.softmax(dim=-1).topk(TOP_K)
    return LayerInputs(
        layer=layer,
        hidden=hidden,
        ids=ids,
        gates=gates / gates.sum(dim=-1, keepdim=True),
        logits=logits,
        block=torch.arange(TOKENS) // 10,
        position=(torch.arange(TOKENS) % 10).int(),
        domain=(torch.arange(TOKENS) % domains).int(),
        domains=tuple("ab"[:domains]),
        seed=0,
        inputs={},
    )


def decisions_of(moe: MoeCheckpoint, labels: list[int]) -> list[LayerDecision]:
    return [from_labels(layer, labels, [1.0] * EXPERTS) for layer in moe.layers]


def written(moe: MoeCheckpoint, folder: Path, export: ExportConfig, **more: Any) -> MoeCheckpoint:
    found = compress(moe, decisions_of(moe, LABELS), folder, export, **more)
    return MoeCheckpoint.open(found)


def routers(moe: MoeCheckpoint, layer: int = 0) -> dict[str, Tensor]:
    return moe.checkpoint.read(moe.router_names(layer))


def test_planted_groups_of_equal_rows_get_their_common_row_and_the_log_of_their_number(
    tmp_path: Path,
) -> None:
    """Where every token has a component of 1, log 2 more is one more entry of the row."""
    folder = save_tiny(tmp_path / "model", "mixtral")
    tensors = load_file(folder / "model.safetensors")
    names = [name for name in tensors if name.endswith("block_sparse_moe.gate.weight")]
    for name in names:
        tensors[name] = tensors[name][LABELS].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    moe = MoeCheckpoint.open(folder)
    decision, inputs = decisions_of(moe, LABELS)[0], sample(moe, 0, constant=1.0)

    found, facts = settled_routers(FIT, moe, decision, routers(moe), inputs)

    (rows,) = (tensor[[0, 2, 4]] for tensor in found.values())
    expected = moe.read_router(0)[[0, 2, 4]].clone()
    expected[:, 0] += torch.tensor(2.0).log()
    torch.testing.assert_close(rows, expected, atol=5e-3, rtol=0)
    assert facts["router"]["error_after"] < 1e-4 < 0.01 < facts["router"]["error_before"]


def test_fitted_rows_choose_groups_more_as_the_original_does(moe: MoeCheckpoint) -> None:
    decision, inputs = decisions_of(moe, LABELS)[0], sample(moe, 0, constant=1.0)
    masses = torch.stack(
        [inputs.logits.softmax(dim=-1)[:, list(ids)].sum(dim=1) for ids in decision.members], dim=1
    )

    def divergence(config: ExportConfig) -> float:
        found, _ = settled_routers(config, moe, decision, routers(moe), inputs)
        rows = next(iter(found.values()))[list(decision.representatives)]
        shares = (inputs.hidden @ rows.T).log_softmax(dim=-1)
        return float((masses * (masses.log() - shares)).sum(dim=1).mean())

    assert divergence(FIT) < 0.7 * divergence(ExportConfig())


@PROPERTY
@given(seed=st.integers(0, 999), groups=st.integers(1, 4), tokens=st.integers(1, 60))
def test_a_fit_is_never_worse_on_the_tokens_that_judge(seed: int, groups: int, tokens: int) -> None:
    x, targets = random_input(tokens, 8, seed), random_input(tokens, groups, seed + 1)
    prior, judges = random_input(groups, 8, seed + 2), torch.arange(tokens) % 5 == 0

    found = fit_rows(x, targets, prior, judges)

    assert found.rows.isfinite().all()
    assert found.error_after <= found.error_before
    assert (found.strength is None) == found.rows.equal(prior.double())


@pytest.mark.parametrize("tokens", [5, 200])
def test_inputs_that_repeat_each_other_give_finite_rows(tokens: int) -> None:
    """A singular Gram: fewer tokens than components, and components that are equal or zero."""
    x = random_input(tokens, 8, 0)
    x[:, 4:] = x[:, :4]
    x[:, 0] = 0
    targets = x[:, 1:3] * 2

    found = fit_rows(x, targets, torch.zeros(2, 8), torch.arange(tokens) % 5 == 0)

    assert found.rows.isfinite().all()
    assert found.error_after <= found.error_before
    assert tokens == 5 or found.error_after < 1e-6


@PROPERTY
@given(seed=st.integers(0, 999), shift=st.floats(-50, 50))
def test_group_logits_have_the_groups_share_of_the_softmax(seed: int, shift: float) -> None:
    logits = 3 * random_input(20, EXPERTS, seed) + shift
    members = [[0, 3], [1, 2], [4], [5]]

    found = group_logits(logits, members).softmax(dim=1)

    shares = logits.double().softmax(dim=1)
    expected = torch.stack([shares[:, ids].sum(dim=1) for ids in members], dim=1)
    torch.testing.assert_close(found, expected)


def test_rows_of_groups_of_one_are_kept_bit_for_bit(moe: MoeCheckpoint) -> None:
    decision = from_labels(0, [0, 1, 2, 2, 4, 5], [1.0] * EXPERTS)

    found, _ = settled_routers(FIT, moe, decision, routers(moe), sample(moe, 0))

    (rows,) = found.values()
    alone = [0, 1, 4, 5]
    assert rows[alone].equal(moe.read_router(0)[alone])
    assert not rows[2].equal(moe.read_router(0)[2])


def test_nothing_is_read_or_moved_where_nothing_is_merged(moe: MoeCheckpoint) -> None:
    decision = from_labels(0, [0, None, 2, 3, None, 5], [1.0] * EXPERTS)

    found, facts = settled_routers(FIT, moe, decision, routers(moe), None)

    assert next(iter(found.values())).equal(moe.read_router(0))
    assert facts == {}


def test_a_task_fits_the_tokens_of_its_domains(moe: MoeCheckpoint) -> None:
    decision, both = decisions_of(moe, LABELS)[0], sample(moe, 0, domains=2)
    one = both.only(both.domain == 0)

    tasked, _ = settled_routers(FIT, moe, decision, routers(moe), both, {"a": 4.0})
    alone, _ = settled_routers(FIT, moe, decision, routers(moe), one)
    every, _ = settled_routers(FIT, moe, decision, routers(moe), both)

    for name, tensor in tasked.items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-4, atol=1e-5)
        assert not tensor.allclose(every[name], rtol=1e-4, atol=1e-5)


def test_a_written_layer_has_the_fitted_rows_and_follows_its_sample(
    moe: MoeCheckpoint, tmp_path: Path
) -> None:
    inputs = {layer: store(sample(moe, layer), tmp_path / f"in-{layer}") for layer in moe.layers}
    decision = decisions_of(moe, LABELS)[1]
    expected, _ = settled_routers(FIT, moe, decision, routers(moe, 1), sample(moe, 1))

    output = written(moe, tmp_path / "fit", FIT, inputs=inputs)

    (rows,) = (tensor[[0, 2, 4]] for tensor in expected.values())
    assert output.read_router(1).equal(rows)
    units = [
        transform_units(moe, decisions_of(moe, LABELS), tmp_path, FIT, inputs=each)[0]
        for each in (inputs, inputs | {0: (inputs[0][0], "another")})
    ]
    assert units[0].fingerprint != units[1].fingerprint
    assert run_one(units[0])["router"]["error_after"] < 1
    assert file_digest(units[0].output) == file_digest(
        tmp_path / "fit" / "layers" / "layer-00000.safetensors"
    )


def test_a_router_that_is_no_linear_map_of_its_inputs_is_refused(moe: MoeCheckpoint) -> None:
    inputs = sample(moe, 0)
    bent = replace(inputs, logits=inputs.logits.tanh())

    with pytest.raises(StatisticsError, match="layer 0 is not its rows times"):
        settled_routers(FIT, moe, decisions_of(moe, LABELS)[0], routers(moe), bent)


def test_a_fit_without_a_sample_is_refused(moe: MoeCheckpoint) -> None:
    with pytest.raises(StatisticsError, match="router of layer 0 is to be fitted"):
        settled_routers(FIT, moe, decisions_of(moe, LABELS)[0], routers(moe), None)


def test_routers_with_biases_are_refused_by_family(tmp_path: Path) -> None:
    biased = MoeCheckpoint.open(save_family(tmp_path / "model", "DeepseekV3"))

    with pytest.raises(CheckpointError, match=r"deepseek_v3 has gate\.e_score_correction_bias"):
        check_router(FIT, biased)
    check_router(ExportConfig(router="mean"), biased)


@pytest.mark.parametrize("form", ["mapped", "expanded"])
def test_formats_that_keep_the_router_refuse_other_rows(form: Any) -> None:
    with pytest.raises(ValidationError, match=f"needs format=native: {form} keeps the router"):
        ExportConfig(format=form, router="mean")


def test_drawn_rows_follow_seed_and_layer_and_nothing_else_changes(
    moe: MoeCheckpoint, tmp_path: Path
) -> None:
    plain = written(moe, tmp_path / "plain", ExportConfig())
    drawn, repeated, other = (
        written(moe, tmp_path / name, ExportConfig(router="reinit", router_seed=seed))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    before, after = (
        load_file(each.checkpoint.folder / "model.safetensors") for each in (plain, drawn)
    )
    changed = {name for name, tensor in before.items() if not same_bits(after[name], tensor)}

    assert before.keys() == after.keys()
    assert changed == {moe.family.router_name(layer) for layer in moe.layers}
    assert drawn.read_router(0).shape == (3, HIDDEN)
    assert drawn.read_router(0).equal(repeated.read_router(0))
    assert not drawn.read_router(0).equal(drawn.read_router(1))
    assert not drawn.read_router(0).equal(other.read_router(0))
    spread = moe.checkpoint.config["initializer_range"]
    assert float(drawn.read_router(0).std()) == pytest.approx(spread, rel=0.2)
    assert logits_of(open_model(drawn.checkpoint.folder), random_ids(2, 5)).isfinite().all()


def test_drawn_rows_have_no_bias(tmp_path: Path) -> None:
    moe = MoeCheckpoint.open(save_family(tmp_path / "model", "GptOss"))
    decision = from_labels(moe.layers[0], [0] * moe.num_experts, [1.0] * moe.num_experts)
    before = {name: tensor + 1 for name, tensor in routers(moe).items()}

    found, _ = settled_routers(ExportConfig(router="reinit"), moe, decision, before, None)

    (bias,) = (tensor for name, tensor in found.items() if name.endswith("bias"))
    assert bias[0] == 0
