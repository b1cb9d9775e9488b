"""A recovered checkpoint has the form of the one that was trained, whatever that is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from models.mapped.registration import register
from models.moe import MoeCheckpoint
from stages.compress.config import CompressConfig
from stages.export.config import ExportConfig
from stages.group.decision import from_labels
from stages.recover.api import recover
from tests.stages.recover.small import config, write_text
from tests.tiny import MOE_LAYERS, compress, logits_of, random_ids, same_bits, save_tiny

SMALL = CompressConfig(rank=4, sparse=0.25, multiple=1)


def student(folder: Path, family: str, **export: Any) -> Path:
    """A reduced checkpoint: experts 0 and 1, 2 and 3, 4 and 5 are merged."""
    save_tiny(folder / "original", family)
    moe = MoeCheckpoint.open(folder / "original")
    pairs: list[int | None] = [0, 0, 2, 2, 4, 4]
    decisions = [from_labels(layer, pairs, [1.0] * 6) for layer in MOE_LAYERS[family]]
    return compress(moe, decisions, folder, ExportConfig(**export))


def opened(folder: Path) -> Any:
    register()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@pytest.mark.parametrize(
    ("family", "mode"), [("mixtral", "experts"), ("olmoe", "full"), ("qwen3_moe", "full")]
)
@pytest.mark.parametrize("form", ["native", "mapped", "factored"])
def test_values_change_and_the_form_does_not(
    tmp_path: Path, family: str, form: str, mode: str
) -> None:
    export: dict[str, Any] = {"format": "native" if form == "native" else "mapped"}
    before = student(tmp_path, family, **export, compress=SMALL if form == "factored" else None)
    after, text = tmp_path / "after", tmp_path / "tokens.arrow"
    write_text(text)
    register()
    recover(before, after, config(steps=2, mode=mode, alpha=0), text)
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert {n: (t.dtype, t.shape) for n, t in old.items()} == {
        n: (t.dtype, t.shape) for n, t in new.items()
    }
    for name in old:
        trained = old[name].is_floating_point() and (mode == "full" or ".experts." in name)
        assert same_bits(old[name].float(), new[name].float()) != trained, name
    assert (before / "config.json").read_bytes() == (after / "config.json").read_bytes()
    assert bool(logits_of(opened(after), random_ids(2, 5)).isfinite().all())


def test_bfloat16_files_stay_so_and_training_is_not_rounded(tmp_path: Path) -> None:
    save_tiny(tmp_path / "student", "mixtral", torch.bfloat16)
    write_text(tmp_path / "tokens.arrow")
    # Steps far below the last bit of bfloat16: in that type nothing would ever move.
    wanted = config(steps=40, batch=2, alpha=0, learning_rate=1e-4, schedule="constant")
    recover(tmp_path / "student", tmp_path / "out", wanted, tmp_path / "tokens.arrow")
    old, new = (load_file(tmp_path / f / "model.safetensors") for f in ("student", "out"))
    assert {tensor.dtype for tensor in new.values()} == {torch.bfloat16}
    moved = [float((old[n] != new[n]).float().mean()) for n in old if ".experts." in n]
    assert min(moved) > 0.2
