"""Expert parallelism: the experts of every layer are dealt out to N ranks, tokens travel to them.

Around the family's own experts module, nothing else: the router stays the model's, there is no
capacity, and no token is dropped or padded. Rank r of N holds experts r*E/N to (r+1)*E/N - 1.
All ranks must run the same number of forward passes: a rank that is alone in one waits for ever.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from cluster.errors import LostPeer

# Longest silence of a peer that is alive: it may be loading a model.
PATIENCE = timedelta(minutes=30)


@dataclass(frozen=True)
class Place:
    """Where one process stands in its replica, and where rank 0 listens."""

    rank: int
    size: int
    host: str
    port: int


@dataclass(frozen=True)
class ExpertGroup:
    """The ranks of one replica, seen from one of them."""

    rank: int
    size: int
    handle: Any  # the process group

    def owned(self, num_experts: int) -> range:
        """Experts of this rank; E must be a multiple of N."""
        assert num_experts % self.size == 0, (num_experts, self.size)
        share = num_experts // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def agree(self, word: bool) -> bool:
        """Every rank gets the word of rank 0."""
        import deepspeed.comm as dist

        said = torch.tensor([int(word)], device=_device())
        with _reached():
            dist.broadcast(said, src=0, group=self.handle)
        return bool(said.item())

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks in rank order, on rank 0; an empty list on the others."""
        import torch.distributed

        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        with _reached():
            torch.distributed.gather_object(value, found, dst=0, group=self.handle)
        return found or []


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
    with _reached():
        deepspeed.init_distributed(
            dist_backend="nccl" if torch.cuda.is_available() else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=PATIENCE,
        )
        groups._create_expert_and_data_parallel(place.size)
    handle = groups._get_expert_parallel_group(f"ep_size_{place.size}")
    return ExpertGroup(place.rank, place.size, handle)


def switch_off_shm_op() -> None:
    """Keeps DeepSpeed from compiling its shared-memory all-reduce when a CPU group is formed.

    It needs a C++ compiler, takes up to minutes, and nothing here reduces. The table of ops that
    work on this machine is DeepSpeed's own but no documented switch; a test holds that it works.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class ExpertParallel(nn.Module):
    """Stands where the experts module stood, with the same call; every rank calls it together."""

    def __init__(self, local: nn.Module, num_experts: int, group: ExpertGroup) -> None:
        """`local` answers for `group.owned(num_experts)`, counted from zero."""
        super().__init__()
        self.local = local
        self._num_experts = num_experts
        self._group = group

    def forward(self, hidden: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        """Weighted sum over the selected experts.

        Args:
            hidden: `[T, H]`; T may differ between ranks.
            ids: `[T, k]` experts, 0 to E-1.
            gates: `[T, k]` their weights.

        Returns:
            `[T, H]` in the type of `hidden`.
        """
        outputs = exchange(self.local, hidden, ids, self._num_experts, self._group)
        combined: Tensor = (outputs * gates.unsqueeze(-1)).sum(dim=1)
        return combined.to(hidden.dtype)


def exchange(
    local: nn.Module, hidden: Tensor, ids: Tensor, num_experts: int, group: ExpertGroup
) -> Tensor:
    """Sends every (token, expert) pair to the owner of the expert, and the output back.

    Args:
        local: experts module of the owned experts, called with k = 1 and unit weights.
        hidden: `[T, H]`.
        ids: `[T, k]`.

    Returns:
        `[T, k, H]`: the unweighted output of every selected expert.
    """
    share = num_experts // group.size
    # Pairs in the order of their expert, so that each owner's lie together; stable, so that an
    # owner sees one rank's tokens in their own order.
    order = torch.argsort(ids.reshape(-1), stable=True)
    sent = torch.bincount(ids.reshape(-1), minlength=num_experts)  # [E] pairs per expert
    received = _all_to_all(sent, [share] * group.size, [share] * group.size, group)  # [N * E/N]
    outgoing = sent.view(group.size, share).sum(dim=1).tolist()
    incoming = received.view(group.size, share).sum(dim=1).tolist()
    arrived = _all_to_all(hidden[order // ids.shape[1]], outgoing, incoming, group)  # [R, H]
    here = torch.arange(share, device=ids.device).repeat(group.size).repeat_interleave(received)
    # grouped_mm refuses an empty batch.
    answers = (
        local(arrived, here[:, None], arrived.new_ones(len(here), 1)) if len(here) else arrived
    )
    returned = _all_to_all(answers, incoming, outgoing, group)  # [T * k, H]
    outputs = torch.empty_like(returned)
    outputs[order] = returned
    return outputs.view(*ids.shape, hidden.shape[-1])


def _all_to_all(
    rows: Tensor, outgoing: list[int], incoming: list[int], group: ExpertGroup
) -> Tensor:
    """Rows to the ranks, `outgoing[r]` of them to rank r; returns what came, in rank order."""
    import deepspeed.comm as dist

    found = rows.new_empty(sum(incoming), *rows.shape[1:])
    with _reached():
        dist.all_to_all_single(
            found,
            rows.contiguous(),
            output_split_sizes=incoming,
            input_split_sizes=outgoing,
            group=group.handle,
        )
    return found


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def _reached() -> Iterator[None]:
    """torch reports a dead peer as whatever RuntimeError its backend has for it."""
    try:
        yield
    except RuntimeError as error:
        raise LostPeer(f"a rank does not answer: {' '.join(str(error).split())}") from error
