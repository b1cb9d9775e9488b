"""Where the checkpoint lies: a folder, one that is downloaded, or a catalogue of a remote one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from models.checkpoint import Checkpoint
from models.errors import CheckpointError
from models.remote.origin import catalogue
from models.remote.urls import is_url
from orchestrator import run_folder
from orchestrator.config import ModelConfig, RunConfig
from orchestrator.places import urls
from orchestrator.run_folder import RunFolder
from stages.upload import stage as upload


def model_folder(config: RunConfig, folder: RunFolder) -> Path:
    """The checkpoint's folder; for a URL, and where files are copied to nodes, its catalogue.

    Everything of a catalogue but the weights is fetched into the run folder, which must be ours.

    Raises:
        CheckpointError, StorageError: there is none, or it is out of reach.
        StorageError: the target of an upload is not ours, or out of reach.
    """
    if urls(config) or config.cache.local_paths:
        run_folder.refuse_foreign(folder)
    if config.upload is not None:
        upload.check_target(config.upload.url, folder.upload)
    cache = None if config.cache.dir is None else _kept(config.cache.dir)
    if is_url(config.model.path):
        return catalogue(config.model.path, folder.fetched, cache)
    found = resolve_model(config.model)
    if not config.cache.local_paths:
        return found
    Checkpoint.open(found, allow_links=config.model.allow_links)  # refuses what leads elsewhere
    return catalogue(f"file://{found.resolve()}", folder.fetched, cache)


_DOWNLOADED = ("*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt")


def resolve_model(config: ModelConfig, patterns: Sequence[str] = _DOWNLOADED) -> Path:
    """The local folder of a model; a hub name is downloaded (weights, config, tokenizer only).

    Raises:
        CheckpointError: neither a folder nor a name that can be downloaded.
    """
    path = Path(config.path).expanduser()
    if path.exists():
        return path.absolute()
    if config.path.startswith((".", "/", "~")) or config.path.count("/") != 1:
        raise CheckpointError(f"no checkpoint folder at {path}", "correct `model.path`")
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            config.path, revision=config.revision, allow_patterns=list(patterns)
        )
    except Exception as error:  # the hub's client has dozens of types; all mean: not to be had
        raise CheckpointError(
            f"{config.path} is no local folder and cannot be downloaded:"
            f" {str(error).splitlines()[0]}",
            "download it where there is a network and set `model.path` to the folder",
        ) from error
    return Path(found)


def _kept(cache: Path) -> str:
    """As written where a node has its own value for it, otherwise absolute."""
    return str(cache) if "$" in str(cache) or str(cache).startswith("~") else str(cache.absolute())
