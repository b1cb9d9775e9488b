"""Training on several ranks with DeepSpeed: every rank a share of each batch, gradients averaged.

The batch of a step, its order and its seed are those of one rank; rank r of n takes every n-th row
from row r on. The balance loss counts the selections of all ranks, so that the loss is that of the
whole batch, but for rounding. Ranks are processes of this machine that talk by gloo; states are
written by rank 0 and are those of `train.py`: any number of ranks goes on from them.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MixtralConfig

import model as architecture
from cluster.expert_parallel import Place, join
from train import (
    Files,
    Progress,
    Recipe,
    batch_at,
    export,
    learning_rate,
    load_state,
    log,
    make_optimizer,
    save_state,
)


class Objective(nn.Module):
    """What is differentiated: cross-entropy and balance loss of a share of a batch."""

    def __init__(self, model: Any, balance: float) -> None:
        super().__init__()
        self.model, self.balance = model, balance

    def forward(self, tokens: Tensor) -> tuple[Tensor, architecture.Losses]:
        """Of windows [B, S + 1]: the sum, and both losses."""
        losses = architecture.compute_losses(self.model, tokens, averaged)
        return losses.cross_entropy + self.balance * losses.balance, losses


def averaged(values: Tensor) -> Tensor:
    """The mean over all ranks, outside of any gradient; the same bits on every rank."""
    import deepspeed.comm as dist

    found = values.detach().double()
    dist.all_reduce(found)
    return (found / dist.get_world_size()).to(values.dtype)


def train(
    streams: Mapping[str, Tensor],
    recipe: Recipe,
    files: Files,
    config: MixtralConfig,
    rank: int,
    ranks: int,
) -> Progress:
    """As `train.train`, on this rank's rows of every batch; all ranks call it together.

    Raises:
        ValueError: a batch cannot be dealt out evenly.
    """
    rows = recipe.per_domain * len(streams)
    if rows % ranks:
        raise ValueError(f"{rows} windows per step cannot be dealt out to {ranks} ranks evenly")
    model = architecture.build(config, recipe.seed)
    optimizer = make_optimizer(model, recipe)
    progress = load_state(files.state, model, optimizer)
    engine = _engine(Objective(model, recipe.balance), optimizer, rows // ranks)
    while progress.step < recipe.steps:
        began = time.perf_counter()
        batch = batch_at(streams, recipe, progress.step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, progress.step)
        total, losses = engine(batch[rank::ranks])
        engine.backward(total)
        engine.step()
        progress.step += 1
        progress.tokens += batch[:, 1:].numel()
        progress.losses.append(float(averaged(losses.cross_entropy)))
        progress.seconds += time.perf_counter() - began
        if rank == 0 and progress.step % 20 == 0:
            log(progress, losses)
        if progress.step % files.save_every == 0 or progress.step == recipe.steps:
            _keep(model, optimizer, progress, files, rank)
    return progress


def _engine(objective: Objective, optimizer: torch.optim.Optimizer, rows: int) -> Any:
    """Averages gradients, clips their norm to 1 as `train.train_step` does, and steps."""
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=objective,
        optimizer=optimizer,
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": rows,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 1.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 0},
            "steps_per_print": sys.maxsize,
        },
    )
    return engine


def _keep(model: Any, optimizer: Any, progress: Progress, files: Files, rank: int) -> None:
    """No rank goes on, or reads what is written, before rank 0 has written it."""
    import deepspeed.comm as dist

    if rank == 0:
        save_state(files.state, model, optimizer, progress)
        export(model, files)
    dist.barrier()


def enter(rank: int, ranks: int, port: int) -> None:
    """Makes this process one of the ranks."""
    join(Place(rank=rank, size=ranks, host="127.0.0.1", port=port))


def launch(words: Sequence[str], ranks: int) -> int:
    """Runs a command once per rank, with `--rank` and `--port` added; the worst of exit codes.

    When one rank fails the others are ended: alone they would wait for it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen([sys.executable, *words, "--rank", str(rank), "--port", str(port)])
        for rank in range(ranks)
    ]
    try:
        while all(each.poll() in (None, 0) for each in started):
            if all(each.poll() == 0 for each in started):
                return 0
            time.sleep(0.2)
        return next(code for each in started if (code := each.poll()) not in (None, 0))
    finally:
        for each in started:
            each.kill()
            each.wait()
