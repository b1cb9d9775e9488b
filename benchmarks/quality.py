"""Quality per byte without recovery: every method at 75, 50 and 25 % of the experts.

One observation serves all of them: the first run calibrates, the others reuse its statistics.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.output import show, wants_quick
from orchestrator.load import load
from orchestrator.preflight import prepare
from orchestrator.run import run

VARIANTS: dict[str, list[str]] = {
    "mc_smoe uniform, native": [],
    "mc_smoe uniform, native, no alignment": ["align.enabled=false"],
    "mc_smoe uniform, mapped": ["export.format=mapped"],
    "mc_smoe global, mapped": ["export.format=mapped", "group.scope=global"],
    "frequency (prune)": ["group.method=frequency"],
    "reap (prune)": ["group.method=reap"],
}


def measure(root: Path, name: str, ratio: float, tokens: int, reuse: Path | None) -> dict[str, Any]:
    """Runs one cell in this process and reads its report."""
    words = [f"run_dir={root / f'{name} {ratio}'.replace(' ', '-').replace(',', '')}"]
    words += [f"group.budget.keep_ratio={ratio}", "evaluate.baselines=[]", "executor.kind=local"]
    words += [f"calibrate.data.tokens={tokens}", f"evaluate.data.tokens={tokens}"]
    words += [f"calibrate.statistics={reuse}"] if reuse is not None else []
    loaded = load("quickstart", _without_scope(words + VARIANTS[name]))
    folder = run(prepare(loaded.config))
    report = json.loads((folder / "report.json").read_text())
    return {
        "method": name,
        "kept": ratio,
        "bytes": report["bytes"]["after"],
        "perplexity": report["perplexity"]["compressed"]["overall"],
        "original": report["perplexity"]["original"]["overall"],
        "kl": report["kl"]["compressed"]["overall"],
    }


def _without_scope(words: list[str]) -> list[str]:
    """Pruning methods have no scope; the recipe's group section is replaced as a whole."""
    method = next((w.split("=")[1] for w in words if w.startswith("group.method=")), None)
    if method is None:
        return words
    ratio = next(w.split("=")[1] for w in words if w.startswith("group.budget.keep_ratio="))
    kept = [word for word in words if not word.startswith("group.")]
    return [*kept, f"group={{method: {method}, budget: {{keep_ratio: {ratio}}}}}"]


def main() -> None:
    """Prints perplexity and KL (nats) per method and share of experts."""
    quick = wants_quick(str(__doc__))
    ratios, tokens = ([0.5], 20_480) if quick else ([0.75, 0.5, 0.25], 163_840)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        reuse: Path | None = None
        for ratio in ratios:
            for name in VARIANTS:
                rows.append(measure(Path(folder), name, ratio, tokens, reuse))
                reuse = reuse or next(Path(folder).glob("*/statistics.arrow"))
    show("quality without recovery", rows)


if __name__ == "__main__":
    main()
