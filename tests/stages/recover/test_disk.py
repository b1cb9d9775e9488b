"""A disk that fills up while a state is written."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.errors import DiskFull
from stages.recover.api import recover
from tests.stages.recover.small import config, make

pytestmark = pytest.mark.slow
MOUNTABLE = shutil.which("mount") is not None and os.geteuid() == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system."""
    if not MOUNTABLE:
        pytest.skip("only root can mount a small disk")
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("no disk can be mounted here")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_the_states_before_stay_and_training_goes_on_once_there_is_space(
    tmp_path: Path, disk: Path
) -> None:
    small = make(tmp_path)
    wanted = config(mode="full", alpha=0, checkpoint_every=1)
    recover(small.student, tmp_path / "whole", wanted, small.corpus)
    size = (tmp_path / "whole" / "model.safetensors").stat().st_size * 3
    subprocess.run(["mount", "-o", f"remount,size={int(2.5 * size)}", str(disk)], check=True)
    with pytest.raises(DiskFull, match="no space left"):
        recover(small.student, tmp_path / "out", wanted, small.corpus, scratch=disk)
    kept = sorted(path.name for path in disk.glob("*.safetensors"))
    assert kept == ["state-00000001.safetensors", "state-00000002.safetensors"]
    assert not list(disk.glob(".*"))
    subprocess.run(["mount", "-o", f"remount,size={5 * size}", str(disk)], check=True)
    recover(small.student, tmp_path / "out", wanted, small.corpus, scratch=disk)
    found, expected = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "whole"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
