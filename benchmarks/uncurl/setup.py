"""What is trained, reduced, tuned and measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
PRETRAIN = REPOSITORY / "examples" / "pretrain"
BUNDLED = REPOSITORY / "examples" / "bundled"
LENGTH = 128  # tokens per window, in observing, tuning and measuring


@dataclass(frozen=True)
class Tuning:
    """Two stages on the task's training text: routers alone, then everything. AdamW, no decay."""

    router_steps: int = 20
    full_steps: int = 60
    batch: int = 4  # windows
    router_rate: float = 3e-3
    full_rate: float = 1e-3


@dataclass(frozen=True)
class Setup:
    """Everything that a number depends on beside its cell."""

    out: Path
    seeds: tuple[int, ...] = (0, 1)
    # Experts before -> experts after.
    kept: Mapping[int, tuple[int, ...]] = field(
        default_factory=lambda: {32: (16, 8, 4, 2), 16: (8, 4, 2), 8: (4, 2)}
    )
    # Trained from scratch: the sizes to reduce, and those to compare with.
    sizes: tuple[int, ...] = (8, 32, 16, 4)
    tasks: tuple[str, ...] = ("code_python", "legal")
    tokens: int = 40_960  # observed, all domains alike
    evaluated: int = 4096  # per task
    tuning: Tuning = Tuning()
    # Routers alone, for the comparison of routers.
    router_steps: tuple[int, ...] = (0, 20, 100)
    # Keys that replace those of examples/pretrain/sizes.yaml.
    recipe: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    # Characters of every document file that are used; None: all.
    characters: int | None = None
    threads: int = 1

    @property
    def focus(self) -> tuple[int, int]:
        """Experts before and after of the single comparisons: the largest, cut to a quarter."""
        largest = max(self.kept)
        return largest, max(largest // 4, min(self.kept[largest]))

    def training(self) -> dict[str, Any]:
        """`sizes.yaml` with what is changed here."""
        config: dict[str, Any] = yaml.safe_load((PRETRAIN / "sizes.yaml").read_text("utf-8"))
        config["recipe"] |= dict(self.recipe)
        config["model"] |= dict(self.model)
        return config | {"experts": list(self.sizes)}

    def settings(self) -> dict[str, Any]:
        """For JSON: everything but where it lies."""
        found = {name: value for name, value in asdict(self).items() if name != "out"}
        return found | {name: self.training()[name] for name in ("recipe", "model")}


def quick(setup: Setup) -> Setup:
    """The smallest form: everything is done, nothing is learnt."""
    return replace(
        setup,
        seeds=(0,),
        kept={8: (4, 2)},
        sizes=(8, 4),
        tokens=2560,
        evaluated=512,
        tuning=Tuning(router_steps=1, full_steps=1, batch=1),
        router_steps=(0, 1),
        recipe={"steps": 3, "per_domain": 1, "warmup": 1},
        model={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2},
        characters=20_000,
    )
