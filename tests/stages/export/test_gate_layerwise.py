"""The reload gate of a checkpoint that does not fit into memory: names by transformers, values by
layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.errors import GateError
from stages.export import layerwise, stage
from stages.export.stage import ExportUnit, assemble
from tests.planted_export import export_unit
from tests.planted_families import planted_model

MAPPED = ("mixtral", "deepseek_v3", "momentum_smoe")


def unit_of(folder: Path, family: str, form: Any) -> ExportUnit:
    """Four merged experts per layer, written and not yet assembled."""
    planted_model(family).save_pretrained(folder / "original")
    return export_unit(folder, form, "streaming")


@pytest.fixture
def mapped(tmp_path: Path) -> Path:
    """An assembled folder of the mapped format."""
    unit = unit_of(tmp_path, "mixtral", "mapped")
    (folder := tmp_path / "assembled").mkdir()
    assemble(unit, folder)
    assert layerwise.problems(folder, needs_code=True) == []
    return folder


def change(folder: Path, ending: str, value: torch.Tensor | float, place: int = 0) -> None:
    """Sets one element of the first tensor whose name ends so."""
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        name = next((n for n in tensors if n.endswith(ending)), None)
        if name is not None:
            tensors[name].view(-1)[place] = value
            path.unlink()  # it is a link to the layer's file
            save_file(tensors, path, metadata={"format": "pt"})
            return
    raise AssertionError(f"no tensor ends with {ending}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "form"), [("gpt_oss", "native"), ("mixtral", "mapped"), ("momentum_smoe", "mapped")]
)
def test_it_opens_by_names_and_by_layers(family: str, form: str, tmp_path: Path) -> None:
    unit = unit_of(tmp_path, family, form)

    result = stage.run_one(unit)

    assert result["checks"]["opened"] == "meta"
    assert result["checks"]["parameters"] == sum(each.parameters for each in unit.layouts)
    assert result["bytes"] == result["predicted_bytes"]
    assert unit.output.is_dir()


@pytest.mark.slow
def test_a_value_that_is_not_finite_is_refused_and_nothing_is_published(tmp_path: Path) -> None:
    unit = unit_of(tmp_path, "mixtral", "native")
    tensors = load_file(unit.files[0])
    name = next(name for name in tensors if name.endswith("w1.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, unit.files[0], metadata={"format": "pt"})

    with pytest.raises(GateError, match=r"layers.0.*is not finite"):
        stage.run_one(unit)

    assert not unit.output.exists()
    assert not list(tmp_path.glob(".output*"))


@pytest.mark.slow
def test_a_missing_tensor_is_refused_by_name(tmp_path: Path) -> None:
    unit = unit_of(tmp_path, "mixtral", "native")
    tensors = load_file(unit.files[0])
    name = next(name for name in tensors if name.endswith("input_layernorm.weight"))
    padding = {f"{name}.padding": tensors.pop(name)}  # as many bytes as before
    save_file(tensors | padding, unit.files[0], metadata={"format": "pt"})

    with pytest.raises(GateError, match="missing_keys"):
        stage.run_one(unit)


@pytest.mark.parametrize(
    ("ending", "value", "said"),
    [
        ("expert_map", 7, "expert_map of layer 0 does not use each of 4 stored experts"),
        ("lm_head.weight", float("inf"), "lm_head.weight is not finite"),
    ],
)
def test_values_that_no_shape_shows_are_named(
    ending: str, value: float, said: str, mapped: Path
) -> None:
    change(mapped, ending, value, place=-1)

    assert said in layerwise.problems(mapped, needs_code=True)


def test_weights_that_are_finite_and_logits_that_are_not(mapped: Path) -> None:
    config = json.loads((mapped / "config.json").read_text())
    (mapped / "config.json").write_text(json.dumps(config | {"rms_norm_eps": float("nan")}))

    assert layerwise.problems(mapped, needs_code=True) == ["logits are not finite"]
