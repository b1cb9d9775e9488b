"""Assembles the output folder from finished layer files, and puts it through the reload gate."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from models.atomic import attempt, link_or_copy, write_json
from models.checkpoint import INDEX
from models.errors import CheckpointError
from models.moe import MoeCheckpoint
from models.remote.origin import is_metadata
from models.skeleton import check_width, unloaded_elements
from stages.errors import GateError
from stages.export.config import VERSION, ExportConfig
from stages.export.formats import FORMATS, Format
from stages.export.layout import FileLayout
from stages.group.decision import LayerDecision
from stages.unit import Fingerprint, beside

_TOLERANCE = 1e-3
_BYTES_TOLERANCE = 0.01


@dataclass(frozen=True)
class ExportUnit:
    """Makes `output` from the layer files, in the order of `layouts`."""

    moe: MoeCheckpoint
    decisions: tuple[LayerDecision, ...]
    layouts: tuple[FileLayout, ...]
    files: tuple[Path, ...]
    digests: tuple[str, ...]  # of `files`
    config: ExportConfig
    threads: int
    output: Path
    variant: str = "compressed"

    @property
    def name(self) -> str:
        """`compressed/output`."""
        return f"{self.variant}/{self.output.name}"

    @property
    def outputs(self) -> Sequence[Path]:
        """Everything in the folder but the model card, which is written with the report."""
        names = [target_name(i, len(self.files)) for i in range(len(self.files))]
        names += [INDEX, "config.json", *self._format.extra_files(self.moe)]
        return [self.output / name for name in [*names, *_companions(self.moe)]]

    @property
    def marker(self) -> Path:
        """Beside the folder."""
        return beside(self.output)

    @property
    def fingerprint(self) -> Fingerprint:
        """The layer files and the format."""
        return {
            "code": f"export-{VERSION}",
            "config": self.config.model_dump(mode="json"),
            "layers": list(self.digests),
        }

    @property
    def needs_code(self) -> bool:
        """Whether the folder opens with the modeling file that is written beside the weights."""
        return self._format.needs_code or bool(self.moe.family.code)

    @property
    def _format(self) -> Format:
        return FORMATS[self.config.format]


def target_name(index: int, count: int) -> str:
    """`model-00001-of-00006.safetensors`."""
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def run_one(unit: ExportUnit) -> dict[str, Any]:
    """Builds the folder under a temporary name; it gets its own name when the gate has passed.

    Raises:
        GateError: the folder did not open as promised; the temporary folder is removed.
    """
    staging = unit.output.with_name(f".{unit.output.name}.{attempt()}.tmp")
    for stale in unit.output.parent.glob(f".{unit.output.name}.*.tmp"):
        if stale.is_dir():  # what is left of a marker, a file, matches as well
            shutil.rmtree(stale)
    staging.mkdir(parents=True)
    try:
        assemble(unit, staging)
        result = _gate(unit, staging)
        if unit.output.exists():  # left by an attempt that was killed before its marker
            shutil.rmtree(unit.output)
        os.replace(staging, unit.output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return result


def assemble(unit: ExportUnit, folder: Path) -> None:
    """Writes weights, index, config and companions into an existing folder; no gate."""
    weight_map: dict[str, str] = {}
    for index, source in enumerate(unit.files):
        name = target_name(index, len(unit.files))
        link_or_copy(source, folder / name)
        with safe_open(folder / name, framework="pt") as handle:
            weight_map |= dict.fromkeys(handle.keys(), name)
    total = sum(layout.tensor_bytes for layout in unit.layouts)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    form = FORMATS[unit.config.format]
    write_json(folder / "config.json", form.config_json(unit.moe, unit.decisions, unit.config))
    for name, path in form.extra_files(unit.moe).items():
        shutil.copyfile(path, folder / name)
    for name in _companions(unit.moe):
        shutil.copyfile(unit.moe.checkpoint.folder / name, folder / name)


def _gate(unit: ExportUnit, folder: Path) -> dict[str, Any]:
    """Bytes against the prediction, then `gate.py` in a fresh, isolated process."""
    predicted = sum(layout.file_bytes for layout in unit.layouts)
    written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    problems = []
    if abs(written - predicted) > _BYTES_TOLERANCE * predicted:
        problems.append(f"{written:,} bytes written, {predicted:,} predicted")
    found = _fresh_process(folder, _expectations(unit))
    problems += found.pop("problems")
    if problems:
        raise GateError(
            f"{unit.name} was refused by the reload gate: {'; '.join(problems)}",
            "nothing was published; please report this with the run's config.yaml",
        )
    return {"bytes": written, "predicted_bytes": predicted, "checks": found}


def _expectations(unit: ExportUnit) -> dict[str, Any]:
    form, checkpoint = FORMATS[unit.config.format], unit.moe.checkpoint
    compare = form.needs_code and checkpoint.nbytes <= unit.config.compare_limit_bytes
    return {
        "threads": unit.threads,
        "needs_code": form.needs_code or bool(unit.moe.family.code),
        "opens_with": unit.moe.family.auto_class,
        "parameters": sum(each.parameters for each in unit.layouts) - unloaded_elements(unit.moe),
        "expanded_config": _plain_config(unit) if compare else None,
        "tolerance": _TOLERANCE,
    }


def _plain_config(unit: ExportUnit) -> dict[str, Any] | None:
    """The config of a plain model with the same experts; None where the family has no such."""
    width, config = unit.decisions[0].width, unit.moe.checkpoint.config
    if len({each.width for each in unit.decisions}) > 1:
        return None
    if width is None:
        return config
    with suppress(CheckpointError):
        check_width(unit.moe, width)
        return unit.moe.family.with_width(config, width)
    return None


def _fresh_process(folder: Path, expected: dict[str, Any]) -> dict[str, Any]:
    script = Path(__file__).with_name("gate.py")
    command = [sys.executable, "-I", str(script), str(folder), json.dumps(expected)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if run.returncode != 0:
        last = run.stderr.strip().splitlines()[-1:] or ["no message"]
        return {"problems": [f"it does not open in a fresh process: {last[0]}"]}
    found: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    return found


def _companions(moe: MoeCheckpoint) -> list[str]:
    """Names of the files that are copied as they are."""
    return sorted(path.name for path in moe.checkpoint.folder.iterdir() if is_companion(path))


def is_companion(path: Path) -> bool:
    """Tokenizer, generation config and the like, beside the weights of a checkpoint."""
    return path.is_file() and path.name not in {"config.json", INDEX} and is_metadata(path.name)
