"""Train one architecture with several numbers of experts on the same data, and compare losses.

    python sizes.py --config sizes.yaml --data ../bundled/data --tokenizer ../bundled/model \
        --out /tmp/sizes

Every size sees the same batches in the same order; every token runs through as many experts, so
that all cost the same per token. The models are OLMoE, whose gates are shares of the softmax over
all experts: with one expert per token this is the Switch router. Interrupted training continues, as
in `variants.py`. At the end `losses.json` holds training losses and held-out losses per domain.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, OlmoeConfig

import model as architecture
from inspect_model import domain_streams
from outcome import kept, measured
from train import Files, Recipe, check_export, train

# What the bundled model and these have in common: vocabulary and positions.
_SHARED = (
    "vocab_size",
    "max_position_embeddings",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the config file says."""

    recipe: Recipe
    configs: Mapping[int, OlmoeConfig]


def make_config(experts: int, **fields: Any) -> OlmoeConfig:
    """An OLMoE with the bundled model's vocabulary; `fields` are keys of its config."""
    bundled = architecture.make_config()
    shared = {name: getattr(bundled, name) for name in _SHARED}
    return OlmoeConfig(**shared | fields | {"num_experts": experts, "norm_topk_prob": False})


def read_config(path: Path, **changes: Any) -> Comparison:
    """The recipe and one model config per size; `changes` replace entries of the recipe."""
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    configs = {experts: make_config(experts, **found["model"]) for experts in found["experts"]}
    return Comparison(Recipe(**{**found["recipe"], **changes}), configs)


def run_size(
    experts: int,
    comparison: Comparison,
    streams: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    folder: Path,
    files: Files,
) -> dict[str, Any]:
    """Train one size, or read what it gave; `streams` are those of training and held-out."""
    result = folder / "result.json"
    if (found := kept(result)) is not None:
        return found
    recipe, config = comparison.recipe, comparison.configs[experts]
    print(f"{experts} experts", flush=True)
    progress = train(streams[0], recipe, files, config)
    check_export(files.out, streams[0], recipe, config)
    model = AutoModelForCausalLM.from_pretrained(files.out).eval()
    return measured(model, progress, streams[1], recipe.sequence_length, result)


def parse_args(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description="Compare numbers of experts.")
    parser.add_argument("--config", type=Path, default=Path("sizes.yaml"))
    parser.add_argument("--data", type=Path, required=True, help="folder of the bundled parquet")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="instead of the config's")
    parser.add_argument("--seed", type=int, help="instead of the config's")
    parser.add_argument("--held-out-tokens", type=int, default=20_000, help="per domain")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(words)


def main() -> None:
    """Command line entry point."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    given = {"steps": args.steps, "seed": args.seed}
    changes = {name: value for name, value in given.items() if value is not None}
    comparison = read_config(args.config, **changes)
    held_out = domain_streams([args.data / "validation.parquet"], args.tokenizer)
    streams = (
        domain_streams([args.data / "calibration.parquet"], args.tokenizer),
        {name: ids[: args.held_out_tokens + 1] for name, ids in held_out.items()},
    )
    results = {}
    for experts in comparison.configs:
        folder = args.out / f"e{experts}"
        folder.mkdir(parents=True, exist_ok=True)
        files = Files(folder / "model", args.tokenizer, folder / "state.pt", args.save_every)
        results[experts] = run_size(experts, comparison, streams, folder, files)
    (args.out / "losses.json").write_text(json.dumps(results))
    print(json.dumps({name: found["held_out_perplexity"] for name, found in results.items()}))


if __name__ == "__main__":
    main()
