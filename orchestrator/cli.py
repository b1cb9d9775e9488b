"""The `coalesce` command. Every verb imports what it needs when it is called."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from cluster.errors import InfrastructureError
from models.errors import UserError
from orchestrator.errors import ConfigError, exit_code
from orchestrator.interrupt import Interrupted, stopping_at_once

if TYPE_CHECKING:
    from orchestrator.load import Loaded

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Merge, then compress: makes a sparse mixture-of-experts checkpoint smaller.",
)
submit = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Hand a run to a Ray cluster or to Slurm.",
)
app.add_typer(submit, name="submit")
Recipe = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file or recipe name.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="Values that win.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show what would be submitted; write nothing.")
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
def plan(
    config: Recipe,
    overrides: Overrides = None,
    config_only: Annotated[
        bool,
        typer.Option("--config-only", help="From the model's config.json, before its weights."),
    ] = False,
) -> None:
    """Show units, bytes, memory and what is already done; loads no weights."""
    from orchestrator.commands.plan import plan_command

    plan_command(_load(config, overrides).config, _wide_console(), config_only=config_only)


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
def sweep(
    config: Recipe,
    overrides: Overrides = None,
    build: Annotated[
        list[str] | None,
        typer.Option("--build", metavar="METHOD:BUDGET", help="Build and measure; repeatable."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the result only.")] = False,
) -> None:
    """Decide many (method, budget) pairs on one observation: bytes and predicted errors."""
    from orchestrator.commands.sweep import sweep_command

    sweep_command(_load(config, overrides).config, build or [], quiet=quiet)


@app.command()
def status(
    run_dir: RunDir,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show how far a run is; also while it runs, and from another node."""
    from orchestrator.commands.status import status_command

    status_command(run_dir, _wide_console(), json_form=as_json)


@app.command()
def logs(
    run_dir: RunDir,
    unit: Annotated[
        str | None, typer.Argument(metavar="[UNIT]", help="Such as calibrate/shard-00003.")
    ] = None,
    failed: Annotated[
        bool, typer.Option("--failed", help="Units that failed, or lost their worker.")
    ] = False,
    stage: Annotated[str | None, typer.Option("--stage", help="Units of this stage.")] = None,
    tail: Annotated[
        int | None, typer.Option("--tail", min=1, help="The last lines of each file.")
    ] = None,
) -> None:
    """Print what units said: one log file each, all attempts in it."""
    from orchestrator.commands.logs import logs_command

    logs_command(run_dir, unit, stage=stage, failed=failed, tail=tail)


@app.command()
def densify(
    source: Annotated[Path, typer.Argument(metavar="FOLDER", help="A mapped checkpoint.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="A folder that is new.")],
) -> None:
    """Write a mapped checkpoint in its family's own form, every slot of the router filled."""
    from stages.export.densify import densify as write

    typer.echo(f"{target}: {write(source, target):,} bytes of weights")


@app.command()
def report(run_dir: RunDir) -> None:
    """Write index.html of a finished run again, and print its path and headline."""
    from orchestrator.commands.report import report_command

    report_command(run_dir)


@submit.command("ray")
def submit_ray(
    config: Recipe,
    overrides: Overrides = None,
    address: Annotated[
        str | None, typer.Option("--address", help="http://HOST:8265 of the cluster.")
    ] = None,
    dry_run: DryRun = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not follow the job.")] = False,
    upload_code: Annotated[
        bool, typer.Option("--upload-code", help="The cluster has no coalesce: bring this one.")
    ] = False,
    runtime_env: Annotated[
        Path | None, typer.Option("--runtime-env", help="YAML with pip, env_vars and so on.")
    ] = None,
    python: Annotated[
        str, typer.Option("--python", help="Python on the cluster's head node.")
    ] = "python",
) -> None:
    """Run on a Ray cluster that is up; follows the log and ends as the run ends."""
    from orchestrator.commands.submit import ray_command

    code = ray_command(
        _load(config, overrides).config,
        address=address,
        dry_run=dry_run,
        wait=not no_wait,
        upload_code=upload_code,
        runtime_env=runtime_env,
        python=python,
    )
    raise typer.Exit(code)


@submit.command("slurm")
def submit_slurm(config: Recipe, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Run as a Slurm job: the config's `slurm` section says on what."""
    from orchestrator.commands.submit import slurm_command

    slurm_command(_load(config, overrides).config, dry_run=dry_run)


@app.command("show-config")
def show_config(config: Recipe, overrides: Overrides = None) -> None:
    """Print the resolved config with the source of every value."""
    from orchestrator.load import listed

    found = list(listed(_load(config, overrides)))
    width = max(len(key) for key, _, _ in found)
    for key, value, source in found:
        typer.echo(f"{key:<{width}}  {value!s:<40}  # {source}")


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
        with stopping_at_once():
            app(standalone_mode=True)
    except (UserError, InfrastructureError) as error:
        typer.echo("\n  ".join([f"error: {error}", *getattr(error, "__notes__", ())]), err=True)
        sys.exit(exit_code(error))
    except Interrupted as stop:
        again = shlex.join(["coalesce", *sys.argv[1:]])
        typer.echo(f"{stop}; the same command goes on: {again}", err=True)
        sys.exit(stop.exit_code)


def _load(config: str, overrides: list[str] | None) -> Loaded:
    from orchestrator.load import load

    return load(config, overrides or [])


def _wide_console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=140)
