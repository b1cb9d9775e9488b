"""Which layers go together, which text is run again, and where the sampled tokens stand in it."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.arrow import write_table
from models.tensors import write_tensors
from stages.carry.blocks import cut
from stages.carry.stream import Stream
from stages.carry.text import edges, read_text, sampled_blocks
from tests.tiny import PROPERTY, random_input


@PROPERTY
@given(st.sets(st.integers(0, 30), min_size=1), st.integers(1, 8))
def test_every_layer_up_to_the_last_refitted_one_is_passed_once(
    layers: set[int], size: int
) -> None:
    ordered = sorted(layers)
    blocks = cut(ordered, size)
    assert [n for block in blocks for n in range(block.start, block.stop)] == list(
        range(ordered[-1] + 1)
    )
    assert [n for block in blocks for n in block.layers] == ordered
    assert all(block.layers[-1] == block.stop - 1 for block in blocks)
    assert all(len(block.layers) == size for block in blocks[:-1])
    assert [block.index for block in blocks] == list(range(len(blocks)))


@PROPERTY
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 9))
def test_parts_are_whole_batches_and_hold_every_block_once(
    blocks: int, batch: int, parts: int
) -> None:
    found = edges(blocks, batch, parts)
    assert [n for start, stop in found for n in range(start, stop)] == list(range(blocks))
    assert all(start % batch == 0 and start < stop for start, stop in found)
    assert len(found) == min(parts, -(-blocks // batch))


def corpus(folder: Path) -> Path:
    """Nine blocks of two domains, three to six tokens each; a token tells block and position."""
    domains = ["a" if block < 5 else "b" for block in range(9)]
    tokens = [[10 * block + p for p in range(3 + block % 4)] for block in range(9)]
    path = folder / "tokens.arrow"
    write_table(path, pa.table({"domain": domains, "tokens": tokens}))
    return path


def test_sampled_tokens_are_found_in_the_batches_of_their_blocks(tmp_path: Path) -> None:
    block = torch.tensor([1, 1, 2, 4, 5, 8, 8])
    position = torch.tensor([0, 3, 4, 1, 2, 0, 2], dtype=torch.int32)
    sample = tmp_path / "layer.safetensors"
    write_tensors(sample, {"block": block, "position": position})
    assert sampled_blocks(sample).tolist() == [1, 2, 4, 5, 8]
    seen: list[int] = []
    for start, stop in edges(5, batch_size=2, parts=2):
        text = read_text(corpus(tmp_path), sample, start, stop, batch_size=2)
        for batch, rows in zip(text.batches, text.rows, strict=True):
            assert len({each.domain for each in batch.blocks}) == 1
            length = max(map(len, batch.rows))
            flat = [t for row in batch.rows for t in (*row, *[-1] * (length - len(row)))]
            seen += [flat[row] for row in rows.tolist()]
    assert seen == [10 * b + p for b, p in zip(block.tolist(), position.tolist(), strict=True)]


def test_a_stream_gives_back_what_was_written_last_in_any_order(tmp_path: Path) -> None:
    shapes = [(2, 3), (1, 5), (4, 2)]
    stream = Stream(tmp_path / "states", shapes, hidden=8)
    states = [random_input(b * s, 8, seed=b).view(b, s, 8) for b, s in shapes]
    for number in (2, 0, 1):
        stream.write(number, states[number])
    stream.write(0, -states[0])
    assert stream.read(0).equal(-states[0])
    assert all(stream.read(n).equal(states[n]) for n in (1, 2))
