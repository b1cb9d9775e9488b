"""`coalesce densify`: the mapped model's function in the family's own form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.errors import CheckpointError
from models.mapped.registration import register
from models.moe import MoeCheckpoint
from stages.compress.config import CompressConfig
from stages.export.config import ExportConfig
from stages.export.densify import densify
from stages.group.decision import from_labels
from tests.planted_families import open_family, outputs, planted_model
from tests.tiny import compress, save_tiny

LABELS = [0, 0, 2, 2, 2, 5]


def mapped(folder: Path, original: Path, config: CompressConfig | None) -> Path:
    moe = MoeCheckpoint.open(original)
    labels = [LABELS[e] if e < 6 else e for e in range(moe.num_experts)]
    merged = [from_labels(n, labels, [1.0] * moe.num_experts) for n in moe.layers]
    return compress(moe, merged, folder, ExportConfig(format="mapped", compress=config))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3", "granitemoe", "gpt_oss"])
def test_the_plain_form_computes_the_same_and_has_the_originals_tensors(
    family: str, tmp_path: Path
) -> None:
    register()
    planted_model(family).save_pretrained(tmp_path / "original")
    small = family != "gpt_oss"  # its experts are merged only
    section = CompressConfig(rank=3, sparse=0.25, axis="columns", skip_layers=())
    source = mapped(tmp_path / "mapped", tmp_path / "original", section if small else None)

    written = densify(source, tmp_path / "plain")

    before, after = (MoeCheckpoint.open(tmp_path / name) for name in ("original", "plain"))
    shapes = [
        {n: (t.shape, t.dtype) for n, t in each.checkpoint.tensors.items()}
        for each in (before, after)
    ]
    assert shapes[0] == shapes[1]
    assert written == after.checkpoint.nbytes
    plain, info = open_family(tmp_path / "plain")
    assert not any(info.get(fault) for fault in ("missing_keys", "unexpected_keys"))
    assert type(plain).__name__ == before.checkpoint.config["architectures"][0]
    compact = outputs(open_family(source)[0])
    torch.testing.assert_close(outputs(plain), compact, rtol=1e-4, atol=1e-5)


def test_half_precision_is_rounded_once(tmp_path: Path) -> None:
    original = save_tiny(tmp_path / "model", "mixtral", torch.bfloat16)
    source = mapped(tmp_path / "mapped", original, CompressConfig(rank=2, sparse=0.5))

    densify(source, tmp_path / "plain")

    stored = load_file(source / "model.safetensors")
    block = "model.layers.0.mlp.experts.down_proj."
    u, v, s, index = (stored[block + part][1] for part in ("u", "v", "s", "index"))
    exact = (u.double() @ v.double()).index_add(0, index, s.double())
    found = MoeCheckpoint.open(tmp_path / "plain").read_expert(0, 3).down
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-6)


def test_a_missing_factor_is_named(tmp_path: Path) -> None:
    original = save_tiny(tmp_path / "model", "mixtral")
    source = mapped(tmp_path / "mapped", original, CompressConfig(rank=2))
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.up_proj.v"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(CheckpointError, match=r"layers.1.mlp.experts.up_proj.v is missing"):
        densify(source, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_what_is_not_mapped_or_not_empty_is_refused(tmp_path: Path) -> None:
    original = save_tiny(tmp_path / "model", "mixtral")
    source = mapped(tmp_path / "mapped", original, None)
    taken: Any = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")

    with pytest.raises(CheckpointError, match="is no mapped checkpoint: its model type is 'mix"):
        densify(original, tmp_path / "plain")
    with pytest.raises(CheckpointError, match="is not empty"):
        densify(source, taken)
    assert [path.name for path in taken.iterdir()] == ["notes.txt"]
    assert not (tmp_path / "plain").exists()
