"""Which keys of a config may be URLs, and which URLs are refused. Imports neither torch nor ray."""

from __future__ import annotations

from models.remote.urls import check_url, is_url, was_url
from orchestrator.config import RunConfig
from orchestrator.errors import ConfigError

_POSIX = (
    "name a folder: a run rests on locks and on renames that happen wholly or not at all, and"
    " object stores have neither; inputs and `upload.url` may be URLs"
)


def check_places(config: RunConfig) -> None:
    """Refuses URLs where folders are needed, and URLs that would put a secret into files.

    Raises:
        ConfigError: a folder that was given as a URL.
        UrlError: see `check_url`.
    """
    folders = {
        "run_dir": config.run_dir,
        "model.tokenizer": config.model.tokenizer,
        "calibrate.statistics": config.calibrate.statistics,
        "cache.dir": config.cache.dir,
    }
    for key, path in folders.items():
        if path is not None and (was_url(path) or is_url(str(path))):
            remedy = _POSIX if key == "run_dir" else "copy it to a folder and name that"
            raise ConfigError(f"{key} is a URL, it must be a folder", remedy)
    for key, url in urls(config).items():
        check_url(key, url)
    if config.upload is not None and not is_url(config.upload.url):
        raise ConfigError("upload.url is no URL", "write s3://BUCKET/PREFIX, or file:///FOLDER")


def urls(config: RunConfig) -> dict[str, str]:
    """Dotted key -> URL, of all keys that hold one."""
    found = {"model.path": config.model.path}
    corpora = {"calibrate.data": config.calibrate.data}
    if config.evaluate is not None:
        corpora["evaluate.data"] = config.evaluate.data
    if config.recover is not None and config.recover.data is not None:
        corpora["recover.data"] = config.recover.data
    for key, corpus in corpora.items():
        for index, source in enumerate(corpus.sources):
            found[f"{key}.sources.{index}.path"] = source.path
    if config.upload is not None:
        found["upload.url"] = config.upload.url
    return {key: text for key, text in found.items() if is_url(text)}
