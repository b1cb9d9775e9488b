"""The original stream behind the last layer, as it is read back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.tensors import write_tensors
from stages.carry.read import behind
from stages.errors import StatisticsError
from stages.refit.config import PolishConfig
from stages.transform.final import last_layer

LOGITS = PolishConfig(last_layer="logits")


def parts(folder: Path) -> list[Path]:
    paths = [folder / f"part-{number}.safetensors" for number in range(2)]
    for number, path in enumerate(paths):
        stream = torch.full((3, 2), float(number))
        write_tensors(path, {"4.stream": stream, "4.factor": torch.tensor([0.25])})
    return paths


def test_parts_are_joined_in_order(tmp_path: Path) -> None:
    found = behind(4, parts(tmp_path))
    assert found is not None
    stream, factor = found
    assert stream[:, 0].tolist() == [0, 0, 0, 1, 1, 1] and factor == 0.25


def test_other_layers_and_other_configs_are_fitted_to_outputs(tmp_path: Path) -> None:
    target = torch.zeros(6, 2)
    assert behind(3, parts(tmp_path)) is None
    assert last_layer(LOGITS, tmp_path, 3, parts(tmp_path), target) is None
    assert last_layer(PolishConfig(), tmp_path, 4, parts(tmp_path), target) is None
    found = last_layer(LOGITS, tmp_path, 4, parts(tmp_path), target)  # nothing is opened yet
    assert found is not None and found.factor == 0.25


def test_a_part_that_is_gone_is_named(tmp_path: Path) -> None:
    first, second = parts(tmp_path)
    second.unlink()
    with pytest.raises(StatisticsError, match="part-1"):
        behind(4, [first, second])
