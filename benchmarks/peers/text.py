"""The text that a run was calibrated on, for other programs: one JSON object per block."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from stages.corpus.stage import load_tokenizer, read_blocks


def export(tokens: Path, tokenizer: Path, out: Path) -> int:
    """Writes `{"text", "domain"}` lines; returns how many.

    A block is the decoded text of its tokens, special ones left out: another program cuts it again,
    so that tokens at the ends of blocks may differ.
    """
    cutter = load_tokenizer(tokenizer)
    blocks = read_blocks(tokens)
    with out.open("w", encoding="utf-8") as file:
        for block in blocks:
            text = cutter.decode(list(block.tokens), skip_special_tokens=True)
            file.write(json.dumps({"text": text, "domain": block.domain}) + "\n")
    return len(blocks)


def main() -> None:
    """`python -m benchmarks.peers.text --run RUN --model MODEL --out FILE.jsonl`"""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    parser.add_argument("--model", type=Path, required=True, help="folder with the tokenizer")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    count = export(options.run / "calibration" / "tokens.arrow", options.model, options.out)
    print(f"{count} blocks written to {options.out}")


if __name__ == "__main__":
    main()
