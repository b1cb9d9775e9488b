"""Calibration by a replica of several ranks: the same shards, statistics and files.

The batches of a shard are those of a single process, each run whole by one rank: batch i by rank
i mod N. Ranks run in lock step, because every forward pass of one needs the experts of all; ranks
that have no batch left run one token that counts nowhere. Each rank observes its own tokens, after
the expert outputs came back; rank 0 adds the sums up in rank order and writes the shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from cluster.expert_parallel import ExpertGroup, ExpertParallel
from models.moe import MoeCheckpoint
from models.partial import experts_module, load_part, read_fused
from stages.calibrate.recorder import Recorder
from stages.calibrate.stage import (
    ShardUnit,
    batches_of,
    observe_batch,
    recorder_of,
    summary,
    write_shard,
)
from stages.corpus.blocks import Batch, Block
from stages.errors import ReplicaError
from stages.unit import Done, execute

T = TypeVar("T")
# Of the largest output, in units of the type's own rounding: another order of the same additions.
_TOLERANCE = 16
_CHECKED_TOKENS = 64


class Rank:
    """One rank of a replica; holds its part of the model from shard to shard."""

    def __init__(self, group: ExpertGroup) -> None:
        self._group = group
        self._loaded: tuple[tuple[Path, str], Any] | None = None

    def run(self, unit: ShardUnit) -> Done | None:
        """Rank 0 decides whether the shard is still to be done, writes it and returns the rest."""
        if self._group.rank:
            if self._group.agree(True):
                self.run_one(unit)
            return None
        started = False

        def together(unit: ShardUnit) -> dict[str, Any]:
            nonlocal started
            started = self._group.agree(True)
            return self.run_one(unit)

        done = execute(unit, together)
        if not started:
            self._group.agree(False)
        return done

    def run_one(self, unit: ShardUnit) -> dict[str, Any]:
        """Observes this rank's batches; on rank 0, writes the table of all."""
        model = self._model(unit)
        found, recorder = batches_of(unit), recorder_of(unit)
        for batch in dealt(found, self._group):
            if batch is None:
                keep_step(model, unit.num_experts)
            else:
                observe_batch(model, batch, recorder)
        parts = self._group.gather(recorder)
        if parts:
            total = recorder_of(unit)
            for part in parts:  # in rank order
                total.extend(part)
            write_shard(unit, total)
        return summary(unit, found)

    def _model(self, unit: ShardUnit) -> Any:
        key = (unit.model, unit.dtype)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # the old model must not stay while the new one is read
            self._loaded = (key, load_rank(unit.model, unit.dtype, self._group))
        return self._loaded[1]


def make_rank(group: ExpertGroup) -> Callable[[ShardUnit], Done | None]:
    """One rank's worker for `cluster.executor.Replicas`."""
    return Rank(group).run


def load_rank(folder: Path, dtype: str, group: ExpertGroup) -> Any:
    """The model of one rank, dense part and own experts, ready to run together with the others.

    Raises:
        ReplicaError: a layer does not answer as it does in one process.
    """
    # Links were judged when the run was prepared; a rank opens what was accepted.
    moe = MoeCheckpoint.open(folder, allow_links=True)
    model = load_part(moe, group.owned(moe.num_experts), dtype)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    distribute(moe, model, group)
    check_layers(moe, model, group)
    return model


def distribute(moe: MoeCheckpoint, model: Any, group: ExpertGroup) -> None:
    """Puts the exchange around the experts of every MoE layer, in place."""
    for layer in moe.layers:
        local = experts_module(moe, model, layer)
        block = model.get_submodule(f"model.layers.{layer}.{moe.family.memory_block}")
        block.experts = ExpertParallel(local, moe.num_experts, group)


@torch.inference_mode()
def check_layers(moe: MoeCheckpoint, model: Any, group: ExpertGroup) -> None:
    """Compares one layer of each kind with all its experts in this process, on random tokens.

    Costs one layer's experts of memory per kind, for the time of the comparison. Tokens and their
    number differ between ranks, so that uneven splits are compared too.

    Raises:
        ReplicaError: largest difference and what was allowed.
    """
    for layer in one_of_each_kind(moe, model):
        wrapped = experts_module(moe, model, layer)
        hidden, ids, gates = _random_tokens(wrapped.local, moe, group.rank)
        found = wrapped(hidden, ids, gates)
        expected = _whole(moe, layer, wrapped.local)(hidden, ids, gates)
        _compare(layer, found, expected)


def one_of_each_kind(moe: MoeCheckpoint, model: Any) -> list[int]:
    """The first layer of every kind of experts module: class and shapes."""
    kinds: dict[Any, int] = {}
    for layer in moe.layers:
        local = experts_module(moe, model, layer).local
        shapes = tuple((name, p.shape, p.dtype) for name, p in local.named_parameters())
        kinds.setdefault((type(local), shapes), layer)
    return list(kinds.values())


def dealt(items: Sequence[T], group: ExpertGroup) -> Iterator[T | None]:
    """Every N-th item, and as many None as make all ranks take the same number of steps."""
    for start in range(0, len(items), group.size):
        index = start + group.rank
        yield items[index] if index < len(items) else None


def keep_step(model: Any, num_experts: int) -> None:
    """One forward pass of one token, for the sake of the other ranks; its sums are dropped."""
    observe_batch(model, Batch(0, (Block("", (0,)),)), Recorder(num_experts))


def _random_tokens(local: Any, moe: MoeCheckpoint, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states `[T, H]`, distinct experts `[T, k]` and weights that sum to one `[T, k]`."""
    generator = torch.Generator().manual_seed(seed)
    tokens, like = _CHECKED_TOKENS + seed, local.down_proj
    hidden = torch.randn(tokens, like.shape[1], generator=generator).to(like)
    scores = torch.rand(tokens, moe.num_experts, generator=generator)
    gates, ids = scores.softmax(dim=-1).topk(moe.top_k)
    return hidden, ids.to(like.device), (gates / gates.sum(dim=-1, keepdim=True)).to(like)


def _whole(moe: MoeCheckpoint, layer: int, local: Any) -> Any:
    """The layer's experts module with all experts: the same class, config and device."""
    with torch.device("meta"):
        whole = type(local)(local.config)
    tensors = read_fused(moe, layer, range(moe.num_experts), local.down_proj.dtype)
    whole.load_state_dict(tensors, assign=True)
    return whole.to(local.down_proj.device)


def _compare(layer: int, found: Tensor, expected: Tensor) -> None:
    difference = float((found.float() - expected.float()).abs().max())
    largest = float(expected.float().abs().max())
    allowed = _TOLERANCE * torch.finfo(expected.dtype).eps * largest
    # Written so that NaN on either side is refused.
    if not difference <= allowed:
        raise ReplicaError(
            f"layer {layer} differs between an expert-parallel replica and one process by"
            f" {difference:.3g}, outputs are up to {largest:.3g}, {allowed:.3g} is allowed",
            "set executor.ranks_per_replica=1",
        )
