"""Momentum students recover: what their original says is learnt, and nothing else moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models.momentum.registration import register
from stages.recover.api import recover
from stages.recover.progress import read_course
from stages.recover.teach import teach
from tests import tiny_momentum
from tests.stages.recover.small import config, write_text
from tests.tiny import logits_of, open_model, random_ids, same_bits
from tests.tiny_momentum import STYLES


def checkpoints(root: Path, style: str) -> dict[str, Path]:
    """The original, and a student with noise on routers and experts."""
    register()
    model = tiny_momentum.model(block_style=style, learnable_step=True)
    found = {"original": root / "original", "student": root / "student"}
    model.save_pretrained(found["original"])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp." in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(found["student"])
    return found


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("mode", ["experts", "full"])
def test_a_momentum_student_is_trained_towards_its_original(
    mode: str, style: str, tmp_path: Path
) -> None:
    folders, text = checkpoints(tmp_path, style), tmp_path / "tokens.arrow"
    write_text(text)
    # The text is noise, so that cross-entropy leads away from the original.
    changes: dict[str, Any] = {"steps": 16, "mode": mode, "alpha": 100, "learning_rate": 0.005}
    wanted = config(**changes)
    taught = teach(folders["original"], text, tmp_path / "taught.arrow", wanted)

    scratch = tmp_path / "states"
    done = recover(folders["student"], tmp_path / "out", wanted, text, taught, scratch=scratch)

    said = [line["distillation"] for line in read_course(scratch / "course.jsonl")]
    assert sum(said[-3:]) < 0.85 * sum(said[:3])
    assert logits_of(open_model(tmp_path / "out"), random_ids(2, 5)).isfinite().all()
    old, new = (load_file(f / "model.safetensors") for f in (folders["student"], tmp_path / "out"))
    moved = {name for name in old if not same_bits(old[name], new[name])}
    trained = {name for name in old if mode == "full" or ".experts." in name}
    assert moved <= trained and len(moved) > len(trained) / 2
    # So little text leaves some experts without a token, and says so.
    assert all(".experts." in name for name in trained - moved)
    assert bool(trained - moved) == any(done["untrained"].values())
    assert mode == "experts" or any(name.endswith("momentum.gamma") for name in moved)
    assert (tmp_path / "out" / "modeling_momentum.py").exists()
