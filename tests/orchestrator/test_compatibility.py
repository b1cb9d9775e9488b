"""Encoder-decoders are calibrated by one engine, whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.compatibility import check_seq2seq
from orchestrator.config import ExecutorConfig, ModelConfig, RunConfig
from orchestrator.errors import ConfigError
from stages.calibrate.config import CalibrateConfig, Engine
from stages.corpus.config import CorpusConfig, Source

SWITCH = {"is_encoder_decoder": True, "model_type": "switch_transformers"}


def config(engine: Engine | str, ranks: int = 1) -> RunConfig:
    source = CorpusConfig(sources=(Source(path="x"),))
    return RunConfig(
        run_dir=Path("run"),
        model=ModelConfig(path="m"),
        calibrate=CalibrateConfig.model_validate({"data": source, "engine": engine}),
        executor=ExecutorConfig(ranks_per_replica=ranks),
    )


def test_streaming_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(ConfigError, match="switch_transformers has an encoder and a decoder") as e:
        check_seq2seq(config("streaming"), SWITCH)
    assert "calibrate.engine=resident" in str(e.value)


def test_an_encoder_decoder_on_several_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match="ranks_per_replica is 2") as e:
        check_seq2seq(config("auto", ranks=2), SWITCH)
    assert "calibrate.engine=resident" in str(e.value)


@pytest.mark.parametrize("engine", ["auto", "resident"])
def test_a_whole_encoder_decoder_is_accepted(engine: str) -> None:
    check_seq2seq(config(engine), SWITCH)


def test_decoders_may_be_streamed_and_split() -> None:
    check_seq2seq(config("streaming"), {"model_type": "mixtral"})
    check_seq2seq(config("auto", ranks=2), {"model_type": "mixtral"})
