"""The word attack of arXiv 2410.14574, appendix D, and perplexity per word of the original text."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

WORD = re.compile(r"\S+")
_BATCH = 16


def attacked(text: str, rate: float, seed: int) -> str:
    """`text` with a share `rate` of its words replaced by `AAA`; everything between stays.

    The choice hangs on text, rate and seed only: every model is attacked in the same places.
    """
    generator = random.Random(seed)
    return WORD.sub(lambda word: "AAA" if generator.random() < rate else word.group(), text)


def words(texts: Sequence[str]) -> int:
    """Words of the texts, the same before and after an attack."""
    return sum(len(WORD.findall(text)) for text in texts)


def perplexity_per_word(model: Any, tokenizer: Any, texts: Sequence[str], length: int) -> float:
    """exp(nats of all tokens / words), in windows of `length` tokens.

    Per token it would mislead: an attack changes how many tokens there are, and the pieces of a
    repeated AAA are easy to predict.
    """
    return math.exp(nats(model, tokenizer, texts, length)[0] / words(texts))


@torch.inference_mode()
def nats(model: Any, tokenizer: Any, texts: Sequence[str], length: int) -> tuple[float, int]:
    """Summed cross-entropy of all texts on end, and the number of tokens that were predicted."""
    ids = torch.tensor([i for text in texts for i in tokenizer(text, verbose=False)["input_ids"]])
    full = ids.unfold(0, length + 1, length)  # windows share the token that is predicted
    rest = ids[len(full) * length :]
    batches = list(torch.split(full, _BATCH)) + ([rest[None]] if len(rest) > 1 else [])
    return sum(_nats(model, batch) for batch in batches), len(ids) - 1


def _nats(model: Any, rows: Tensor) -> float:
    """Summed cross-entropy of rows `[W, S + 1]`."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
    )
    return float(losses)
