"""`coalesce plan`"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from models.errors import UserError
from orchestrator.config import RunConfig
from orchestrator.machine import check_machine
from orchestrator.plan import table
from orchestrator.preflight import described, prepare
from orchestrator.remote import resolve_model


def plan_command(config: RunConfig, console: Console, *, config_only: bool) -> None:
    """What a run would do; with `config_only`, of a model whose weights are not there yet."""
    if not config_only:
        console.print(table(prepare(config)))
        return
    with standing_in(config) as imagined:
        found = described(imagined)
        console.print(table(found))
        try:
            check_machine(found)
        except UserError as lacking:  # it is not where the run has to be
            console.print(f"Not on this machine: {lacking}")
    console.print(
        "From config.json alone: sizes are exact, nothing else was checked of the weights."
    )


@contextmanager
def standing_in(config: RunConfig) -> Iterator[RunConfig]:
    """The same run on a checkpoint of holes, as long as the context lasts.

    Raises:
        CheckpointError: config.json is missing or makes no model.
    """
    from models.standin import write_stand_in

    source = resolve_model(config.model, patterns=("*.json", "tokenizer*"))
    with TemporaryDirectory(prefix="coalesce-plan-") as name:
        model = write_stand_in(source, Path(name) / source.name)
        tokenizer = config.model.tokenizer or source
        changed = config.model.model_copy(update={"path": str(model), "tokenizer": tokenizer})
        # A run that exists belongs to the real weights.
        folder = config.run_dir.with_name(f"{config.run_dir.name} (not begun)")
        yield config.model_copy(update={"model": changed, "run_dir": folder})
