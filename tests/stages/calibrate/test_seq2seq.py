"""Encoder-decoders with expert capacity: what the router chose, and what became of it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from models.arrow import write_table
from models.blocks import find_blocks
from stages.calibrate.observer import Routed, layer_sums, watching
from stages.calibrate.recorder import Recorder
from stages.calibrate.resident import halves, observe_batch
from stages.calibrate.stage import Replica, ShardUnit
from stages.calibrate.statistics import layers_of, read_statistics
from stages.corpus.blocks import Batch, Block
from stages.errors import StatisticsError
from stages.model import batch_of, load_model
from tests.tiny import random_ids, same_bits
from tests.tiny_seq2seq import SEQ2SEQ, SPARSE, save_seq2seq, seq2seq_model

EXPERTS, LENGTHS = 4, (14, 9, 1, 20)
READ, WRITTEN = (7, 5, 1, 10), (7, 4, 0, 10)
# One row of four tokens per expert, or one in eight of all tokens: both drop a good part.
TIGHT: dict[str, dict[str, Any]] = {
    "SwitchTransformers": {"expert_capacity": 2},
    "NllbMoe": {"moe_eval_capacity_token_fraction": 0.125},
}
BATCH = Batch(0, tuple(Block("a", tuple(random_ids(1, n, n)[0].tolist())) for n in LENGTHS))


class Kept(Recorder):
    """A recorder that keeps every pass."""

    def __init__(self) -> None:
        super().__init__(EXPERTS)
        self.seen: dict[int, Routed] = {}

    def add(self, batch: Batch, seen: Any) -> None:
        self.seen |= seen
        super().add(batch, seen)


def teacher_forced() -> tuple[dict[str, Tensor], dict[int, Tensor]]:
    """The inputs written out, and the mask of unpadded tokens of every sparse layer."""
    read, written = halves(BATCH.rows, 2)
    ids, mask = batch_of(read, 0, torch.device("cpu"))
    started, follows = batch_of(written, 0, torch.device("cpu"))
    inputs = {"input_ids": ids, "attention_mask": mask}
    inputs |= {"decoder_input_ids": started, "decoder_attention_mask": follows}
    return inputs, {layer: (mask if layer < 4 else follows).reshape(-1) for layer in SPARSE}


def heard_by_hooks(model: Any) -> dict[int, tuple[Tensor, ...]]:
    found: dict[int, Any] = {}
    handles = [
        block.router.register_forward_hook(
            lambda _m, _a, out, i=layer: found.update({i: tuple(o.flatten(0, -2) for o in out)})
        )
        for layer, block in find_blocks(model).items()
    ]
    with torch.inference_mode():
        model(**teacher_forced()[0])
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("family", SEQ2SEQ)
@torch.inference_mode()
def test_choices_are_those_before_any_token_is_dropped(family: str, tight: bool) -> None:
    model, recorder = seq2seq_model(family, **(TIGHT[family] if tight else {})), Kept()
    heard, keep = heard_by_hooks(model), teacher_forced()[1]

    observe_batch(model, BATCH, recorder)

    assert tuple(recorder.seen) == SPARSE
    dropped = 0
    for layer, routed in recorder.seen.items():
        mask, weights, logits = (each[keep[layer]] for each in heard[layer])
        top_k = routed.ids.shape[1]
        assert top_k == (1 if family == "SwitchTransformers" else 2)
        assert routed.logits.equal(logits)
        assert routed.ids.equal(logits.topk(top_k).indices)
        honoured = (mask if top_k == 1 else weights).gather(1, routed.ids) > 0
        assert routed.processed is not None and routed.processed.equal(honoured)
        sums = layer_sums(routed, EXPERTS)
        chosen = torch.zeros(EXPERTS).scatter_add_(
            0, routed.ids.reshape(-1), torch.ones(routed.ids.numel())
        )
        assert sums["selected"].tolist() == chosen.tolist()
        assert sums["processed"].sum() == honoured.sum()
        dropped += int((~honoured).sum())
    assert (dropped > 0) == tight


@pytest.mark.parametrize("family", SEQ2SEQ)
@torch.inference_mode()
def test_outputs_are_summed_over_processed_tokens_alone(family: str) -> None:
    model, recorder = seq2seq_model(family, **TIGHT[family]), Kept()

    observe_batch(model, BATCH, recorder)

    for layer, routed in recorder.seen.items():
        expected = np.zeros(EXPERTS), np.zeros(EXPERTS), np.zeros(EXPERTS)
        experts = find_blocks(model)[layer].experts
        assert routed.processed is not None
        for token, rank in routed.processed.nonzero().tolist():
            expert = int(routed.ids[token, rank])
            norm = float(experts[f"expert_{expert}"](routed.inputs[token : token + 1]).norm())
            gate = float(routed.gates[token, rank])
            for sums, value in zip(expected, (norm, gate, norm * gate), strict=True):
                sums[expert] += value
        found = layer_sums(routed, EXPERTS)
        for name, sums in zip(("norm", "gate", "gate_norm"), expected, strict=True):
            np.testing.assert_allclose(found[name], sums, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", SEQ2SEQ)
@torch.inference_mode()
def test_observation_moves_no_logit(family: str) -> None:
    model, inputs = seq2seq_model(family, **TIGHT[family]), teacher_forced()[0]
    before, blocks = model(**inputs).logits, find_blocks(model)

    with ExitStack() as stack:
        for layer, keep in teacher_forced()[1].items():
            stack.enter_context(watching({layer: blocks[layer]}, keep))
        during = model(**inputs).logits

    assert same_bits(during, before)


def test_padding_is_counted_on_neither_side() -> None:
    model, recorder = seq2seq_model("SwitchTransformers"), Kept()

    observe_batch(model, BATCH, recorder)

    # A decoder makes one step per token of the second half; one token alone makes the first.
    steps = sum(max(length, 1) for length in WRITTEN)
    tokens = {layer: len(routed.ids) for layer, routed in recorder.seen.items()}
    assert tokens == {1: sum(READ), 3: sum(READ), 5: steps, 7: steps}


def test_a_block_is_read_and_then_continued() -> None:
    rows = [(10, 11, 12, 13, 14), (20, 21, 22, 23), (30,)]

    read, written = halves(rows, 2)

    assert read == [(10, 11, 12), (20, 21), (30,)]
    assert written == [(2, 13), (2, 22), (2,)]


def test_a_router_that_draws_at_random_is_refused() -> None:
    model = seq2seq_model("NllbMoe", second_expert_policy="sampling")

    with pytest.raises(StatisticsError, match="second_expert_policy=sampling"):
        observe_batch(model, BATCH, Kept())


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_a_shard_of_an_encoder_decoder_is_written(family: str, tmp_path: Path) -> None:
    columns = {"domain": ["a"] * len(LENGTHS), "tokens": [list(b.tokens) for b in BATCH.blocks]}
    write_table(tmp_path / "tokens.arrow", pa.table(columns))
    model = save_seq2seq(tmp_path / "model", family)
    assert type(load_model(model, "auto")).__name__ == f"{family}ForConditionalGeneration"
    unit = ShardUnit(
        index=0,
        start=0,
        stop=len(LENGTHS),
        corpus=tmp_path / "tokens.arrow",
        model=model,
        num_experts=EXPERTS,
        dtype="auto",
        batch_size=2,
        output=tmp_path / "shard.arrow",
        inputs=(),
    )

    Replica().run_one(unit)

    found = layers_of(read_statistics(unit.output))
    assert tuple(each.layer for each in found) == SPARSE
    assert found[0].tokens == sum(READ)
