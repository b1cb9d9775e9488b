"""A config that means the same in any folder: relative paths are those of the current one."""

from __future__ import annotations

from glob import glob
from pathlib import Path

from orchestrator.config import RunConfig
from stages.corpus.config import CorpusConfig, Source


def absolute(config: RunConfig) -> RunConfig:
    """Paths that name something here become absolute; hub names stay what they are."""
    model = config.model.model_copy(
        update={
            "path": _if_local(config.model.path),
            "tokenizer": _path(config.model.tokenizer),
        }
    )
    calibrate = config.calibrate.model_copy(
        update={
            "data": _corpus(config.calibrate.data),
            "statistics": _path(config.calibrate.statistics),
        }
    )
    evaluate = config.evaluate
    if evaluate is not None:
        evaluate = evaluate.model_copy(update={"data": _corpus(evaluate.data)})
    recover = config.recover
    if recover is not None:
        data = None if recover.data is None else _corpus(recover.data)
        teacher = recover.teacher.model_copy(update={"path": _path(recover.teacher.path)})
        recover = recover.model_copy(update={"data": data, "teacher": teacher})
    cache = config.cache.model_copy(update={"dir": _path_of_here(config.cache.dir)})
    parts = {"cache": cache, "model": model, "calibrate": calibrate, "evaluate": evaluate}
    others = {"recover": recover, "run_dir": config.run_dir.absolute()}
    return config.model_copy(update=parts | others)


def _corpus(corpus: CorpusConfig) -> CorpusConfig:
    return corpus.model_copy(update={"sources": tuple(map(_source, corpus.sources))})


def _source(source: Source) -> Source:
    return source.model_copy(update={"path": _if_local(source.path)})


def _if_local(path: str) -> str:
    """Also a pattern, when files match it."""
    return str(Path(path).absolute()) if Path(path).exists() or glob(path) else path


def _path_of_here(path: Path | None) -> Path | None:
    """A path with a variable or ~ in it is another one on each node."""
    return path if path is None or "$" in str(path) or str(path)[:1] == "~" else path.absolute()


def _path(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()
