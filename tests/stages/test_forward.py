"""Logits by layers are those of the whole model, to the last bit, for every form of output."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.classes import prepare_classes
from models.mapped.registration import register
from models.streaming.model import open_streamed
from stages.forward import Logits, resident, streamed
from stages.model import load_model
from tests.stages.export.test_gate_layerwise import MAPPED, unit_of

BATCHES = [[[1, 2, 3, 4, 5], [6, 7, 8]], [[9, 10, 11, 12]]]  # padding in the first one


def same(one: list[Logits], other: list[Logits]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(a.equal(b) for left, right in pairs for a, b in zip(left, right, strict=True))


def both(folder: Path, output: Path) -> tuple[list[Logits], list[Logits]]:
    whole = list(resident(load_model(folder, "auto"), BATCHES))
    return whole, list(streamed(open_streamed(folder, "auto"), BATCHES, output))


@pytest.mark.parametrize("family", MAPPED)
def test_a_mapped_output_gives_the_same_logits(family: str, tmp_path: Path) -> None:
    from stages.export.stage import assemble

    unit = unit_of(tmp_path, family, "mapped")
    (folder := tmp_path / "assembled").mkdir()
    assemble(unit, folder)
    prepare_classes(unit.moe.checkpoint.config)
    register()

    whole, by_layer = both(folder, tmp_path / "measured.json")

    assert [logits.shape[:2] for logits, _, _ in whole] == [(2, 5), (1, 4)]
    assert same(whole, by_layer)


def test_hidden_states_are_gone_afterwards(tmp_path: Path) -> None:
    unit = unit_of(tmp_path, "mixtral", "native")
    model = open_streamed(unit.moe.checkpoint.folder, "auto")

    passing = streamed(model, BATCHES, tmp_path / "measured.json")
    next(passing)
    assert list(tmp_path.glob(".measured.json.*.hidden.tmp"))
    passing.close()

    assert not list(tmp_path.glob(".measured.json.*"))
    assert not torch.is_inference_mode_enabled()
