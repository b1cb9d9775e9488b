"""One domain of the bundled text, and a tokenizer of its own, for models that learn it soon."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
BUNDLED = REPOSITORY / "examples" / "bundled"
# Written in words that spaces separate, with few of them: a small model learns it soonest.
DOMAIN = "scripture"
VOCABULARY = 4096
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")  # ids 0 to 3, as the bundled tokenizer has them


def documents(split: str) -> list[str]:
    """All texts of the domain in `calibration`, `validation` or `test`, in order of the file."""
    import pyarrow.parquet as pq

    table = pq.read_table(BUNDLED / "data" / f"{split}.parquet").to_pydict()
    pairs = zip(table["text"], table["domain"], strict=True)
    return [text for text, domain in pairs if domain == DOMAIN]


def held_out(split: str, characters: int) -> list[str]:
    """The first documents of a split, so many characters in all; the last is cut."""
    return list(_until(documents(split), characters))


def _until(texts: list[str], left: int) -> Iterator[str]:
    for text in texts:
        if left > 0:
            yield text[:left]
            left -= len(text)


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE of the training split; seven of its tokens are about five words."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as Decoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = Decoder()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents("calibration"), trainer)
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def counted(tokenizer: Any, split: str, characters: int) -> dict[str, float]:
    """Perplexity per word of a held-out split by counts of the training split, for comparison.

    `single`: tokens by their frequency (plus a half). `pairs`: by the token before, with absolute
    discounting of 3/4 towards that.
    """
    train = _ids(tokenizer, documents("calibration"))
    texts = held_out(split, characters)
    seen, count = _ids(tokenizer, texts), sum(len(text.split()) for text in texts)
    alone = np.bincount(train, minlength=VOCABULARY) + 0.5
    alone /= alone.sum()
    pairs = Counter(zip(train[:-1].tolist(), train[1:].tolist(), strict=True))
    before = np.bincount(train[:-1], minlength=VOCABULARY)
    kinds = Counter(first for first, _ in pairs)
    single = both = 0.0
    for first, second in zip(seen[:-1].tolist(), seen[1:].tolist(), strict=True):
        total = max(int(before[first]), 1)
        rest = 0.75 * kinds[first] if kinds[first] else 1.0
        found = max(pairs[first, second] - 0.75, 0.0) + rest * alone[second]
        single -= math.log(alone[second])
        both -= math.log(found / total)
    return {"single": math.exp(single / count), "pairs": math.exp(both / count)}


def _ids(tokenizer: Any, texts: list[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array([i for text in texts for i in tokenizer(text, verbose=False)["input_ids"]])
