"""`coalesce sweep`"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from orchestrator import run_folder
from orchestrator.commands.run import console, supervised
from orchestrator.config import RunConfig
from orchestrator.lock import exclusive
from orchestrator.preflight import Prepared, prepare
from orchestrator.run import observe, run
from orchestrator.sweep.build import build, chosen, with_measured
from orchestrator.sweep.points import Point, points
from orchestrator.sweep.write import refusals, table, write
from stages.unit import beside


def sweep_command(config: RunConfig, words: Sequence[str], *, quiet: bool) -> None:
    """Observes unless that is done, decides every pair, builds what was asked for."""
    shown, prepared = console(), prepare(config)
    if config.calibrate.statistics is not None:
        run_folder.claim(prepared.folder, prepared.config, prepared.model)
    elif not _observed(prepared):
        supervised(prepared, shown, observe, quiet=quiet)
    found = points(prepared)
    built = chosen(found, [*config.sweep.build, *words])
    found = with_measured(prepared, found)
    _show(prepared, found, shown, quiet=quiet)
    if built:
        with exclusive(prepared.folder):
            for index in built:
                build(prepared, found[index], lambda job: supervised(job, shown, run, quiet=quiet))
                found = with_measured(prepared, found)
                write(prepared.folder, found)
        _show(prepared, found, shown, quiet=quiet)
    print(f"sweep: {prepared.folder.sweep.with_suffix('.json')}")
    print(f"picture: {prepared.folder.sweep.with_suffix('.png')}")


def _observed(prepared: Prepared) -> bool:
    """The table is written when every shard and sample is, and its digest after it."""
    return prepared.folder.statistics.exists() and beside(prepared.folder.statistics).exists()


def _show(prepared: Prepared, found: Sequence[Point], shown: Console, *, quiet: bool) -> None:
    write(prepared.folder, found)
    if quiet:
        return
    shown.print(table(found))
    for line in refusals(found):
        shown.print(line, highlight=False, markup=False, soft_wrap=True)
