"""A small Switch-architecture model (encoder-decoder, top-1), trained on the bundled text.

    python -m benchmarks.paper.switch --out FOLDER

The encoder reads one piece of a document and the decoder says the next one. It is trained on the
calibration text, since the repository holds no other text of that size; what is reported is
measured on the test text. Deterministic for a machine and set of versions, on one thread; a run
that was stopped goes on from the last state in the folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from models.atomic import write_json
from stages.corpus.stage import load_tokenizer

BUNDLED = Path(__file__).resolve().parents[2] / "examples" / "bundled"
STATE = "training.pt"


@dataclass(frozen=True)
class Recipe:
    """Everything that the weights depend on beside the text."""

    steps: int = 800
    windows: int = 6  # per domain and step
    piece: int = 48  # tokens of the source, and of the target
    learning_rate: float = 3e-3
    warmup: int = 50
    decay: float = 0.4  # share of the steps over which the rate falls to zero
    balance: float = 0.01
    seed: int = 0


def config() -> SwitchTransformersConfig:
    """Every second of four and four blocks has 8 experts; no token is dropped."""
    return SwitchTransformersConfig(
        vocab_size=4096,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_heads=4,
        num_layers=4,
        num_decoder_layers=4,
        num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=2,
        num_experts=8,
        expert_capacity=4096,
        dropout_rate=0.0,
        router_jitter_noise=0.0,
        pad_token_id=3,
        eos_token_id=2,
        decoder_start_token_id=3,
    )


def streams(text: Path, tokenizer_folder: Path) -> dict[str, Tensor]:
    """Domain -> ids of all its documents, each ended by the end-of-sequence token."""
    tokenizer = load_tokenizer(tokenizer_folder)
    table = pq.read_table(text, columns=["text", "domain"]).to_pydict()
    found: dict[str, list[int]] = {}
    ids = tokenizer(table["text"], verbose=False)["input_ids"]
    for domain, row in zip(table["domain"], ids, strict=True):
        found.setdefault(domain, []).extend([*row, 2])
    return {domain: torch.tensor(each) for domain, each in sorted(found.items())}


def batch_at(found: dict[str, Tensor], recipe: Recipe, step: int) -> tuple[Tensor, Tensor]:
    """Sources and targets [B, piece] of a step, the same number from each domain."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    length, rows = 2 * recipe.piece, []
    for stream in found.values():
        starts = torch.randint(len(stream) - length, (recipe.windows, 1), generator=generator)
        rows.append(stream[starts + torch.arange(length)])
    windows = torch.cat(rows)
    return windows[:, : recipe.piece].contiguous(), windows[:, recipe.piece :].contiguous()


class Balance:
    """Adds up the Switch balance loss of every router while the model runs; 1 is even."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.losses: list[Tensor] = []
        for name, module in model.named_modules():
            if name.endswith("mlp.router"):
                module.register_forward_hook(self._hook)

    def _hook(self, _: torch.nn.Module, __: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits = output[2].flatten(0, -2)
        shares = F.one_hot(logits.argmax(-1), logits.shape[-1]).float().mean(0)
        self.losses.append(logits.shape[-1] * (shares * logits.softmax(-1).mean(0)).sum())

    def take(self) -> Tensor:
        """The mean over layers since the last call."""
        mean, self.losses = torch.stack(self.losses).mean(), []
        return mean


def rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, a plateau, and a linear fall to zero."""
    cool = (recipe.steps - step) / (recipe.decay * recipe.steps)
    return recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup, cool)


def train(found: dict[str, Tensor], recipe: Recipe, out: Path) -> dict[str, Any]:
    """Trains to the last step, and writes the model and what it was trained with."""
    torch.manual_seed(recipe.seed)
    model = SwitchTransformersForConditionalGeneration(config()).train()
    balance = Balance(model)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    first, losses, seconds = _restored(out / STATE, model, optimizer)
    for step in range(first, recipe.steps):
        began = time.process_time()
        source, target = batch_at(found, recipe, step)
        for group in optimizer.param_groups:
            group["lr"] = rate(recipe, step)
        loss = model(input_ids=source, labels=target).loss
        (loss + recipe.balance * balance.take()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds += time.process_time() - began
        if (step + 1) % 100 == 0 or step + 1 == recipe.steps:
            print(
                f"step {step + 1} loss {sum(losses[-100:]) / 100:.3f} {seconds:.0f} s", flush=True
            )
            _keep(out / STATE, model, optimizer, losses, seconds)
    model.eval().save_pretrained(out)
    tail = losses[-100:]
    return asdict(recipe) | {"loss": sum(tail) / len(tail), "seconds": seconds}


def _keep(path: Path, model: Any, optimizer: Any, losses: list[float], seconds: float) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state | {"losses": losses, "seconds": seconds}, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def _restored(path: Path, model: Any, optimizer: Any) -> tuple[int, list[float], float]:
    if not path.exists():
        return 0, [], 0.0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return len(state["losses"]), state["losses"], state["seconds"]


def make(out: Path, recipe: Recipe) -> Path:
    """The model in a folder that transformers opens, with the bundled tokenizer; once."""
    if (out / "recipe.json").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BUNDLED / "model" / name, out / name)
    facts = train(streams(BUNDLED / "data" / "calibration.parquet", out), recipe, out)
    (out / STATE).unlink()
    write_json(out / "recipe.json", facts)
    return out


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = make(options.out, Recipe(steps=options.steps))
    print(json.dumps(json.loads((folder / "recipe.json").read_text())))


if __name__ == "__main__":
    main()
