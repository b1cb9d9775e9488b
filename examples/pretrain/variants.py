"""Train SMoE and MomentumSMoE variants on the same data and compare their losses.

    python variants.py --config variants.yaml --data ../bundled/data \
        --tokenizer ../bundled/model --out /tmp/variants

Every variant starts from the same seed and sees the same batches in the same order; what differs is
the `variants` section of the config. Interrupted training continues: variants that are done are
read, the one in progress goes on from its state. At the end `losses.json` holds training losses and
held-out perplexities, and `losses.png` shows them.

`--ranks 2` trains on two processes with DeepSpeed: each takes half of every batch (`parallel.py`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure
from torch import Tensor

import model as architecture
import parallel
from inspect_model import domain_streams
from models.momentum.configuration_momentum import MomentumConfig
from models.momentum.modeling_momentum import MomentumForCausalLM
from outcome import kept, measured
from train import Files, Progress, Recipe, check_export, train

SMOOTHED = 20
Train = Callable[[Mapping[str, Tensor], Recipe, Files, MomentumConfig], Progress]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the config file says."""

    recipe: Recipe
    configs: Mapping[str, MomentumConfig]


def read_config(path: Path, **changes: Any) -> Comparison:
    """The recipe and one model config per variant; `changes` replace entries of the recipe."""
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe = {**found["recipe"], **changes}
    configs = {
        name: architecture.make_momentum_config(**(found.get("model") or {}), **fields)
        for name, fields in found["variants"].items()
    }
    return Comparison(Recipe(**recipe), configs)


def run_variant(
    name: str,
    comparison: Comparison,
    streams: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    files: Files,
    train_it: Train,
    *,
    leads: bool = True,
) -> dict[str, Any]:
    """Train one variant, or read what it gave; `streams` are those of training and held-out.

    Of several ranks only the one that `leads` looks at the result; the others' is empty.
    """
    result = files.out.parent / "result.json"
    if (found := kept(result)) is not None:
        return found
    recipe, config = comparison.recipe, comparison.configs[name]
    if leads:
        print(f"variant {name}", flush=True)
    progress = train_it(streams[0], recipe, files, config)
    if not leads:
        return {}
    check_export(files.out, streams[0], recipe, config)
    model = MomentumForCausalLM.from_pretrained(files.out).eval()
    return measured(model, progress, streams[1], recipe.sequence_length, result)


def draw(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Training losses, each a mean over `SMOOTHED` steps."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, result in results.items():
        losses = torch.tensor(result["losses"])
        means = losses[: len(losses) // SMOOTHED * SMOOTHED].view(-1, SMOOTHED).mean(1)
        steps = SMOOTHED * torch.arange(1, len(means) + 1)
        label = f"{name}, held-out perplexity {result['held_out_perplexity']:.1f}"
        axes.plot(steps.numpy(), means.numpy(), label=label)
    axes.set_xlabel("step")
    axes.set_ylabel(f"training loss, nats per token, mean of {SMOOTHED} steps")
    axes.legend()
    figure.savefig(path, dpi=120)


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description="Compare SMoE and MomentumSMoE variants.")
    parser.add_argument("--config", type=Path, default=Path("variants.yaml"))
    parser.add_argument("--data", type=Path, required=True, help="folder of the bundled parquet")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="instead of the config's")
    parser.add_argument("--seed", type=int, help="instead of the config's")
    parser.add_argument("--held-out-tokens", type=int, default=20_000, help="per domain")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2, help="of every rank")
    parser.add_argument("--ranks", type=int, default=1, help="processes that share each batch")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)  # set by parallel.launch
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Command line entry point."""
    args = parse_args()
    if args.ranks > 1 and args.rank is None:
        sys.exit(parallel.launch(sys.argv, args.ranks))
    torch.set_num_threads(args.threads)
    train_it: Train = train
    if args.rank is not None:
        parallel.enter(args.rank, args.ranks, args.port)
        train_it = partial(parallel.train, rank=args.rank, ranks=args.ranks)
    results = compare(args, train_it, leads=not args.rank)
    if not args.rank:
        (args.out / "losses.json").write_text(json.dumps(results))
        draw(results, args.out / "losses.png")
        shown = {name: found["held_out_perplexity"] for name, found in results.items()}
        print(json.dumps(shown))


def compare(args: argparse.Namespace, train_it: Train, *, leads: bool) -> dict[str, dict[str, Any]]:
    """Variant -> what it gave."""
    given = {"steps": args.steps, "seed": args.seed}
    changes = {name: value for name, value in given.items() if value is not None}
    comparison = read_config(args.config, **changes)
    held_out = domain_streams([args.data / "validation.parquet"], args.tokenizer)
    streams = (
        domain_streams([args.data / "calibration.parquet"], args.tokenizer),
        {name: ids[: args.held_out_tokens + 1] for name, ids in held_out.items()},
    )
    results = {}
    for name in comparison.configs:
        (args.out / name).mkdir(parents=True, exist_ok=True)
        state = args.out / name / "state.pt"
        files = Files(args.out / name / "model", args.tokenizer, state, args.save_every)
        results[name] = run_variant(name, comparison, streams, files, train_it, leads=leads)
    return results


if __name__ == "__main__":
    main()
