"""The `autoep` backend: what DeepSpeed's own MoE layers do is observed as they do it.

Everything is read from AutoEP's layers: logits from the gate, choices and weights from the router,
outputs on their way from the exchange to the weighted sum. They round otherwise than the family's
code, so the statistics have a fingerprint of their own; a layer that computes something else is
refused before any text is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.autoep import Replacement, is_replaced, watching_outputs
from cluster.expert_parallel import ExpertGroup
from models.blocks import MoeBlock, find_blocks
from models.streaming.model import StreamedModel, open_streamed
from stages.calibrate.observer import Routed
from stages.calibrate.outputs import sizes_of
from stages.calibrate.recorder import Recorder
from stages.corpus.blocks import Batch
from stages.errors import ReplicaError
from stages.model import batch_of, pad_id


def open_layers(folder: Path, dtype: str, group: ExpertGroup, **settings: Any) -> StreamedModel:
    """The model of one rank, all layers in memory; one whole layer at a time on the way.

    Args:
        settings: as `cluster.autoep.Replacement` takes them.

    Raises:
        ReplicaError: DeepSpeed cannot replace the family's blocks.
    """
    model = open_streamed(folder, dtype)
    try:
        replacement = Replacement(model.model, group, **settings)
        for index in range(len(model.layers)):
            model.load(index)
            replacement.replace(model.layer_name(index))
    except ValueError as error:
        raise ReplicaError(
            f"AutoEP refuses {model.config.model_type}: {error}", "set calibrate.backend=thin"
        ) from error
    missed = [i for i, found in find_blocks(model.model).items() if not is_replaced(found.block)]
    if missed:
        raise ReplicaError(f"AutoEP left layers {missed} as they are", "set calibrate.backend=thin")
    return model


@torch.inference_mode()
def observe_batch(model: Any, batch: Batch, recorder: Recorder) -> None:
    """One forward pass; hands what every layer did to `recorder`."""
    ids, mask = batch_of(batch.rows, pad_id(model), model.device)
    with watching(find_blocks(model), mask) as seen:
        model.model(input_ids=ids, attention_mask=mask, use_cache=False)
    recorder.add(batch, seen)


@contextmanager
def watching(blocks: dict[int, MoeBlock], mask: Tensor) -> Iterator[dict[int, Routed]]:
    """As `stages.calibrate.observer.watching`, for AutoEP's layers."""
    seen: dict[int, Routed] = {}
    keep = mask.reshape(-1)
    # What the layer that runs now has said: logits first, then its choice.
    heard: list[Any] = []
    inputs: list[Tensor] = []

    def chosen(_router: Any, args: Any, output: Any) -> None:
        heard.append(output)
        inputs.append(args[0])

    def gave(outputs: Tensor) -> None:
        logits, (gates, ids, _) = heard[0], heard[1]
        norms, largest = sizes_of(outputs.flatten(0, 1))
        seen[order[len(seen)]] = Routed(
            logits=logits[keep],
            ids=ids[keep],
            gates=gates[keep],
            norms=norms.view(ids.shape)[keep],
            largest=largest.view(ids.shape)[keep],
            hidden=inputs.pop(),
            keep=keep,
        )

    order = list(blocks)
    with ExitStack() as stack:
        for found in blocks.values():
            gate = found.router.get_submodule("gate")
            first = gate.register_forward_hook(lambda _m, _a, output: heard.append(output))
            second = found.router.register_forward_hook(chosen)
            # A layer that also returns logits asks its gate again: what was heard is dropped.
            third = found.block.register_forward_pre_hook(lambda _m, _a: heard.clear())
            for hook in (first, second, third):
                stack.callback(hook.remove)
        stack.enter_context(watching_outputs(gave))
        yield seen
