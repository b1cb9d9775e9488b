"""A tiny student, its original, and text that both can be trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from models.arrow import write_table
from stages.recover.config import RecoverConfig
from stages.recover.teach import teach
from tests.tiny import VOCABULARY, save_tiny, tiny_model

BLOCKS, LENGTH = 12, 10


@dataclass(frozen=True)
class Small:
    """Folders and files below `root`."""

    root: Path

    @property
    def original(self) -> Path:
        """What is learnt from."""
        return self.root / "original"

    @property
    def student(self) -> Path:
        """The original with noise on its experts and routers."""
        return self.root / "student"

    @property
    def corpus(self) -> Path:
        """Blocks of random tokens, one of them short."""
        return self.root / "tokens.arrow"

    def taught(self, config: RecoverConfig) -> tuple[Path, ...]:
        """What the original says, asked once per form."""
        path = self.root / f"taught-{config.teacher.top}-{config.temperature}.arrow"
        return (path,) if path.exists() else teach(self.original, self.corpus, path, config)


def make(root: Path, family: str = "mixtral", **overrides: Any) -> Small:
    """Writes both checkpoints and the text."""
    small = Small(root)
    save_tiny(small.original, family, **overrides)
    student = tiny_model(family, **overrides)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".mlp." in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    student.save_pretrained(small.student)
    write_text(small.corpus)
    return small


def write_text(path: Path, blocks: int = BLOCKS, length: int = LENGTH) -> None:
    """Random tokens of one domain; the last block is short."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(1, VOCABULARY, (blocks, length), generator=generator).tolist()
    rows[-1] = rows[-1][: length // 2]
    write_table(
        path,
        pa.table({"domain": ["prose"] * blocks, "tokens": pa.array(rows, pa.list_(pa.int32()))}),
    )


def config(**changes: Any) -> RecoverConfig:
    """A few fast steps."""
    values: dict[str, Any] = {
        "steps": 6,
        "batch": 4,
        "micro_batch": 2,
        "warmup": 1,
        "learning_rate": 0.01,
        "checkpoint_every": 2,
        "teacher": {"top": 16, "dtype": "float32"},
    }
    return RecoverConfig(**(values | changes))
