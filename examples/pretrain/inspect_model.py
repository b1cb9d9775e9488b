"""Measure how well the bundled model predicts each domain and how far its experts specialise.

    python inspect_model.py --model ../bundled/model --data ../bundled/data

Plain transformers with forward hooks on the routers; nothing of the training code is used for the
model. The last line is one JSON object with all figures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from corpus import DOMAINS, read_documents
from tokens import encode_stream

WINDOW = 256
BATCH = 16


def domain_streams(files: list[Path], tokenizer_dir: Path) -> dict[str, Tensor]:
    """Ids [N] per domain of the documents in some bundled files."""
    documents = [document for file in files for document in read_documents(file)]
    return {
        domain: encode_stream(tokenizer_dir, [d for d in documents if d.domain == domain])
        for domain in DOMAINS
    }


def windows(stream: Tensor, limit: int, length: int = WINDOW) -> Tensor:
    """Cut a stream into windows [W, length + 1] that overlap by the one token to be predicted."""
    return stream[: limit + 1].unfold(0, length + 1, length)


@contextmanager
def count_selections(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Yield one vector [E] per layer, which grows by every expert selection made inside."""
    routers = [module for module in model.modules() if isinstance(module, MixtralTopKRouter)]
    counts = [torch.zeros(router.num_experts, dtype=torch.long) for router in routers]

    def hook_for(count: Tensor) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            count.add_(torch.bincount(output[2].flatten(), minlength=len(count)))

        return hook

    handles = [
        router.register_forward_hook(hook_for(count))
        for router, count in zip(routers, counts, strict=True)
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def mean_loss(model: PreTrainedModel, rows: Tensor) -> float:
    """Mean cross-entropy in nats over windows [W, S + 1]."""
    total = 0.0
    for batch in torch.split(rows, BATCH):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits.float()  # [B, S, V]
        targets = batch[:, 1:].flatten()
        total += float(nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum"))
    return total / rows[:, 1:].numel()


def unigram_loss(stream: Tensor, rows: Tensor, vocabulary: int) -> float:
    """Cross-entropy in nats of windows under add-one-smoothed token frequencies of a stream."""
    counts = torch.bincount(stream, minlength=vocabulary).double() + 1
    log_probabilities = (counts / counts.sum()).log()
    return float(-log_probabilities[rows[:, 1:]].mean())


def mutual_information(shares: Tensor) -> float:
    """I(domain; expert) in bits from P(expert | domain) [D, E], domains equally likely."""
    marginal = shares.mean(0, keepdim=True)
    terms = torch.where(shares > 0, shares * (shares / marginal).log2(), 0.0)
    return float(terms.sum() / shares.shape[0])


def layer_figures(counts: Tensor) -> dict[str, float]:
    """Figures of one layer from selection counts [D, E]."""
    shares = counts.double() / counts.sum(1, keepdim=True)
    mean = shares.mean(0)
    return {
        "share_min": float(mean.min()),
        "share_max": float(mean.max()),
        "mutual_information_bits": mutual_information(shares),
    }


def measure(
    model: PreTrainedModel,
    held_out: Mapping[str, Tensor],
    calibration: Mapping[str, Tensor],
    limit: int,
) -> dict[str, Any]:
    """All figures."""
    pooled = torch.cat(list(calibration.values()))
    vocabulary = int(model.config.vocab_size)
    domains, counts = {}, []
    for domain, stream in held_out.items():
        rows = windows(stream, limit)
        with count_selections(model) as selected:
            loss = mean_loss(model, rows)
        counts.append(torch.stack(selected))  # [L, E]
        losses = {
            "model": loss,
            "unigram_of_domain": unigram_loss(calibration[domain], rows, vocabulary),
            "unigram_pooled": unigram_loss(pooled, rows, vocabulary),
        }
        perplexities = {name: float(torch.tensor(value).exp()) for name, value in losses.items()}
        domains[domain] = {"tokens": rows[:, 1:].numel(), **perplexities}
    layers = [layer_figures(layer) for layer in torch.stack(counts, dim=1)]  # each [D, E]
    return {"perplexity": domains, "layers": layers}


def print_tables(figures: dict[str, Any]) -> None:
    """Print the figures as two Markdown tables."""
    print("| domain | tokens | model ppl | unigram ppl (same domain) | unigram ppl (all domains) |")
    print("|---|---:|---:|---:|---:|")
    for name, row in figures["perplexity"].items():
        ppl = f"{row['model']:.1f} | {row['unigram_of_domain']:.0f} | {row['unigram_pooled']:.0f}"
        print(f"| {name} | {row['tokens']} | {ppl} |")
    print("\n| layer | least used expert | most used expert | I(domain; expert), bits |")
    print("|---:|---:|---:|---:|")
    for index, row in enumerate(figures["layers"]):
        shares = f"{100 * row['share_min']:.2f} % | {100 * row['share_max']:.2f} %"
        print(f"| {index} | {shares} | {row['mutual_information_bits']:.3f} |")
    print()


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description="Inspect the bundled model.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of the bundled parquet")
    parser.add_argument("--max-tokens", type=int, default=1_000_000, help="per domain")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    held_out_files = [args.data / "validation.parquet", args.data / "test.parquet"]
    held_out = domain_streams(held_out_files, args.model)
    calibration = domain_streams([args.data / "calibration.parquet"], args.model)
    figures = measure(model, held_out, calibration, args.max_tokens)
    print_tables(figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
