"""Finished layers of the output, opened as whoever loads the output will open them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from models.checkpoint import INDEX
from models.mapped.registration import register
from models.moe import MoeCheckpoint
from models.streaming.model import StreamedModel, open_streamed
from stages.export.config import ExportConfig
from stages.export.formats import FORMATS
from stages.group.decision import LayerDecision


def open_reduced(
    moe: MoeCheckpoint,
    decisions: Sequence[LayerDecision],
    export: ExportConfig,
    files: Mapping[int, Path],
    folder: Path,
) -> StreamedModel:
    """A model of which the layers of `files` can be loaded, in float32.

    Args:
        decisions: of all layers: config.json counts experts and neurons.
        files: layer -> its finished tensors.
        folder: an empty one, for config.json and links.
    """
    from safetensors import safe_open

    form = FORMATS[export.format]
    if form.needs_code:
        register()
    places: dict[str, str] = {}
    for layer, path in files.items():
        name = f"layer-{layer:05d}.safetensors"
        (folder / name).symlink_to(path.absolute())
        with safe_open(path, framework="pt") as handle:
            places |= dict.fromkeys(handle.keys(), name)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps(form.config_json(moe, decisions, export)))
    return open_streamed(folder, "float32", layers_only=True)
