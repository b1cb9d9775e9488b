"""Blocks hold the documents' tokens in order, to the last token of the budget."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.corpus.blocks import Block, packed, padded, split_budget
from tests.tiny import PROPERTY

DOCUMENTS = st.lists(st.lists(st.integers(1, 99), max_size=12), max_size=8)
LIMITS = {"length": st.integers(2, 9), "budget": st.integers(0, 60)}
END = [0]


@PROPERTY
@given(documents=DOCUMENTS, **LIMITS)
def test_packed_blocks_are_the_joined_documents_cut_at_the_budget(
    documents: list[list[int]], length: int, budget: int
) -> None:
    joined = [token for document in documents for token in document + END]

    blocks = list(packed("d", documents, length, budget, END))

    assert [token for block in blocks for token in block.tokens] == joined[:budget]


@PROPERTY
@given(documents=DOCUMENTS, **LIMITS)
def test_packed_blocks_are_full_but_for_the_last(
    documents: list[list[int]], length: int, budget: int
) -> None:
    sizes = [len(block.tokens) for block in packed("d", documents, length, budget, END)]

    assert all(size == length for size in sizes[:-1])
    assert all(0 < size <= length for size in sizes)


def test_packing_works_without_a_separator() -> None:
    assert list(packed("d", [[1, 2], [3]], 2, 9, [])) == [Block("d", (1, 2)), Block("d", (3,))]


def test_packing_reads_no_more_documents_than_it_needs() -> None:
    read = []

    def documents() -> Iterator[list[int]]:
        for i in range(100):
            read.append(i)
            yield [i] * 4

    list(packed("d", documents(), 4, 8, []))

    assert len(read) == 2


@PROPERTY
@given(documents=DOCUMENTS, **LIMITS)
def test_padded_blocks_are_the_heads_of_the_documents(
    documents: list[list[int]], length: int, budget: int
) -> None:
    heads = [document[:length] for document in documents if document]

    blocks = list(padded("d", documents, length, budget))

    tokens = [token for block in blocks for token in block.tokens]
    assert tokens == [token for head in heads for token in head][:budget]
    for block, head in zip(blocks[:-1], heads, strict=False):
        assert list(block.tokens) == head


@PROPERTY
@given(
    total=st.integers(0, 10**6),
    weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8),
)
def test_a_split_budget_sums_to_the_total_and_is_in_proportion(
    total: int, weights: list[float]
) -> None:
    shares = split_budget(total, weights)

    assert sum(shares) == total
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - total * weight / sum(weights)) < 1 + 1e-6


@pytest.mark.parametrize(
    ("total", "weights", "shares"),
    [
        (10, [1, 1, 1], [4, 3, 3]),
        (11, [1, 1, 1], [4, 4, 3]),
        (10, [0.1, 0.2, 0.7], [1, 2, 7]),
        (1, [1, 3], [0, 1]),
    ],
)
def test_what_is_left_over_goes_to_the_largest_remainder(
    total: int, weights: list[float], shares: list[int]
) -> None:
    assert split_budget(total, weights) == shares
