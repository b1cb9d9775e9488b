"""Checkpoints of any program, measured on one text by the evaluate stage of a run.

The original goes first; every other folder is compared with what it said. A folder counts if plain
transformers opens it without code of its own and finds every weight; else it is refused.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.output import show
from models.atomic import file_digest, write_json
from models.errors import CheckpointError
from orchestrator.run_folder import versions
from stages.corpus import stage as corpus
from stages.corpus.config import CorpusConfig, Source
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.stage import ORIGINAL, EvaluateUnit, make_worker, reduce
from stages.unit import execute


def measure(
    original: Path, checkpoints: Mapping[str, Path], data: CorpusConfig, work: Path
) -> dict[str, Any]:
    """Perplexity and KL of every checkpoint by domain, and its bytes.

    Args:
        original: folder with the tokenizer that cuts the text.
        checkpoints: name -> folder.
        work: where blocks and numbers are kept; the same call goes on where it ended.

    Raises:
        CheckpointError: a checkpoint lacks weights.
    """
    config = EvaluateConfig(data=data)
    text = corpus.CorpusUnit("corpus", data, original, work / "tokens.arrow")
    execute(text, corpus.run_one)
    run = make_worker()
    found = {}
    for name, folder in {ORIGINAL: original, **checkpoints}.items():
        check_complete(folder)
        units = [
            _unit(name, folder, domain, text, config, work)
            for domain in corpus.block_domains(text.output)
        ]
        numbers = reduce({unit.domain: run(unit).result for unit in units})
        found[name] = numbers | {"bytes": weight_bytes(folder)}
    return found


def check_complete(folder: Path) -> None:
    """Refuses a folder that transformers fills up with random weights.

    Raises:
        CheckpointError: the first of the weights that are missing or of another shape.
    """
    from transformers import AutoModelForCausalLM

    _, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", local_files_only=True, output_loading_info=True
    )
    lacking = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lacking:
        raise CheckpointError(
            f"{folder} lacks {len(lacking)} weights, first {lacking[0]}",
            "convert it to a folder that `from_pretrained` opens unmodified",
        )


def weight_bytes(folder: Path) -> int:
    """All safetensors files of a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def rows(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per checkpoint; `rise` is the mean over domains in nats per token."""
    base = found[ORIGINAL]["perplexity"]["overall"]
    return [
        {
            "checkpoint": name,
            "bytes": each["bytes"],
            "perplexity": each["perplexity"]["overall"],
            "rise": math.log(each["perplexity"]["overall"] / base),
            "kl": each.get("kl", {}).get("overall", 0.0),
        }
        for name, each in found.items()
    ]


def _unit(
    name: str,
    folder: Path,
    domain: str,
    text: corpus.CorpusUnit,
    config: EvaluateConfig,
    work: Path,
) -> EvaluateUnit:
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    inputs = {path.name: file_digest(path) for path in files}
    inputs |= {"corpus": file_digest(text.output)}
    return EvaluateUnit(
        variant=name,
        domain=domain,
        model=folder,
        needs_code=False,
        corpus=text.output,
        config=config,
        folder=work / "evaluation",
        inputs=tuple(sorted(inputs.items())),
    )


def named(words: Sequence[str]) -> dict[str, Path]:
    """`NAME=FOLDER` each.

    Raises:
        ValueError: not of that form, or a name twice.
    """
    pairs = [word.partition("=") for word in words]
    wrong = [name for name, mark, folder in pairs if not (name and mark and folder)]
    if wrong or len({name for name, _, _ in pairs} | {ORIGINAL}) <= len(pairs):
        raise ValueError("give every checkpoint as NAME=FOLDER, each name once, none `original`")
    return {name: Path(folder).absolute() for name, _, folder in pairs}


def main() -> None:
    """Prints a row per checkpoint; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--original", type=Path, required=True)
    parser.add_argument("--data", required=True, help="file with the columns text and domain")
    parser.add_argument("--tokens", type=int, default=10_240)
    parser.add_argument("--length", type=int, default=256, help="tokens per block")
    parser.add_argument("--out", type=Path, help="where numbers are kept and peers.json is written")
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=FOLDER")
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = Source(path=str(Path(options.data).absolute()), domain_column="domain")
    data = CorpusConfig(sources=(source,), tokens=options.tokens, sequence_length=options.length)
    with tempfile.TemporaryDirectory() as scratch:
        work = (options.out or Path(scratch)).absolute()
        found = measure(options.original.absolute(), named(options.checkpoints), data, work)
        write_json(work / "peers.json", {"versions": versions(), "checkpoints": found})
    show("checkpoints of several programs", rows(found))


if __name__ == "__main__":
    main()
