"""Replicas of real DeepSpeed process groups compute what one process computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.expert_parallel import ExpertGroup
from stages.calibrate.observer import INTEGERS
from stages.calibrate.parallel import dealt
from stages.calibrate.stage import Replica
from stages.calibrate.statistics import domain_sums, read_statistics
from stages.model import load_model
from stages.unit import Done
from tests.cluster.ranks import run_ranks
from tests.cluster.shards import BATCHES, LENGTHS, unit_of, write_corpus
from tests.tiny import (
    EXPERTS,
    FAMILIES,
    TOP_K,
    logits_of,
    open_model,
    random_ids,
    same_bits,
    save_tiny,
)


@pytest.fixture(
    scope="module",
    params=[2, pytest.param(3, marks=pytest.mark.slow)],
    ids=["two ranks", "three ranks"],
)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Number of ranks, and the folder with what they found for every family."""
    folder = tmp_path_factory.mktemp("replica")
    write_corpus(folder)
    for family in FAMILIES:
        save_tiny(folder / f"model-{family}", family)
    for each in run_ranks("families", folder, request.param):
        assert each.returncode == 0, each.stdout
    return request.param, folder


def found_by(ranks: tuple[int, Path], family: str) -> list[dict[str, Any]]:
    size, folder = ranks
    files = (folder / f"model-{family}-{rank}.pt" for rank in range(size))
    return [torch.load(file, weights_only=False) for file in files]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_one_process(ranks: tuple[int, Path], family: str) -> None:
    whole = open_model(ranks[1] / f"model-{family}")
    for rank, found in enumerate(found_by(ranks, family)):
        expected = logits_of(whole, random_ids(1 + rank, 7 + 4 * rank, rank))
        assert float((found["logits"] - expected).abs().max()) <= 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_logits_are_those_of_one_process(ranks: tuple[int, Path], family: str) -> None:
    whole = load_model(ranks[1] / f"model-{family}", "bfloat16")
    for rank, found in enumerate(found_by(ranks, family)):
        expected = logits_of(whole, random_ids(2, 9, rank))
        assert found["half"].dtype == torch.bfloat16
        assert same_bits(found["half"], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_rank_holds_its_share_of_the_experts(ranks: tuple[int, Path], family: str) -> None:
    assert {found["experts"] for found in found_by(ranks, family)} == {EXPERTS // ranks[0]}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shard_is_the_one_of_a_single_process(ranks: tuple[int, Path], family: str) -> None:
    """Also with a number of batches that the ranks cannot share evenly."""
    assert BATCHES % ranks[0]
    folder, model = ranks[1], ranks[1] / f"model-{family}"
    alone = unit_of(model, folder, "alone")
    result = Replica().run_one(alone)

    found, expected = (
        domain_sums(read_statistics(unit.output)) for unit in (unit_of(model, folder), alone)
    )

    assert list(found) == list(expected)
    for key, sums in expected.items():
        for name, values in sums.items():
            if name in INTEGERS:
                assert np.array_equal(found[key][name], values), name
            else:
                np.testing.assert_allclose(found[key][name], values, rtol=1e-6, atol=1e-6)
    assert found_by(ranks, family)[0]["first"].result == result


@pytest.mark.parametrize("family", FAMILIES)
def test_dummy_batches_count_nowhere(ranks: tuple[int, Path], family: str) -> None:
    table = domain_sums(read_statistics(unit_of(ranks[1] / f"model-{family}", ranks[1]).output))
    for (domain, _), sums in table.items():
        assert sums["tokens"].tolist() == [sum(LENGTHS[domain])] * EXPERTS
        assert sums["selected"].sum() == sum(LENGTHS[domain]) * TOP_K
    assert {domain for domain, _ in table} == set(LENGTHS)


def test_only_rank_0_reports_and_a_finished_shard_is_not_run_again(
    ranks: tuple[int, Path],
) -> None:
    first, *others = found_by(ranks, "mixtral")
    assert isinstance(first["first"], Done)
    assert not first["first"].resumed
    assert first["second"].resumed
    assert all(other["first"] is None and other["second"] is None for other in others)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_that_answers_otherwise_is_refused_with_numbers(
    ranks: tuple[int, Path], family: str
) -> None:
    for found in found_by(ranks, family):
        assert (
            "layer 0 differs between an expert-parallel replica and one process by"
            in (found["refused"])
        )
        assert "is allowed" in found["refused"]


def test_a_lost_rank_is_noticed_by_the_others(tmp_path: Path) -> None:
    survivor, victim = run_ranks("lose_a_peer", tmp_path)
    assert (survivor.returncode, victim.returncode) == (0, -9), survivor.stdout
    assert "a rank does not answer" in (tmp_path / "seen").read_text()


def test_no_compiler_is_needed(tmp_path: Path) -> None:
    """With the shm op on, an empty search path ends the start: neither ninja nor g++."""
    empty = tmp_path / "empty"
    empty.mkdir()
    for each in run_ranks("join_only", tmp_path, path=str(empty)):
        assert each.returncode == 0, each.stdout
        assert "deepspeed_shm_comm" not in each.stdout


@pytest.mark.parametrize("items", [0, 1, 5, 6, 7])
def test_batches_are_dealt_once_in_equal_numbers_of_steps(items: int) -> None:
    hands = [list(dealt(range(items), ExpertGroup(rank, 3, None))) for rank in range(3)]
    assert len({len(hand) for hand in hands}) == 1
    assert sorted(i for hand in hands for i in hand if i is not None) == list(range(items))
    assert all(None not in hand[:-1] for hand in hands)


def test_experts_are_owned_once_and_in_order() -> None:
    owned = [ExpertGroup(rank, 3, None).owned(6) for rank in range(3)]
    assert [list(each) for each in owned] == [[0, 1], [2, 3], [4, 5]]
