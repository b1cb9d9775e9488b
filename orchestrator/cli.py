"""The `coalesce` command. Every verb imports what it needs when it is called."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from cluster.errors import InfrastructureError
from models.errors import UserError
from orchestrator.errors import ConfigError, exit_code

if TYPE_CHECKING:
    from orchestrator.load import Loaded

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Merge, then compress: makes a sparse mixture-of-experts checkpoint smaller.",
)
Recipe = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file or recipe name.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="Values that win.")
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="The run_dir of a run.")]


@app.command()
def run(
    config: Recipe,
    overrides: Overrides = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the result only.")] = False,
) -> None:
    """Run, or go on with, everything from observation to report."""
    from orchestrator.commands.run import run_command

    run_command(_load(config, overrides).config, quiet=quiet)


@app.command()
def calibrate(
    config: Recipe,
    overrides: Overrides = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the result only.")] = False,
) -> None:
    """Observe only: routing statistics that any later run of the same model can reuse."""
    from orchestrator.commands.run import calibrate_command

    calibrate_command(_load(config, overrides).config, quiet=quiet)


@app.command()
def plan(config: Recipe, overrides: Overrides = None) -> None:
    """Show units, bytes, memory and what is already done; loads no weights."""
    from orchestrator.plan import table
    from orchestrator.preflight import prepare

    _wide_console().print(table(prepare(_load(config, overrides).config)))


@app.command()
def validate(
    config: Recipe,
    overrides: Overrides = None,
    deep: Annotated[bool, typer.Option("--deep", help="Also read every weight once.")] = False,
) -> None:
    """Check config, model, text, budget and disk; exit code 2 and one message if unfit."""
    from orchestrator.commands.validate import validate_command

    validate_command(_load(config, overrides).config, deep=deep)


@app.command()
def status(run_dir: RunDir) -> None:
    """Show how far a run is; also while it runs, and from another node."""
    from orchestrator.status import of, table

    _wide_console().print(table(of(run_dir)))


@app.command()
def report(run_dir: RunDir) -> None:
    """Write index.html of a finished run again, and print its path and headline."""
    from orchestrator.commands.report import report_command

    report_command(run_dir)


@app.command("show-config")
def show_config(config: Recipe, overrides: Overrides = None) -> None:
    """Print the resolved config with the source of every value."""
    from orchestrator.load import flatten

    loaded = _load(config, overrides)
    values = flatten(loaded.config.model_dump(mode="json"))
    width = max(map(len, values))
    for key, value in values.items():
        typer.echo(f"{key:<{width}}  {value!s:<40}  # {loaded.sources[key]}")


@app.command("ls")
def list_names(
    what: Annotated[str, typer.Argument(metavar="methods|families|recipes|exporters")],
    as_json: Annotated[bool, typer.Option("--json", help="Families: the whole matrix.")] = False,
) -> None:
    """List what can be named in a config; families with what is supported for each."""
    from orchestrator.commands.ls import LISTS, list_command

    if what not in LISTS:
        raise ConfigError(f"cannot list {what!r}", f"one of: {', '.join(LISTS)}")
    list_command(what, as_json=as_json)


def main() -> None:
    """Entry point: errors with a remedy become one message and an exit code, no stack trace."""
    try:
        app(standalone_mode=True)
    except (UserError, InfrastructureError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(exit_code(error))


def _load(config: str, overrides: list[str] | None) -> Loaded:
    from orchestrator.load import load

    return load(config, overrides or [])


def _wide_console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=140)
