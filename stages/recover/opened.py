"""The student as the ranks of a training hold it, opened so that nobody holds more of it than that.

With ZeRO 3 a rank never holds the whole model: one layer is read, dealt out to the ranks, and
forgotten, before the next one is. With the other stages every rank has every value, in the type in
which the model runs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.checkpoint import FLOAT_BYTES, Checkpoint
from models.errors import CheckpointError
from models.mapped.registration import register
from models.streaming.model import StreamedModel, open_streamed
from stages.model import load_model
from stages.recover.config import DeepSpeedConfig, RecoverConfig
from stages.recover.ranks import Ranks


def open_student(folder: Path, config: RecoverConfig, ranks: Ranks, *, needs_code: bool) -> Any:
    """The student, in eval mode; with ZeRO 3 its parameters are dealt out already.

    Args:
        needs_code: whether it opens with the modeling file beside it.

    Raises:
        CheckpointError: it cannot be read.
    """
    section = config.deepspeed or DeepSpeedConfig()
    dtype = "bfloat16" if ranks.group is not None and section.bf16 else "float32"
    if ranks.group is not None and section.zero_stage == 3:
        streamed = _streamed(folder, dtype, needs_code=needs_code)
        if streamed is not None:
            return _dealt_out(streamed)
    return load_model(folder, dtype, trust_remote_code=needs_code)


def rounded(folder: Path) -> bool:
    """Whether the files hold more than bfloat16 can say."""
    infos = Checkpoint.open(folder, allow_links=True).tensors.values()
    return any(info.dtype in FLOAT_BYTES and info.dtype != "BF16" for info in infos)


def exact_values(
    folder: Path, names: Collection[str], *, needs_code: bool
) -> Iterator[tuple[str, Tensor]]:
    """Parameters in fp32 by their names in memory, with one layer in memory at a time."""
    streamed = _streamed(folder, "float32", needs_code=needs_code)
    if streamed is None:
        whole = load_model(folder, "float32", trust_remote_code=needs_code)
        yield from _named(whole.named_parameters(), names)
        return
    yield from _named(streamed.model.named_parameters(), names)
    for index in range(len(streamed.layers)):
        with streamed.layer(index) as layer:
            yield from _named(layer.named_parameters(streamed.layer_name(index)), names)


def _named(
    parameters: Iterable[tuple[str, nn.Parameter]], names: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in parameters:
        if name in names and not parameter.is_meta:
            yield name, parameter.detach()


def _streamed(folder: Path, dtype: str, *, needs_code: bool) -> StreamedModel | None:
    """None for a family whose layers cannot be read one by one; loading it whole says the rest."""
    if needs_code:
        register()
    try:
        return open_streamed(folder, dtype)
    except CheckpointError:
        return None


def _dealt_out(streamed: StreamedModel) -> Any:
    """All of the model, of which this rank holds its share."""
    _deal_out(streamed.model.parameters(), streamed.dtype)
    for index in range(len(streamed.layers)):
        _deal_out(streamed.load(index).parameters(), streamed.dtype)
    return streamed.model


def _deal_out(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
    """Every rank calls it with the same values, and keeps its part of each."""
    import deepspeed

    found = [each for each in parameters if not each.is_meta]
    for each in found:
        # Some families keep a few values in fp32; DeepSpeed wants one type.
        each.data = each.data.to(dtype)
    deepspeed.zero.Init(module=nn.ParameterList(found), dtype=dtype)
