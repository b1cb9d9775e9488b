"""Whether a recovery can be done as a run asks for it; asked before a byte is written."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from models.checkpoint import Checkpoint
from models.moe import MoeCheckpoint
from orchestrator.errors import ConfigError
from stages.corpus.stage import load_tokenizer
from stages.recover.config import RecoverConfig


def check_recovery(
    config: RecoverConfig, moe: MoeCheckpoint, cannot_stream: str | None, tokenizer: Path
) -> None:
    """Refuses what cannot be trained, or learnt from.

    Args:
        cannot_stream: why the original cannot be run one layer at a time; None: it can.
        tokenizer: of the model that is reduced.

    Raises:
        ConfigError: with the numbers.
    """
    name = moe.family.model_type
    if moe.checkpoint.config.get("is_encoder_decoder") and config.dealt_out:
        raise ConfigError(
            f"recover.ranks={config.ranks} with DeepSpeed wants a gradient of every expert on every"
            f" rank; {name}, an encoder-decoder, gives none to experts that no token of a pass met",
            "set recover.ranks=1 and leave recover.deepspeed out",
        )
    if config.dealt_out and find_spec("deepspeed") is None:
        raise ConfigError(
            f"recover.ranks={config.ranks} needs DeepSpeed, which is not installed",
            "pip install 'coalesce-moe[deepspeed]', or set recover.ranks=1 without"
            " recover.deepspeed",
        )
    if config.teacher.engine == "streaming" and cannot_stream is not None:
        raise ConfigError(
            f"recover.teacher.engine=streaming cannot be: {cannot_stream}",
            "set recover.teacher.engine=resident",
        )
    if config.teacher.path is not None and config.alpha:
        check_teacher(config.teacher.path, moe, tokenizer)


def check_teacher(teacher: Path, moe: MoeCheckpoint, tokenizer: Path) -> None:
    """Refuses a teacher whose predictions are about other tokens.

    Raises:
        ConfigError: both sizes, or the first token that differs.
    """
    says, asks = Checkpoint.open(teacher, allow_links=True).config, moe.checkpoint.config
    theirs, ours = says.get("vocab_size"), asks.get("vocab_size")
    remedy = "set recover.teacher.path to a model with the same tokens, or leave it out"
    if bool(says.get("is_encoder_decoder")) != bool(asks.get("is_encoder_decoder")):
        raise ConfigError(
            f"one of the model and the teacher {teacher} has an encoder, and reads half of every"
            " block of text before it predicts the other half; the other has none",
            "set recover.teacher.path to a model of the same kind, or leave it out",
        )
    if theirs != ours:
        raise ConfigError(
            f"the teacher {teacher} predicts {theirs:,} tokens, the model has {ours:,}"
            if isinstance(theirs, int)
            else f"the teacher {teacher} does not say how many tokens it predicts",
            remedy,
        )
    first, second = (load_tokenizer(folder).get_vocab() for folder in (tokenizer, teacher))
    every = sorted(first.keys() | second.keys())
    differing = [word for word in every if first.get(word) != second.get(word)]
    if differing:
        word = differing[0]
        raise ConfigError(
            f"the teacher {teacher} has another tokenizer: {word!r} is token {second.get(word)}"
            f" there and {first.get(word)} in {tokenizer} ({len(differing):,} tokens differ)",
            remedy,
        )
