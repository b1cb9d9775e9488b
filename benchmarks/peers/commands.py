"""Command lines of public implementations, from their own documentation; see README.md.

Nothing of them is part of this project. Each runs in its own checkout with its own Python, which
must have been installed as that project says. Without --run the command is printed.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """What is asked of a peer."""

    python: str
    model: Path
    out: Path
    experts: int  # per layer, of the original
    kept: int

    @property
    def removed(self) -> float:
        """Share of the experts that goes."""
        return 1 - self.kept / self.experts


@dataclass(frozen=True)
class Peer:
    """A public implementation; `command` is run in its checkout."""

    repository: str
    paper: str
    command: Callable[[Job], list[str]]


def reap(job: Job) -> list[str]:
    """Prunes; the checkpoint is written below `artifacts/` of the checkout."""
    return [
        *(job.python, "src/reap/prune.py"),
        *("--model-name", str(job.model), "--prune-method", "reap"),
        *("--compression-ratio", f"{job.removed:g}", "--do-eval", "false", "--seed", "42"),
    ]


def ream(job: Job) -> list[str]:
    """Merges; writes a smaller checkpoint to `out`."""
    words = [job.python, "merge.py", "--model", str(job.model)]
    return [*words, "--merge_size", str(job.kept), "--save_path", str(job.out)]


def hc_smoe(job: Job) -> list[str]:
    """Merges a Mixtral and evaluates it on tasks of its own, in one program."""
    return [
        *(job.python, "-m", "accelerate.commands.launch"),
        *("--config_file", "static/finetune_config.yaml", "hcsmoe/merging-mixtral.py"),
        *("--model_name", str(job.model), "--num_average_groups", str(job.kept)),
        *("--dominant", "no", "--similarity_base", "expert-output", "--cluster", "hirarchical"),
        *("--linkage", "average", "--merge", "fix-dom-same", "--ingredient", "act+weight"),
        *("--mode", "all", "--n_sentences", "32", "--start_layer", "0", "--task", "winogrande"),
        *("--output_path", str(job.out), "--result_path", str(job.out / "result.txt")),
    ]


PEERS = {
    "reap": Peer("github.com/CerebrasResearch/reap", "arXiv 2510.13999", reap),
    "ream": Peer("github.com/SamsungSAILMontreal/ream", "arXiv 2604.04356", ream),
    "hc_smoe": Peer("github.com/wazenmai/HC-SMoE", "arXiv 2410.08589", hc_smoe),
}


def main() -> None:
    """Prints a command, or runs it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", choices=sorted(PEERS), required=True)
    parser.add_argument("--checkout", type=Path, required=True, help="a clone of the repository")
    parser.add_argument("--python", default="python", help="the interpreter that has it installed")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--experts", type=int, required=True, help="per layer, of the original")
    parser.add_argument("--kept", type=int, required=True)
    parser.add_argument("--run", action="store_true")
    options = parser.parse_args()
    job = Job(
        options.python,
        options.model.absolute(),
        options.out.absolute(),
        options.experts,
        options.kept,
    )
    command = PEERS[options.peer].command(job)
    print(f"cd {shlex.quote(str(options.checkout))} && {shlex.join(command)}", flush=True)
    if options.run:
        subprocess.run(command, cwd=options.checkout, check=True)


if __name__ == "__main__":
    main()
