"""Whether model, tokenizer and engine go together; asked before a byte is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.moe import MoeCheckpoint
from models.support import reasons
from orchestrator.config import RunConfig
from orchestrator.errors import ConfigError
from stages.corpus.stage import load_tokenizer, tokenizer_digest
from stages.errors import DataError, StatisticsError
from stages.unit import beside


def not_streamed(moe: MoeCheckpoint) -> str | None:
    """Why this checkpoint cannot be observed layer by layer, or by several ranks; None: it can."""
    if moe.quantised:
        return "its weights are quantised, and only the whole model is decoded"
    return reasons(moe.family).get("streaming")


def check_seq2seq(config: RunConfig, model: Mapping[str, Any]) -> None:
    """Refuses to stream or to split what has an encoder and a decoder; `model`: its config.json.

    Raises:
        ConfigError: naming the engine that does it.
    """
    if not model.get("is_encoder_decoder"):
        return
    name = model.get("model_type", "this model")
    if config.calibrate.engine == "streaming":
        raise ConfigError(
            f"calibrate.engine=streaming runs one stack of layers, {name} has an encoder and a"
            " decoder",
            "set calibrate.engine=resident",
        )
    if (ranks := config.executor.ranks_per_replica) > 1:
        raise ConfigError(
            f"executor.ranks_per_replica is {ranks}; {name}, an encoder-decoder, is calibrated"
            " whole in one process",
            "set executor.ranks_per_replica=1 and calibrate.engine=resident",
        )


def check_target(config: RunConfig, cannot: str | None, behind: str | None, corpus: Path) -> None:
    """Refuses to refit behind reduced layers what no layer can be run of alone, or without text.

    Args:
        cannot: why the model cannot be streamed; None: it can.
        behind: what layers do with their experts' sum besides scaling it; None: nothing.
        corpus: token blocks of the run whose statistics are used.

    Raises:
        ConfigError, StatisticsError: naming the target that does it.
    """
    target = f"refit.target={config.refit.target}"
    if config.refit.together is None or not config.refit.applies(config.group.narrows):
        return
    if cannot is not None:
        raise ConfigError(
            f"{target} runs the model one layer at a time, and this one cannot be run so: {cannot}",
            "set refit.target=original",
        )
    if behind is not None:
        raise ConfigError(
            f"{target} hands to the experts what the residual stream is off behind them, and in"
            f" this model that is no sum of the two: {behind}",
            "set refit.target=original",
        )
    if config.calibrate.statistics is not None and not beside(corpus).exists():
        raise StatisticsError(
            f"{target} runs the model on the text that was observed, and there is no {corpus}",
            "copy the whole run folder, or set refit.target=original",
        )


def check_tokenizer(folder: Path, model: Mapping[str, Any]) -> None:
    """Refuses a tokenizer with ids that the model's embeddings do not reach.

    Raises:
        DataError: none can be loaded, or both sizes.
    """
    largest = max(load_tokenizer(folder).get_vocab().values(), default=-1)
    size = model.get("vocab_size")
    if isinstance(size, int) and largest >= size:
        raise DataError(
            f"the tokenizer in {folder} has ids up to {largest:,}, the model knows {size:,} tokens"
            f" (0 to {size - 1:,})",
            "set `model.tokenizer` to the folder of the model's own tokenizer",
        )


def check_same_tokenizer(path: Path, seen: Mapping[str, str], tokenizer: Path) -> None:
    """Refuses statistics whose text was cut into tokens by another tokenizer.

    Raises:
        StatisticsError: with both fingerprints.
    """
    theirs, ours = seen.get("tokenizer"), tokenizer_digest(tokenizer)
    if theirs is not None and theirs != ours:
        raise StatisticsError(
            f"{path} was observed with another tokenizer (fingerprint {theirs[:12]}, that in"
            f" {tokenizer} is {ours[:12]})",
            "calibrate with this tokenizer, or correct `model.tokenizer`",
        )
