"""The attack replaces words and nothing else; perplexity is per word of the original."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.attack import attacked, perplexity_per_word, words

TEXTS = st.text(alphabet="ab \n\tAé.", max_size=200)


@given(TEXTS, st.integers(0, 9))
def test_without_attack_nothing_changes_and_with_all_every_word_does(text: str, seed: int) -> None:
    """A1."""
    assert attacked(text, 0.0, seed) == text
    assert re.findall(r"\S+", attacked(text, 1.0, seed)) == ["AAA"] * words([text])


@given(TEXTS, st.floats(0, 1), st.integers(0, 9))
def test_only_words_change_and_only_to_aaa(text: str, rate: float, seed: int) -> None:
    """A3, A4: the same text for all models, spaces and number of words kept."""
    found = attacked(text, rate, seed)

    assert found == attacked(text, rate, seed)
    assert re.split(r"\S+", found) == re.split(r"\S+", text)
    pairs = zip(re.findall(r"\S+", text), re.findall(r"\S+", found), strict=True)
    assert all(after in (before, "AAA") for before, after in pairs)


@pytest.mark.parametrize("rate", [0.025, 0.05, 0.1])
def test_the_share_of_replaced_words_is_the_rate(rate: float) -> None:
    """A2: within three standard deviations."""
    count = 40_000

    share = attacked("w " * count, rate, 1).split().count("AAA") / count

    assert abs(share - rate) < 3 * math.sqrt(rate * (1 - rate) / count)


def test_perplexity_counts_words_and_not_tokens() -> None:
    """A5: a uniform model over 7 ids, 30 tokens in windows of 4, 10 words."""
    text = " ".join(["abc"] * 10)

    def tokenizer(text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % 7 for c in text if c != " "]}

    def model(input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 7))

    found = perplexity_per_word(model, tokenizer, [text], 4)

    assert found == pytest.approx(math.exp(29 * math.log(7) / 10))
