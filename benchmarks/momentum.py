"""SMoE against MomentumSMoE: trained on the same batches, clean and attacked, and compressed.

    python -m benchmarks.momentum --quick --out /tmp/momentum
    python -m benchmarks.momentum --out OUT

Training is that of `examples/pretrain/variants.py`, on the bundled calibration text; perplexities
are per word on the bundled held-out text. The same command goes on where it ended. `--quick` is one
seed of the released block for a few hundred steps of a very small model: it shows that everything
works and says nothing about which model is better.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from benchmarks.attack import attacked, perplexity_per_word

REPOSITORY = Path(__file__).resolve().parents[1]
BUNDLED = REPOSITORY / "examples" / "bundled"
PRETRAIN = REPOSITORY / "examples" / "pretrain"
RATES = (0.0, 0.025, 0.05, 0.1)
HEADLINE_RATE = 0.025
# Written in words that spaces separate.
DOMAINS = ("english_prose", "legal")
VARIANTS: dict[str, dict[str, Any]] = {
    "smoe": {"mu": 0.0},
    "momentum": {"mu": 0.7},
    "adam": {"momentum_kind": "adam"},
    "robust": {"momentum_kind": "robust"},
}
MODEL = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 16,
}


@dataclass(frozen=True)
class Cell:
    """One training: a block style, a depth and a seed."""

    style: str
    layers: int
    seed: int

    @property
    def name(self) -> str:
        """`post_ln-6-0`."""
        return f"{self.style}-{self.layers}-{self.seed}"


@dataclass(frozen=True)
class Setup:
    """What is trained and measured."""

    out: Path
    steps: int = 1000
    per_domain: int = 2
    length: int = 256
    styles: tuple[str, ...] = ("post_ln", "pre_ln")
    layers: tuple[int, ...] = (6, 3, 12)
    seeds: tuple[int, ...] = (0, 1, 2)
    variants: tuple[str, ...] = ("smoe", "momentum", "adam", "robust")
    splits: tuple[str, ...] = ("validation", "test")
    characters: int = 100_000  # of every domain and split
    threads: int = 2
    smaller: Mapping[str, int] | None = None

    @property
    def cells(self) -> Iterator[Cell]:
        """Those of the headline first."""
        return (Cell(*each) for each in product(self.styles, self.layers, self.seeds))


def quick(setup: Setup) -> Setup:
    """A few minutes on two cores."""
    small = {"hidden_size": 64, "intermediate_size": 64, "num_local_experts": 8}
    return replace(
        setup,
        steps=240,
        per_domain=1,
        length=128,
        styles=("post_ln",),
        layers=(6,),
        seeds=(0,),
        variants=("smoe", "momentum"),
        splits=("validation",),
        characters=20_000,
        smaller=small,
    )


def train(setup: Setup, cell: Cell) -> Path:
    """The folder with a model per variant; what is there is not trained again."""
    folder = setup.out / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    config = yaml.safe_load((PRETRAIN / "variants.yaml").read_text(encoding="utf-8"))
    config["recipe"] |= {
        "steps": setup.steps,
        "per_domain": setup.per_domain,
        "sequence_length": setup.length,
        "seed": cell.seed,
        "learning_rate": 1.5e-3 if cell.style == "post_ln" else 3e-3,
    }
    config["model"] |= MODEL | dict(setup.smaller or {})
    config["model"] |= {"block_style": cell.style, "num_hidden_layers": cell.layers}
    config["variants"] = {name: VARIANTS[name] for name in setup.variants}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    words = {
        "config": folder / "config.yaml",
        "data": BUNDLED / "data",
        "tokenizer": BUNDLED / "model",
        "out": folder,
        "threads": setup.threads,
        "held-out-tokens": 2_000,
    }
    given = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    subprocess.run(
        [sys.executable, "variants.py", *given], cwd=PRETRAIN, check=True, stdout=sys.stderr
    )
    return folder


def perplexities(setup: Setup, model_folder: Path) -> dict[str, dict[str, float]]:
    """Split -> rate in percent -> perplexity per word of one model."""
    from transformers import AutoTokenizer

    from stages.model import load_model

    model = load_model(model_folder, "float32")
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "model")
    found: dict[str, dict[str, float]] = {}
    for split in setup.splits:
        texts = held_out(split, setup.characters)
        found[split] = {
            f"{100 * rate:g}": perplexity_per_word(
                model, tokenizer, [attacked(text, rate, i) for i, text in enumerate(texts)], 128
            )
            for rate in RATES
        }
    return found


def held_out(split: str, characters: int) -> list[str]:
    """Whole documents of every domain, up to so many characters each."""
    import pyarrow.parquet as pq

    table = pq.read_table(BUNDLED / "data" / f"{split}.parquet").to_pydict()
    found = []
    for domain in DOMAINS:
        left = characters
        for text, name in zip(table["text"], table["domain"], strict=True):
            if name == domain and left > 0:
                found.append(text[:left])
                left -= len(text)
    return found


def mu0_bit_equal() -> bool:
    """The bundled Mixtral opened as a momentum model with mu = 0 gives the same bits."""
    import torch
    from transformers import AutoModelForCausalLM

    from models.momentum.configuration_momentum import MomentumConfig
    from models.momentum.modeling_momentum import MomentumForCausalLM

    config = MomentumConfig.from_pretrained(BUNDLED / "model", mu=0.0, gamma=1.0)
    ours = MomentumForCausalLM.from_pretrained(BUNDLED / "model", config=config).eval()
    plain = AutoModelForCausalLM.from_pretrained(BUNDLED / "model").eval()
    ids = torch.arange(256).reshape(2, 128)
    with torch.inference_mode():
        return ours(input_ids=ids).logits.equal(plain(input_ids=ids).logits)


def compressed_opens(model: Path, folder: Path) -> bool:
    """A run that halves the experts ends in a folder whose logits are finite."""
    import torch

    from orchestrator.load import validate
    from orchestrator.preflight import prepare
    from orchestrator.run import run
    from orchestrator.run_folder import MAIN
    from stages.model import load_model

    source = {"path": str(BUNDLED / "data" / "calibration.parquet")}
    job = prepare(
        validate(
            {
                "run_dir": str(folder),
                "model": {"path": str(model)},
                "calibrate": {"data": {"sources": [source], "tokens": 4096}, "shards": 1},
                "group": {"method": "mc_smoe", "budget": {"keep_ratio": 0.5}},
                "executor": {"kind": "local"},
            }
        )
    )
    run(job)
    opened = load_model(job.folder.output(MAIN), "float32")
    with torch.inference_mode():
        return bool(opened(input_ids=torch.arange(32)[None]).logits.isfinite().all())


def measure(setup: Setup) -> dict[str, Any]:
    """Everything that the command prints."""
    cells = []
    for cell in setup.cells:
        folder = train(setup, cell)
        trained = {name: perplexities(setup, folder / name / "model") for name in setup.variants}
        cells.append(asdict(cell) | {"perplexity_per_word": trained})
        (setup.out / "cells.json").write_text(json.dumps(cells, indent=1))
    first = next(iter(setup.cells))
    model = setup.out / first.name / "momentum" / "model"
    return {
        "mu0_bit_equal": mu0_bit_equal(),
        **headline(cells, first, setup.splits[0]),
        "compressed_opens": compressed_opens(model, setup.out / "run"),
        "steps": setup.steps,
        "cells": cells,
    }


def headline(cells: Sequence[Mapping[str, Any]], first: Cell, split: str) -> dict[str, float]:
    """Means over the seeds of the first style and depth."""
    alike = [c for c in cells if (c["style"], c["layers"]) == (first.style, first.layers)]
    found = {}
    for kind, rate in (("clean", 0.0), ("attacked", HEADLINE_RATE)):
        for name in ("smoe", "momentum"):
            values = [c["perplexity_per_word"][name][split][f"{100 * rate:g}"] for c in alike]
            found[f"{kind}_ppl_{name}"] = sum(values) / len(values)
    return found


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description="SMoE against MomentumSMoE.")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="of training, instead of 1000 or 240")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    setup = Setup(args.out.resolve(), threads=args.threads)
    setup = quick(setup) if args.quick else setup
    print(json.dumps(measure(replace(setup, steps=args.steps or setup.steps))))


if __name__ == "__main__":
    main()
