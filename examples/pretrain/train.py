"""Pretrain the small bundled mixture-of-experts model on a CPU.

    python train.py --corpus CORPUS --tokenizer CORPUS/tokenizer --held-out ../bundled/data \
        --out ../bundled/model --state train_state.pt

Deterministic for a given machine, thread count and set of library versions. Interrupted training
continues from `--state`; every batch depends on the seed and its step only, so the result is the
same as without the interruption.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

import model as architecture
from tokens import sample_batch, training_streams


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that determines the result besides the data."""

    steps: int
    per_domain: int
    sequence_length: int
    learning_rate: float
    warmup: int
    decay: float
    weight_decay: float
    balance: float
    seed: int


@dataclass(slots=True)
class Progress:
    """Where training stands; `seconds` is summed over restarts."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # cross-entropy of every step, in nats


@dataclass(frozen=True, slots=True)
class Files:
    """Where results go."""

    out: Path
    tokenizer: Path
    state: Path
    save_every: int


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, a plateau, and a linear decay to zero over the last `decay` of the steps.

    Unlike with a cosine, a run can still be made longer or shorter while it is on the plateau.
    """
    warm = (step + 1) / recipe.warmup
    cool = (recipe.steps - step) / (recipe.decay * recipe.steps)
    return recipe.learning_rate * min(1.0, warm, cool)


def make_optimizer(model: MixtralForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays matrices only: norms are scales, for which zero is no sensible prior."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)


def train_step(
    model: MixtralForCausalLM,
    optimizer: torch.optim.AdamW,
    batch: Tensor,
    recipe: Recipe,
    step: int,
) -> architecture.Losses:
    """One update."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(recipe, step)
    losses = architecture.compute_losses(model, batch)
    total = losses.cross_entropy + recipe.balance * losses.balance
    total.backward()  # type: ignore[no-untyped-call]  # torch does not type it
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return losses


def batch_at(streams: Mapping[str, Tensor], recipe: Recipe, step: int) -> Tensor:
    """Batch of a step [B, S + 1], from a generator of its own so that restarts need no state."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    return sample_batch(streams, recipe.per_domain, recipe.sequence_length + 1, generator)


def save_state(
    path: Path, model: MixtralForCausalLM, optimizer: torch.optim.AdamW, progress: Progress
) -> None:
    """Write the training state, replacing the old one only once the new one is complete."""
    partial = path.with_suffix(".partial")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state | {"progress": asdict(progress)}, partial)
    partial.replace(path)


def load_state(path: Path, model: MixtralForCausalLM, optimizer: torch.optim.AdamW) -> Progress:
    """Continue from a saved state if there is one."""
    if not path.exists():
        return Progress()
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return Progress(**state["progress"])


def export(model: MixtralForCausalLM, files: Files) -> None:
    """Write model and tokenizer as one folder that `from_pretrained` opens."""
    architecture.save(model, files.out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(files.tokenizer / name, files.out / name)


def train(
    streams: Mapping[str, Tensor], recipe: Recipe, files: Files, config: MixtralConfig
) -> Progress:
    """Train to the last step, saving state and model on the way."""
    model = architecture.build(config, recipe.seed)
    optimizer = make_optimizer(model, recipe)
    progress = load_state(files.state, model, optimizer)
    while progress.step < recipe.steps:
        began = time.perf_counter()
        batch = batch_at(streams, recipe, progress.step)
        losses = train_step(model, optimizer, batch, recipe, progress.step)
        progress.step += 1
        progress.tokens += batch[:, 1:].numel()
        progress.losses.append(losses.cross_entropy.item())
        progress.seconds += time.perf_counter() - began
        if progress.step % 20 == 0:
            log(progress, losses)
        if progress.step % files.save_every == 0 or progress.step == recipe.steps:
            save_state(files.state, model, optimizer, progress)
            export(model, files)
    return progress


def log(progress: Progress, losses: architecture.Losses) -> None:
    """Print one line."""
    print(
        f"step {progress.step} tokens {progress.tokens} seconds {progress.seconds:.0f} "
        f"loss {losses.cross_entropy.item():.4f} balance {losses.balance.item():.4f}",
        flush=True,
    )


def check_export(
    out: Path, streams: Mapping[str, Tensor], recipe: Recipe, config: MixtralConfig
) -> dict[str, float]:
    """Loss of one fresh batch by the training code and by the saved model in plain transformers."""
    batch = batch_at(streams, recipe, recipe.steps)
    reference = architecture.class_of(config).from_pretrained(out).eval()
    trained = architecture.build(config, recipe.seed)
    trained.load_state_dict(reference.state_dict())
    with torch.no_grad():
        fast = architecture.compute_losses(trained, batch).cross_entropy
        logits = reference(batch[:, :-1]).logits.float()
        plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    if abs(float(fast - plain)) > 0.01:
        raise RuntimeError(f"training forward gives {float(fast)}, transformers {float(plain)}")
    return {"loss_training_forward": float(fast), "loss_transformers": float(plain)}


def parse_args() -> argparse.Namespace:
    """Command line; the defaults are the recipe of the bundled model."""
    parser = argparse.ArgumentParser(description="Pretrain the bundled model.")
    parser.add_argument("--corpus", type=Path, required=True, help="has train/<domain>.parquet")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True, help="bundled data, left out")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True, help="file to continue from")
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--per-domain", type=int, default=4, help="windows per step and domain")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--decay", type=float, default=0.35, help="share of steps")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--balance", type=float, default=0.03, help="balance loss coefficient")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Command line entry point."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    recipe = Recipe(**{name: getattr(args, name) for name in Recipe.__dataclass_fields__})
    files = Files(args.out, args.tokenizer, args.state, args.save_every)
    streams = training_streams(args.corpus, args.tokenizer, args.held_out)
    print(json.dumps({"stream_tokens": {name: len(ids) for name, ids in streams.items()}}))
    config = architecture.make_config()
    progress = train(streams, recipe, files, config)
    check = check_export(args.out, streams, recipe, config)
    done = {name: value for name, value in asdict(progress).items() if name != "losses"}
    print(json.dumps(asdict(recipe) | done | check))


if __name__ == "__main__":
    main()
