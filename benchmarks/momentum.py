"""SMoE against MomentumSMoE: trained on the same batches, clean and attacked, and compressed.

    python -m benchmarks.momentum --quick --out /tmp/momentum
    python -m benchmarks.momentum --out OUT --workers 2 --results docs/results/momentum.json
    python -m benchmarks.momentum_table docs/results/momentum.json --page docs/momentum.md

Models are small enough to be trained in seconds per hundred steps and learn one domain of the
bundled text with a tokenizer of its own; perplexities are per word, and per token, of held-out text
of that domain. Every model is a cell with a JSON file: the same command goes on where it ended.
`--quick` is one seed of six layers of the released block: it shows that everything works.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.momentum_cell import Cell, Place, Size, result_file, run
from benchmarks.momentum_text import BUNDLED, counted, save_tokenizer

HEADLINE_RATE = "2.5"
PAIR = ("smoe", "momentum")
OTHERS = ("adam", "robust")
# The same for all variants, styles and depths; what others give is measured at the end.
LEARNING_RATE = 3e-3
OTHER_RATES = (1.5e-3, 6e-3)
WHOLE = Size(steps=300, windows=8, length=64, characters=24_000)


@dataclass(frozen=True)
class Setup:
    """What is trained and measured."""

    out: Path
    size: Size = WHOLE
    styles: tuple[str, ...] = ("post_ln", "pre_ln")
    layers: tuple[int, ...] = (6, 3, 12)
    seeds: tuple[int, ...] = (0, 1, 2)
    others: tuple[str, ...] = OTHERS
    rates: tuple[float, ...] = OTHER_RATES
    workers: int = 1
    finished: bool = False  # nothing more is trained

    @property
    def cells(self) -> list[Cell]:
        """First all seeds of the first depth, then a seed of everything else, then the rest."""
        found = list(self._of(self.seeds, self.layers[:1], PAIR))
        for seed in self.seeds:
            found += self._of((seed,), self.layers[1:], PAIR)
            found += self._of((seed,), self.layers[:1], self.others)
        for rate in self.rates:
            found += self._of(self.seeds[:1], self.layers[:1], PAIR, rate)
        return found

    def _of(
        self,
        seeds: Sequence[int],
        layers: Sequence[int],
        variants: Sequence[str],
        rate: float = LEARNING_RATE,
    ) -> Iterator[Cell]:
        for seed, depth, style, variant in product(seeds, layers, self.styles, variants):
            yield Cell(style, depth, seed, variant, rate)


def quick(setup: Setup) -> Setup:
    """Two of the cells, on less held-out text: two to three minutes on an idle machine."""
    size = replace(setup.size, characters=10_000, splits=("validation",))
    return replace(
        setup, size=size, styles=("post_ln",), layers=(6,), seeds=(0,), others=(), rates=()
    )


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
        return torch.equal(ours(input_ids=ids).logits, plain(input_ids=ids).logits)


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


def trained(setup: Setup) -> list[dict[str, Any]]:
    """The figures of all cells, in their order."""
    place = Place(setup.out)
    if not (place.tokenizer / "tokenizer.json").exists():
        save_tokenizer(place.tokenizer)
    cells = setup.cells
    if setup.finished:
        cells = [cell for cell in cells if result_file(cell, place).exists()]
    if setup.workers > 1:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(setup.workers, context, _one_thread) as pool:
            waiting = {pool.submit(run, cell, setup.size, place): cell for cell in cells}
            for number, done in enumerate(as_completed(waiting), 1):
                done.result()
                print(f"{number} of {len(waiting)}: {waiting[done].name}", flush=True)
    return [run(cell, setup.size, place) for cell in cells]


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def measure(setup: Setup) -> dict[str, Any]:
    """Everything that the command prints."""
    from transformers import AutoTokenizer

    cells = trained(setup)
    first = next(cell for cell in setup.cells if cell.variant == "momentum")
    place, size = Place(setup.out), setup.size
    tokenizer = AutoTokenizer.from_pretrained(place.tokenizer)
    return {
        "mu0_bit_equal": mu0_bit_equal(),
        **headline(cells, first, size.splits[0]),
        "compressed_opens": compressed_opens(place.model(first), setup.out / "run"),
        "learning_rate": LEARNING_RATE,
        "planned": len(setup.cells),
        "setup": asdict(setup) | {"out": None, "workers": None},
        "machine": machine(),
        "counted": {each: counted(tokenizer, each, size.characters) for each in size.splits},
        "cells": cells,
    }


def machine() -> dict[str, str]:
    """What the numbers may hang on."""
    import torch
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "processor": platform.machine(),
    }


def headline(cells: Sequence[Mapping[str, Any]], first: Cell, split: str) -> dict[str, float]:
    """Perplexity per word, mean over the seeds of the first style and depth."""
    same = ("style", "layers", "learning_rate")
    alike = [c for c in cells if all(c[name] == getattr(first, name) for name in same)]
    found = {}
    for kind, rate in (("clean", "0"), ("attacked", HEADLINE_RATE)):
        for name in PAIR:
            some = [c["text"][split][rate] for c in alike if c["variant"] == name]
            found[f"{kind}_ppl_{name}"] = mean(each["perplexity_per_word"] for each in some)
    return found


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description="SMoE against MomentumSMoE.")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, required=True, help="models and figures of all cells")
    parser.add_argument("--steps", type=int, help="of training, instead of 300")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument(
        "--finished", action="store_true", help="train nothing more: report the cells that are done"
    )
    parser.add_argument("--results", type=Path, help="a file for what is printed")
    args = parser.parse_args()
    _one_thread()
    setup = Setup(args.out.resolve(), workers=args.workers, finished=args.finished)
    setup = quick(setup) if args.quick else setup
    size = replace(setup.size, steps=args.steps or setup.size.steps)
    found = json.dumps(measure(replace(setup, size=size)))
    if args.results is not None:
        args.results.write_text(found + "\n")
    print(found)


if __name__ == "__main__":
    main()
