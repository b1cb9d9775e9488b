"""One unit per model and domain. The original goes first: others are compared with what it said."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.atomic import staged, write_json
from models.mapped.registration import register
from models.streaming.model import open_streamed
from stages.calibrate.config import Engine
from stages.corpus.blocks import Block
from stages.corpus.stage import read_domain
from stages.errors import DataError
from stages.evaluate.config import VERSION, EvaluateConfig
from stages.evaluate.metrics import kl_divergence, next_token_losses, overall, sampled_positions
from stages.forward import Logits, predicted, resident, streamed
from stages.model import load_model
from stages.passage import remove_stale
from stages.unit import Fingerprint, beside

ORIGINAL = "original"


@dataclass(frozen=True)
class EvaluateUnit:
    """Measures one model on one domain."""

    variant: str
    domain: str
    model: Path
    needs_code: bool
    corpus: Path
    config: EvaluateConfig
    folder: Path  # evaluation/
    inputs: tuple[tuple[str, str], ...]
    engine: Engine = "resident"  # decides the memory that it takes, and no digit

    @property
    def name(self) -> str:
        """`evaluate/compressed/german`."""
        return f"evaluate/{self.variant}/{self.domain}"

    @property
    def measured(self) -> Path:
        """The numbers."""
        return self.folder / self.variant / f"{_safe(self.domain)}.json"

    @property
    def reference(self) -> Path:
        """The original's log-probabilities at the sampled positions of this domain."""
        return self.folder / ORIGINAL / f"{_safe(self.domain)}.safetensors"

    @property
    def outputs(self) -> Sequence[Path]:
        """Numbers, and for the original its distributions."""
        is_original = self.variant == ORIGINAL
        return (self.measured, self.reference) if is_original else (self.measured,)

    @property
    def marker(self) -> Path:
        """Beside the numbers."""
        return beside(self.measured)

    @property
    def fingerprint(self) -> Fingerprint:
        """The model that is measured, the text, and the arithmetic."""
        config = self.config.model_dump(
            mode="json", include={"batch_size", "dtype", "kl_positions"}
        )
        return dict(self.inputs) | {"code": f"evaluate-{VERSION}", "config": config}


class Measurer:
    """Holds the model of the last unit: units of one variant follow one another."""

    def __init__(self) -> None:
        self._loaded: tuple[tuple[Path, Engine], Any] | None = None

    def run_one(self, unit: EvaluateUnit) -> dict[str, Any]:
        """Writes loss, tokens and KL sums of one domain.

        Raises:
            DataError: fewer than two tokens in a row to predict.
        """
        remove_stale(unit.measured)
        blocks = read_domain(unit.corpus, unit.domain)
        result, sampled = _measure(self._model(unit), blocks, unit)
        if unit.variant == ORIGINAL:
            _write_reference(unit.reference, sampled)
        elif unit.config.kl_positions:
            kl = kl_divergence(_read_reference(unit.reference), sampled).sum(dtype=torch.float64)
            result |= {"kl": float(kl), "kl_positions": sampled.shape[0]}
        write_json(unit.measured, result)
        return result

    def _model(self, unit: EvaluateUnit) -> Any:
        if self._loaded is None or self._loaded[0] != (unit.model, unit.engine):
            self._loaded = None  # the old one is let go before the new one takes its place
            self._loaded = ((unit.model, unit.engine), _open(unit))
        return self._loaded[1]


def make_worker() -> Callable[[EvaluateUnit], Any]:
    """A worker for `cluster.executor.Job`."""
    from stages.unit import execute

    measurer = Measurer()
    return lambda unit: execute(unit, measurer.run_one)


def reduce(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Domain -> numbers, to perplexity and KL overall and per domain."""
    domains = {d: math.exp(r["loss"] / r["tokens"]) for d, r in sorted(results.items())}
    found: dict[str, Any] = {"perplexity": {"overall": overall(domains), "domains": domains}}
    kl = {
        d: r["kl"] / r["kl_positions"] for d, r in sorted(results.items()) if r.get("kl_positions")
    }
    if kl:
        found["kl"] = {"overall": sum(kl.values()) / len(kl), "domains": kl}
    return found


def _open(unit: EvaluateUnit) -> Any:
    if unit.engine == "resident":
        return load_model(unit.model, unit.config.dtype, trust_remote_code=unit.needs_code)
    if unit.needs_code:
        register()  # the same classes as those beside the weights
    return open_streamed(unit.model, unit.config.dtype)


@torch.inference_mode()
def _measure(
    model: Any, blocks: Sequence[Block], unit: EvaluateUnit
) -> tuple[dict[str, Any], Tensor]:
    """Sums over the domain, and [N, V] log-probabilities at the sampled positions."""
    count = predicted(model.config, [block.tokens for block in blocks])
    if count < 1:
        raise DataError(f"domain {unit.domain!r} has no token to predict", "evaluate on more text")
    wanted = sampled_positions(count, unit.config.kl_positions)
    loss, done, sampled = 0.0, 0, []
    for logits, ids, mask in _forward(model, blocks, unit):
        losses = next_token_losses(logits, ids, mask)
        loss += float(losses.sum(dtype=torch.float64))
        here = wanted[(wanted >= done) & (wanted < done + len(losses))] - done
        rows = logits[:, :-1][mask[:, 1:] & mask[:, :-1]][here.to(logits.device)]
        sampled.append(rows.float().log_softmax(dim=-1).cpu())
        done += len(losses)
    return {"loss": loss, "tokens": done}, torch.cat(sampled)


def _forward(model: Any, blocks: Sequence[Block], unit: EvaluateUnit) -> Iterator[Logits]:
    size = unit.config.batch_size
    rows = [block.tokens for block in blocks]
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    if unit.engine == "resident":
        return resident(model, batches)
    return streamed(model, batches, unit.measured)


def _write_reference(path: Path, log_probabilities: Tensor) -> None:
    from safetensors.torch import save_file

    with staged(path) as temporary:
        save_file({"log_probabilities": log_probabilities.contiguous()}, temporary)


def _read_reference(path: Path) -> Tensor:
    from safetensors.torch import load_file

    return load_file(path)["log_probabilities"]


def _safe(domain: str) -> str:
    """A domain as a file name; names come from users and data."""
    from urllib.parse import quote

    return quote(domain, safe="").replace(".", "%2E")
