"""One rank's part of a model: opened, put behind the exchange, and compared with the whole.

The comparison comes before any text is read: one MoE block of each kind, against the same block
with all its experts in this process, on random hidden states. It costs one layer of memory.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cluster.expert_parallel import ExpertGroup, ExpertParallel
from models.blocks import find_block, find_blocks
from models.streaming.model import StreamedModel, open_streamed
from stages.calibrate import autoep
from stages.calibrate.config import Backend, Engine
from stages.errors import ReplicaError

# Of the largest output, in units of the type's own rounding: another order of the same additions.
_TOLERANCE = 16
_CHECKED_TOKENS = 64


def open_rank(
    folder: Path, dtype: str, engine: Engine, backend: Backend, group: ExpertGroup
) -> StreamedModel:
    """The model of one rank: all that is dense and its own experts, ready to run with the others.

    Args:
        engine: `resident`: all layers are in memory. `streaming`: they come and go.
        backend: who exchanges tokens; `autoep` is always resident.

    Raises:
        ReplicaError: a block does not answer as it does in one process.
    """
    whole = open_streamed(folder, dtype, layers_only=True)
    if backend == "autoep":
        model = autoep.open_layers(folder, dtype, group)
    else:
        model = open_streamed(folder, dtype, experts=group.owned(num_experts(whole.model)))
        distribute(model.model, group)
        if engine == "resident":
            for index in range(len(model.layers)):
                model.load(index)
    check_blocks(model, whole, group)
    return model


def num_experts(model: Any) -> int:
    """E, the same in all MoE layers."""
    modules: list[Any] = [found.experts for found in find_blocks(model).values()]
    (count,) = {int(module.num_experts) for module in modules}
    return count


def distribute(model: Any, group: ExpertGroup) -> None:
    """Puts the exchange around the experts of every MoE layer, in place."""
    for found in find_blocks(model).values():
        found.block.experts = ExpertParallel(found.experts, group)


@torch.inference_mode()
def check_blocks(model: StreamedModel, whole: StreamedModel, group: ExpertGroup) -> None:
    """Compares one MoE block of each kind with all its experts in this process.

    Tokens and their number differ between ranks, so that uneven splits are compared too.

    Raises:
        ReplicaError: largest difference and what was allowed.
    """
    for index in one_of_each_kind(whole.model):
        hidden = _random_tokens(model, group.rank)
        with whole.layer(index) as layer:
            expected = _answer(layer, hidden)
        with _held(model, index) as layer:
            found = _answer(layer, hidden)
        _compare(index, found, expected)


def one_of_each_kind(model: Any) -> list[int]:
    """The first layer of every kind of MoE block: classes and shapes."""
    kinds: dict[Any, int] = {}
    for layer, found in find_blocks(model).items():
        parts = tuple(type(part) for part in (found.block, found.router, found.experts))
        tensors = found.block.named_parameters()
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors)
        kinds.setdefault((parts, shapes), layer)
    return list(kinds.values())


def _held(model: StreamedModel, index: int) -> AbstractContextManager[nn.Module]:
    """The layer, where it is in memory already, or for the time of the comparison."""
    layer = model.layers[index]
    absent = any(tensor.is_meta for tensor in layer.parameters())
    return model.layer(index) if absent else nullcontext(layer)


def _answer(layer: nn.Module, hidden: Tensor) -> Tensor:
    """[1, T, H] -> [T, H]: what a layer's MoE block makes of hidden states."""
    found = find_block(layer)
    assert found is not None
    output = found.block(hidden)
    answer: Tensor = output[0] if isinstance(output, tuple) else output
    return answer.reshape(-1, hidden.shape[-1])


def _random_tokens(model: StreamedModel, seed: int) -> Tensor:
    """[1, T, H] hidden states."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, _CHECKED_TOKENS + seed, model.config.hidden_size)
    return torch.randn(shape, generator=generator).to(model.device, model.dtype)


def _compare(layer: int, found: Tensor, expected: Tensor) -> None:
    difference = float((found.float() - expected.float()).abs().max())
    largest = float(expected.float().abs().max())
    allowed = _TOLERANCE * torch.finfo(expected.dtype).eps * largest
    # Written so that NaN on either side is refused.
    if not difference <= allowed:
        raise ReplicaError(
            f"layer {layer} differs between an expert-parallel replica and one process by"
            f" {difference:.3g}, outputs are up to {largest:.3g}, {allowed:.3g} is allowed",
            "set calibrate.backend=thin if it is autoep, else executor.ranks_per_replica=1",
        )
