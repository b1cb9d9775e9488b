"""The per-layer job: reduce one layer to a few sizes, as the transform would, and measure KL.

The model stays in memory; a reduced layer is padded with neurons of zeros, which compute nothing,
so that it fits into the original's place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from models.arrow import read_table, write_table
from models.expert import Expert
from models.moe import MoeCheckpoint
from stages.corpus.blocks import Block
from stages.corpus.stage import read_blocks
from stages.errors import StatisticsError
from stages.evaluate.metrics import kl_divergence, sampled_positions
from stages.inputs.read import LayerInputs
from stages.merge.groups import merge_groups
from stages.model import batch_of, load_model, pad_id
from stages.probe.config import VERSION, ProbeConfig
from stages.refit.layer import held_out
from stages.transform.stage import TransformUnit, reduce_layer
from stages.unit import Done, Fingerprint, OneFile, execute

SCHEMA = pa.schema(
    [
        ("layer", pa.int32()),
        ("experts", pa.int32()),
        # Neurons of every expert; null: all.
        ("width", pa.int32()),
        # Mean KL(original || one layer reduced) of the final distributions, nats.
        ("kl", pa.float64()),
        ("positions", pa.int32()),
    ]
)


@dataclass(frozen=True)
class ProbeUnit(OneFile):
    """One layer at several sizes; `sizes` are transforms that are done in memory alone."""

    moe: MoeCheckpoint
    layer: int
    sizes: tuple[TransformUnit, ...]
    config: ProbeConfig
    corpus: Path
    corpus_digest: str
    dtype: str
    batch_size: int
    output: Path

    @property
    def name(self) -> str:
        """`probe/layer-00003`."""
        return f"probe/layer-{self.layer:05d}"

    @property
    def fingerprint(self) -> Fingerprint:
        """Text, arithmetic, and whatever shapes the reduced layers."""
        return {
            "code": f"probe-{VERSION}",
            "config": self.config.model_dump(mode="json"),
            "corpus": self.corpus_digest,
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            "sizes": [unit.fingerprint for unit in self.sizes],
        }


class Prober:
    """Holds the model and what it says about the probed text."""

    def __init__(self) -> None:
        self._model: Any = None
        self._blocks: list[Block] = []
        self._reference = torch.empty(0)

    def run_one(self, unit: ProbeUnit) -> dict[str, Any]:
        """Writes one row per size.

        Raises:
            StatisticsError: no block of the sample is left to judge by.
        """
        if self._model is None:
            self._model = load_model(unit.moe.checkpoint.folder, unit.dtype)
            self._blocks = probed_blocks(unit)
            self._reference = self._distributions(unit)
        rows = [self._row(unit, size) for size in unit.sizes]
        write_table(unit.output, pa.Table.from_pylist(rows, schema=SCHEMA))
        return {"kl": {str(row["width"]): row["kl"] for row in rows}}

    def _row(self, unit: ProbeUnit, size: TransformUnit) -> dict[str, Any]:
        decision = size.decision
        assert decision is not None
        merged, _ = merge_groups(unit.moe, decision, size.align, size.merge)
        if size.needs_inputs:
            routers = unit.moe.checkpoint.read(unit.moe.router_names(unit.layer))
            merged = reduce_layer(size, decision, merged, routers).experts
        places = [merged[0 if group is None else group] for group in decision.group]
        with in_place(self._model, unit.moe, unit.layer, places):
            found = self._distributions(unit)
        kl = kl_divergence(self._reference, found).double()
        return {
            "layer": unit.layer,
            "experts": len(merged),
            "width": decision.width,
            "kl": float(kl.mean()),
            "positions": len(kl),
        }

    @torch.inference_mode()
    def _distributions(self, unit: ProbeUnit) -> Tensor:
        """[P, V] fp32 log-probabilities at evenly spaced positions of the probed text."""
        model, size, rows = self._model, unit.batch_size, [b.tokens for b in self._blocks]
        wanted = sampled_positions(sum(map(len, rows)), unit.config.positions)
        done, found = 0, []
        for start in range(0, len(rows), size):
            ids, mask = batch_of(rows[start : start + size], pad_id(model), model.device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            count = int(mask.sum())
            here = wanted[(wanted >= done) & (wanted < done + count)] - done
            found.append(logits[mask][here.to(logits.device)].float().log_softmax(-1).cpu())
            done += count
        return torch.cat(found)


def make_worker() -> Callable[[ProbeUnit], Done]:
    """A worker for `cluster.executor.Job`."""
    prober = Prober()
    return lambda unit: execute(unit, prober.run_one)


def probed_blocks(unit: ProbeUnit) -> list[Block]:
    """Blocks that shaped no layer, evenly spread, of the domains that count.

    Raises:
        StatisticsError: there is none.
    """
    size = unit.sizes[0]
    assert size.inputs is not None
    inputs = LayerInputs.read(size.inputs[0])
    if size.task is not None:
        inputs = inputs.only(inputs.weights(dict(size.task)) > 0)
    judges = torch.unique(inputs.block[held_out(inputs, size.refit.held_out)]).tolist()
    blocks = [block for index in judges for block in read_blocks(unit.corpus, index, index + 1)]
    if not blocks:
        raise StatisticsError("the sample holds no block to probe with", "calibrate on more text")
    mean = sum(len(block.tokens) for block in blocks) / len(blocks)
    count = min(len(blocks), max(1, round(unit.config.tokens / mean)))
    return [blocks[index * len(blocks) // count] for index in range(count)]


@contextmanager
def in_place(
    model: Any, moe: MoeCheckpoint, layer: int, experts: Sequence[Expert]
) -> Iterator[None]:
    """The model with other experts in one layer, in the place of all E; put back afterwards."""
    storage = moe.family.memory_experts
    assert storage is not None
    neurons = moe.meta_expert(layer).neurons
    packed = storage.pack([padded(expert, neurons) for expert in experts])
    prefix = moe.family.memory_prefix(layer)
    parameters = {name: model.get_parameter(prefix + name) for name in packed}
    before = {name: parameter.data.clone() for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data.copy_(packed[name])
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data.copy_(before[name])


def padded(expert: Expert, neurons: int) -> Expert:
    """The same function with `neurons` neurons: those that are added have no weight anywhere."""
    missing = neurons - expert.neurons
    made = {
        name: F.pad(
            tensor, (0, missing) if name == "down" or tensor.dim() == 1 else (0, 0, 0, missing)
        )
        for name, tensor in expert.tensors().items()
        if name != "down_bias"
    }
    return replace(expert, **made)


def file_name(layer: int) -> str:
    """`layer-00003.arrow`."""
    return f"layer-{layer:05d}.arrow"


def read_curve(path: Path) -> dict[int, float]:
    """Width -> KL of one probed layer.

    Raises:
        StatisticsError: it was not probed.
    """
    try:
        rows = read_table(path).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise StatisticsError(
            f"cannot read what was probed from {path}: {error}", "`coalesce run` probes"
        ) from error
    return {int(row["width"]): float(row["kl"]) for row in rows}
