"""Replicas of real DeepSpeed process groups compute what one process computes, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.expert_parallel import ExpertGroup
from stages.calibrate.stage import Replica
from stages.calibrate.statistics import domain_sums, read_statistics
from tests.cluster.counting import Counting
from tests.cluster.ranks import CASES, case_folder, run_ranks
from tests.cluster.shards import LENGTHS, SHARDS, save_dealt, units_of, write_corpus
from tests.tiny import FAMILIES, TOP_K, logits_of, open_model, random_ids
from tests.tiny_families import FAMILIES as ALL_FAMILIES
from tests.tiny_families import save_family

SIZES = [pytest.param(size, marks=pytest.mark.slow) for size in ((2, "diagonal"), (4, "shards"))]


@pytest.fixture(scope="module", params=SIZES, ids=["two ranks", "four ranks"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Number of ranks, and the folder with the shards that they wrote for every family."""
    folder = tmp_path_factory.mktemp("replica")
    write_corpus(folder)
    for family in FAMILIES:
        save_dealt(folder / f"model-{family}", family)
    size, function = request.param
    for each in run_ranks(function, folder, size):
        assert each.returncode == 0, each.stdout
    return size, folder


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_shards_are_those_of_one_process_byte_for_byte(
    ranks: tuple[int, Path], family: str
) -> None:
    """In fp32 and bf16, by both engines; the reference is always resident."""
    (size, folder), model = ranks, ranks[1] / f"model-{family}"
    for dtype, engine in CASES if size == 4 else CASES[:: len(CASES) - 1]:
        output = case_folder(dtype, engine)
        alone = units_of(model, folder, output=f"alone-{output}", dtype=dtype)
        results = [Replica().run_one(unit) | {"engine": engine} for unit in alone]

        found = units_of(model, folder, output=output, dtype=dtype, engine=engine)

        assert [each.fingerprint for each in found] == [each.fingerprint for each in alone]
        for ours, theirs in zip(found, alone, strict=True):
            assert ours.output.read_bytes() == theirs.output.read_bytes()
        assert [each.result for each in first_run(ranks, family, dtype, engine)] == results


def first_run(ranks: tuple[int, Path], family: str, dtype: str, engine: str) -> list[Any]:
    """Outcomes of the shards in their order."""
    return _runs(ranks, family, dtype, engine)[0]


def _runs(ranks: tuple[int, Path], family: str, dtype: str, engine: str) -> list[list[Any]]:
    size, folder = ranks
    name = f"model-{family}-{case_folder(dtype, engine)}"
    files = (folder / f"{name}-{rank}.pt" for rank in range(size))
    by_rank = [torch.load(file, weights_only=False) for file in files]
    runs = []
    for attempt in range(2):
        steps = zip(*(found[attempt] for found in by_rank), strict=True)
        given = [done for bundle in steps for done in bundle]
        assert given[SHARDS:] == [None] * (len(given) - SHARDS)
        runs.append(given[:SHARDS])
    return runs


def test_finished_shards_are_not_run_again(ranks: tuple[int, Path]) -> None:
    first, second = _runs(ranks, "mixtral", "auto", "resident")

    assert not any(done.resumed for done in first)
    assert all(done.resumed for done in second)


def test_idle_steps_count_nowhere(ranks: tuple[int, Path]) -> None:
    for family in FAMILIES:
        folder, seen = ranks[1], dict.fromkeys(LENGTHS, 0)
        for unit in units_of(folder / f"model-{family}", folder, output="auto-resident"):
            for (domain, layer), sums in domain_sums(read_statistics(unit.output)).items():
                assert sums["selected"].sum() == sums["tokens"][0] * TOP_K
                seen[domain] += sums["tokens"][0] if layer == 0 else 0
        assert seen == {domain: sum(lengths) for domain, lengths in LENGTHS.items()}


# All families -------------------------------------------------------------------------------------


def slow_unless_core(family: str) -> Any:
    core = family in ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe")
    return family if core else pytest.param(family, marks=pytest.mark.slow)


class Pairs:
    """What two ranks found for a family; all families of a session in one pair of processes."""

    def __init__(self, folder: Path, families: list[str]) -> None:
        self.folder = folder
        for family in families:
            save_family(folder / f"model-{family}", family)
        for each in run_ranks("logits", folder):
            assert each.returncode == 0, each.stdout

    def of(self, family: str) -> list[dict[str, Any]]:
        files = (self.folder / f"model-{family}-logits-{rank}.pt" for rank in range(2))
        return [torch.load(file, weights_only=False) for file in files]


@pytest.fixture(scope="module")
def pairs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    wanted = {
        item.callspec.params["family"]
        for item in request.session.items
        if item.module is request.module and "pairs" in getattr(item, "fixturenames", ())
    }
    return Pairs(tmp_path_factory.mktemp("pairs"), sorted(wanted))


@pytest.mark.parametrize("family", map(slow_unless_core, ALL_FAMILIES))
def test_logits_and_counts_are_those_of_one_process(pairs: Pairs, family: str) -> None:
    whole = open_model(pairs.folder / f"model-{family}")
    for rank, found in enumerate(pairs.of(family)):
        ids = random_ids(1 + rank, 7 + 4 * rank, rank)
        with Counting(whole) as counts:
            expected = logits_of(whole, ids)
        assert float((found["logits"] - expected).abs().max()) <= 1e-6
        assert found["counts"].keys() == counts.keys() and counts
        assert all(found["counts"][layer].equal(count) for layer, count in counts.items())
        assert set(found["held"].values()) == {2}  # of 4 experts, biases included


@pytest.mark.parametrize("family", map(slow_unless_core, ALL_FAMILIES))
def test_a_block_that_answers_otherwise_is_refused_with_numbers(pairs: Pairs, family: str) -> None:
    for found in pairs.of(family):
        assert "differs between an expert-parallel replica and one process by" in found["refused"]
        assert "is allowed" in found["refused"]


# The group ----------------------------------------------------------------------------------------


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


def test_experts_are_owned_once_and_in_order() -> None:
    owned = [ExpertGroup(rank, 3, None).owned(6) for rank in range(3)]
    assert [list(each) for each in owned] == [[0, 1], [2, 3], [4, 5]]
