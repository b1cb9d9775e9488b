"""DeepSpeed's AutoEP behind the same doors: right where it is right, refused where it is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.calibrate.observer import INTEGERS
from stages.calibrate.stage import Replica
from stages.calibrate.statistics import domain_sums, read_statistics
from tests.cluster.ranks import run_ranks
from tests.cluster.shards import units_of, write_corpus
from tests.tiny import logits_of, open_model, random_ids
from tests.tiny_families import save_family

RIGHT = ("Mixtral", "DeepseekV3")
WRONG = ("GptOss", "Phimoe")
UNKNOWN = "Jamba"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("autoep")
    write_corpus(root)
    for family in (*RIGHT, *WRONG, UNKNOWN):
        save_family(root / f"model-{family}", family)
    for each in run_ranks("autoep", root):
        assert each.returncode == 0, each.stdout
    return root


def found_by(folder: Path, family: str) -> list[dict[str, Any]]:
    files = (folder / f"model-{family}-autoep-{rank}.pt" for rank in range(2))
    return [torch.load(file, weights_only=False) for file in files]


@pytest.mark.parametrize("family", RIGHT)
def test_logits_are_those_of_one_process(folder: Path, family: str) -> None:
    whole = open_model(folder / f"model-{family}")
    for rank, found in enumerate(found_by(folder, family)):
        expected = logits_of(whole, random_ids(1 + rank, 7 + 4 * rank, rank))
        difference = float((found["logits"] - expected).abs().max())
        assert difference <= 1e-6 * float(expected.abs().max())


@pytest.mark.parametrize("family", RIGHT)
def test_counts_are_equal_and_sums_agree_to_rounding(folder: Path, family: str) -> None:
    model = folder / f"model-{family}"
    ours, theirs = (
        [replace(unit, num_experts=4) for unit in units_of(model, folder, shards=2, output=name)]
        for name in ("autoep", "alone")
    )
    for unit, reference in zip(ours, theirs, strict=True):
        Replica().run_one(reference)
        found, expected = (domain_sums(read_statistics(u.output)) for u in (unit, reference))
        assert list(found) == list(expected)
        for key, sums in expected.items():
            for name, values in sums.items():
                if name in INTEGERS:
                    assert np.array_equal(found[key][name], values), name
                else:
                    np.testing.assert_allclose(found[key][name], values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", WRONG)
def test_what_it_gets_silently_wrong_is_refused_with_numbers(folder: Path, family: str) -> None:
    for found in found_by(folder, family):
        assert "differs between an expert-parallel replica and one process by" in found["refused"]


def test_a_family_that_it_does_not_know_is_refused_in_its_words(folder: Path) -> None:
    for found in found_by(folder, UNKNOWN):
        assert found["refused"].startswith("AutoEP refuses jamba: ")
