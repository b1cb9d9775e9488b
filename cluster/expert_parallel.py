"""Expert parallelism: the experts of every layer are dealt out to N ranks, tokens travel to them.

Around the family's own experts module, nothing else: the router stays the model's, there is no
capacity, and no token is dropped or padded. Rank r of N holds experts r*E/N to (r+1)*E/N - 1.
All ranks must call each layer equally often: a rank that is alone in a call waits for the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from cluster.errors import LostPeer
from cluster.watchdog import Watchdog


@dataclass(frozen=True)
class Place:
    """Where one process stands in its replica, where rank 0 listens, and how long to wait."""

    rank: int
    size: int
    host: str
    port: int
    # Longest silence of the others before this process gives up.
    timeout_s: float = 900.0


@dataclass(frozen=True)
class ExpertGroup:
    """The ranks of one replica, seen from one of them."""

    rank: int
    size: int
    handle: Any  # the process group
    watchdog: Watchdog | None = None

    def owned(self, num_experts: int) -> range:
        """Experts of this rank; E must be a multiple of N."""
        assert num_experts % self.size == 0, (num_experts, self.size)
        share = num_experts // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def largest(self, number: int) -> int:
        """Every rank gets the largest of the ranks' numbers."""
        import deepspeed.comm as dist

        found = torch.tensor([number], device=_device())
        with self.reached():
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.handle)
            return int(found.item())

    def total(self, values: Tensor) -> Tensor:
        """Every rank gets the sum of the ranks' values, as a new tensor on the CPU."""
        import deepspeed.comm as dist

        found = values.to(_device(), copy=True)
        with self.reached():
            dist.all_reduce(found, op=dist.ReduceOp.SUM, group=self.handle)
            return found.cpu()

    def all_to_all(self, rows: Tensor, outgoing: list[int], incoming: list[int]) -> Tensor:
        """Rows to the ranks, `outgoing[r]` of them to rank r; returns what came, in rank order."""
        import deepspeed.comm as dist

        found = rows.new_empty(sum(incoming), *rows.shape[1:])
        with self.reached():
            dist.all_to_all_single(
                found,
                rows.contiguous(),
                output_split_sizes=incoming,
                input_split_sizes=outgoing,
                group=self.handle,
            )
        return found

    @contextmanager
    def reached(self) -> Iterator[None]:
        """Around a wait for the others.

        Raises:
            LostPeer: torch reports a dead peer as whatever RuntimeError its backend has for it.
        """
        try:
            with self.watchdog.waiting() if self.watchdog else nullcontext():
                yield
        except RuntimeError as error:
            raise LostPeer(f"a rank does not answer: {' '.join(str(error).split())}") from error


def join(place: Place) -> ExpertGroup:
    """Makes this process a rank of a replica; once per process.

    Raises:
        LostPeer: the others did not come, or the port was taken meanwhile.
    """
    os.environ |= {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.size),
        # Ray narrows CUDA_VISIBLE_DEVICES, so the device of a rank is always its first.
        "LOCAL_RANK": "0",
        "MASTER_ADDR": place.host,
        "MASTER_PORT": str(place.port),
    }
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.utils import groups

    switch_off_shm_op()
    watchdog = Watchdog(place.timeout_s)
    with ExpertGroup(place.rank, place.size, None, watchdog).reached():
        deepspeed.init_distributed(
            dist_backend="nccl" if torch.cuda.is_available() else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=place.timeout_s),
        )
        groups._create_expert_and_data_parallel(place.size)
    handle = groups._get_expert_parallel_group(f"ep_size_{place.size}")
    return ExpertGroup(place.rank, place.size, handle, watchdog)


def switch_off_shm_op() -> None:
    """Keeps DeepSpeed from compiling its shared-memory all-reduce when a CPU group is formed.

    It needs a C++ compiler and takes up to minutes; what is reduced here is one integer per shard.
    The table of ops that work on this machine is DeepSpeed's own but no documented switch; a test
    holds that it works.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class ExpertParallel(nn.Module):
    """Stands where the experts module stood, with the same call; every rank calls it together."""

    def __init__(self, local: nn.Module, group: ExpertGroup) -> None:
        """`local` holds the `group.owned` experts of this rank, counted from zero."""
        super().__init__()
        share = local.num_experts
        assert isinstance(share, int)
        # One table of parameters for both modules, and `local` is no submodule: tensors keep the
        # names that they have in a checkpoint.
        self._parameters = local._parameters
        self.__dict__["local"] = local
        self.num_experts = share * group.size
        self._group = group

    def forward(self, hidden: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        """Weighted sum over the selected experts.

        Args:
            hidden: `[T, H]`; T may differ between ranks, and may be 0.
            ids: `[T, k]` experts, 0 to E-1.
            gates: `[T, k]` their weights.

        Returns:
            `[T, H]` in the type of `hidden`.
        """
        outputs = exchange(self.__dict__["local"], hidden, ids, self.num_experts, self._group)
        combined: Tensor = (outputs * gates.unsqueeze(-1)).sum(dim=1)
        return combined.to(hidden.dtype)


def exchange(
    local: nn.Module, hidden: Tensor, ids: Tensor, num_experts: int, group: ExpertGroup
) -> Tensor:
    """Sends every (token, expert) pair to the owner of the expert, and the output back.

    The owner answers the ranks one after another, so that an expert gets the rows that it gets in
    one process, in their order: matrix products of other row counts may round differently.

    Args:
        local: experts module of the owned experts, called with k = 1 and unit weights.
        hidden: `[T, H]`.
        ids: `[T, k]`.

    Returns:
        `[T, k, H]`: the unweighted output of every selected expert.
    """
    size, share = group.size, num_experts // group.size
    # Pairs in the order of their expert, so that each owner's lie together; stable, so that an
    # expert sees the tokens in their own order.
    order = torch.argsort(ids.reshape(-1), stable=True)
    sent = torch.bincount(ids.reshape(-1), minlength=num_experts)  # [E] pairs per expert
    received = group.all_to_all(sent, [share] * size, [share] * size).view(size, share)
    with group.reached():  # on a GPU this is where the wait is
        incoming = received.sum(dim=1).tolist()
    outgoing = sent.view(size, share).sum(dim=1).tolist()
    arrived = group.all_to_all(hidden[order // ids.shape[1]], outgoing, incoming)  # [R, H]
    answers = [
        _answer(local, rows, counts)
        for rows, counts in zip(torch.split(arrived, incoming), received, strict=True)
    ]
    returned = group.all_to_all(torch.cat(answers), incoming, outgoing)  # [T * k, H]
    outputs = torch.empty_like(returned)
    outputs[order] = returned
    return outputs.view(*ids.shape, hidden.shape[-1])


def _answer(local: nn.Module, rows: Tensor, counts: Tensor) -> Tensor:
    """[R, H]: outputs for one rank's rows, of which the e-th owned expert gets `counts[e]`."""
    if not len(rows):  # grouped_mm refuses an empty batch
        return rows
    ids = torch.arange(len(counts), device=rows.device).repeat_interleave(counts)
    found: Tensor = local(rows, ids[:, None], rows.new_ones(len(rows), 1))
    return found


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
