"""The files that every node of a cluster must see, and what to do when one does not."""

from __future__ import annotations

from pathlib import Path

from cluster.errors import NotShared
from cluster.executor import Executor
from orchestrator.errors import RunFolderError
from orchestrator.preflight import Prepared

REMEDY = (
    "put run folder, model and data on a file system that all nodes mount at the same path; or run"
    " on one node (executor.address=local)"
)


def check(prepared: Prepared, executor: Executor) -> None:
    """Refuses a cluster whose nodes see other files than this process.

    Raises:
        RunFolderError: names the nodes and what they do not see.
    """
    try:
        executor.check_shared(prepared.folder.root, inputs(prepared))
    except NotShared as error:
        raise RunFolderError(str(error), REMEDY) from error


def inputs(prepared: Prepared) -> list[Path]:
    """Model, tokenizer and text files that exist here; globs and hub names are not looked up."""
    config = prepared.config
    calibrated = None if config.calibrate.statistics is not None else config.calibrate.data
    corpora = [calibrated, config.evaluate.data if config.evaluate else None]
    if config.recover is not None:
        corpora.append(config.recover.data or config.calibrate.data)
    texts = [Path(source.path) for each in corpora if each for source in each.sources]
    found = [prepared.moe.checkpoint.folder, prepared.tokenizer, *texts]
    return list(dict.fromkeys(path.absolute() for path in found if path.exists()))
