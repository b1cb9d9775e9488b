"""The most memory that a rank of the recovery has, by ZeRO stage.

A random Mixtral of half a gigabyte (10 layers, fp32) is trained for two steps by two gloo ranks on
this machine, from opening it to the last file written, a state in between. What counts is anonymous
memory above that of a process that has imported everything, and of the rank that had most: up to
the first step (`open_bytes`) and at all (`peak_bytes`). With --before a checkout of another version
is measured by the same commands beside this one. What is in --out is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.output import show
from benchmarks.pages import between
from models.atomic import write_json
from orchestrator.run_folder import versions

MARKS = ("<!-- recover memory: begin -->\n", "<!-- recover memory: end -->\n")
HERE = Path(__file__).resolve().parents[1]
RANKS, VOCABULARY, SEED = 2, 1024, 0
CASES: dict[str, dict[str, Any]] = {
    "ZeRO 3, fp32": {"deepspeed": {"zero_stage": 3}},
    "ZeRO 2, bf16": {"deepspeed": {"zero_stage": 2, "bf16": True}},
    "ZeRO 1, fp32": {"deepspeed": {"zero_stage": 1}},
    "ZeRO 3, no layer passing twice": {
        "deepspeed": {"zero_stage": 3},
        "gradient_checkpointing": False,
    },
}


def make(work: Path) -> tuple[Path, Path]:
    """The checkpoint and the text, once."""
    import pyarrow as pa
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    from models.arrow import write_table

    student, corpus = work / "student", work / "tokens.arrow"
    if not (student / "config.json").exists():
        torch.manual_seed(SEED)
        config = MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=512,
            intermediate_size=1024,
            num_hidden_layers=10,
            num_attention_heads=8,
            num_key_value_heads=4,
            num_local_experts=8,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )
        MixtralForCausalLM(config).save_pretrained(student)
    if not corpus.exists():
        ids = torch.randint(1, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(SEED))
        rows = pa.array(ids.tolist(), pa.list_(pa.int32()))
        write_table(corpus, pa.table({"domain": ["text"] * len(ids), "tokens": rows}))
    return student, corpus


def measure(work: Path, checkout: Path, section: dict[str, Any]) -> dict[str, int]:
    """Bytes of the rank that had most, up to the first step and at all."""
    student, corpus = make(work)
    folder = work / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    config = {"mode": "full", "steps": 2, "warmup": 1, "batch": 2, "micro_batch": 1, "alpha": 0}
    job = {
        "student": str(student),
        "corpus": str(corpus),
        "config": config | {"ranks": RANKS} | section,
    }
    path = folder / "job.json"
    write_json(path, job)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, str(HERE / "benchmarks" / "recover_memory_rank.py"), str(path)]
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "OMP_NUM_THREADS": "1",
        # Freed tensors are given back at once, as those above 32 MB always are: here many are less.
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    }
    started = [
        subprocess.Popen([*command, str(rank), str(port)], cwd=checkout, env=environment)
        for rank in range(RANKS)
    ]
    codes = [each.wait() for each in started]
    if any(codes):
        raise SystemExit("a rank failed")
    found = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]
    shutil.rmtree(folder)
    return {name: max(each[name] for each in found) for name in found[0]}


def page_text(results: dict[str, Any]) -> str:
    """What docs/recover.md says of the results."""
    rows, size = (
        {(r["version"], r["case"]): r for r in results["rows"]},
        results["checkpoint_bytes"],
    )

    def times(version: str, case: str) -> str:
        return " and ".join(
            f"{rows[version, case][name] / size:.1f}" for name in ("open_bytes", "peak_bytes")
        )

    def said_of(case: str) -> str:
        before = f" (before {times('before', case)})" if ("before", case) in rows else ""
        return f"{case}: {times('now', case)}{before}"

    said = [said_of(case) for case in CASES if ("now", case) in rows]
    return "\n".join(
        [
            f"Memory of a rank of {results['ranks']}, over the {size / 1e6:.0f} MB of a random"
            " Mixtral with 10 layers in fp32, before the first step and",
            f"at the worst moment: {'; '.join(said)}.",
            "From [results/recover_memory.json](results/recover_memory.json), by `python -m"
            " benchmarks.recover_memory --work WORK",
            "--before CHECKOUT --out docs/results/recover_memory.json --page docs/recover.md`;"
            " before: every rank opened it whole in fp32.",
        ]
    )


def main() -> None:
    """Measures every case; those in --out are kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--before", type=Path, help="checkout of another version")
    parser.add_argument("--page", type=Path, help="write the sentences into this page")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    student, _ = make(options.work)
    size = sum(path.stat().st_size for path in student.glob("*.safetensors"))
    results: dict[str, Any] = {"rows": []}
    if options.out.exists():
        results = json.loads(options.out.read_text())
    results |= {"checkpoint_bytes": size, "ranks": RANKS, "seed": SEED, "versions": versions()}
    known = {(row["version"], row["case"]) for row in results["rows"]}
    checkouts = {"now": HERE} | ({"before": options.before.resolve()} if options.before else {})
    for case, section in CASES.items():
        for version, checkout in sorted(checkouts.items()):
            # The older version knows no other section.
            if (version, case) in known or (version == "before" and len(section) > 1):
                continue
            found = measure(options.work, checkout, section)
            results["rows"].append({"version": version, "case": case, **found})
            write_json(options.out, results)
    show("recover_memory", results["rows"], checkpoint_bytes=size)
    if options.page is not None:
        page = between(options.page.read_text(), MARKS, page_text(results))
        options.page.write_text(page)


if __name__ == "__main__":
    main()
