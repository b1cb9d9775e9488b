"""Layer inputs: any cut, engine and order gives the same bytes, and they are what the model saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from models.arrow import write_table
from stages.calibrate.config import CalibrateConfig, SampleConfig
from stages.calibrate.sample import sample_of
from stages.calibrate.stage import ShardUnit, make_worker
from stages.calibrate.stage import plan as plan_shards
from stages.corpus.blocks import Block
from stages.corpus.config import CorpusConfig, Source
from stages.errors import StatisticsError
from stages.inputs.read import LayerInputs
from stages.inputs.stage import InputsUnit, plan, run_one
from stages.unit import execute
from tests.tiny import EXPERTS, HIDDEN, TOP_K, open_model, random_ids, save_tiny

LENGTHS = {"code": [7, 7, 3], "text": [9, 2, 9, 9, 5]}
BLOCKS = [
    Block(domain, tuple(random_ids(1, length, seed)[0].tolist()))
    for domain, lengths in LENGTHS.items()
    for seed, length in enumerate(lengths)
]
TOKENS = 20


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder and a corpus file."""
    folder = tmp_path_factory.mktemp("files")
    columns = {
        "domain": pa.array([b.domain for b in BLOCKS]),
        "tokens": pa.array([b.tokens for b in BLOCKS], pa.list_(pa.int32())),
    }
    write_table(folder / "tokens.arrow", pa.table(columns))
    return save_tiny(folder / "model", "qwen2_moe"), folder / "tokens.arrow"


def shards_of(files: tuple[Path, Path], folder: Path, **fields: Any) -> list[ShardUnit]:
    source = CorpusConfig(sources=(Source(path="x"),))
    settings = {"sample": SampleConfig(tokens=TOKENS), "batch_size": 1} | fields
    return plan_shards(
        CalibrateConfig(data=source, **settings),
        blocks=len(BLOCKS),
        corpus=files[1],
        model=files[0],
        num_experts=EXPERTS,
        folder=folder / "shards",
        inputs={"model": "abc"},
    )


def joined(shards: Sequence[ShardUnit], folder: Path) -> list[InputsUnit]:
    """Observes the shards, last one first, and joins them."""
    work = make_worker()
    for unit in reversed(shards):
        work(unit)
    units = plan(shards, (0, 1), sorted(LENGTHS), folder / "inputs")
    for each in reversed(units):
        execute(each, run_one)
    return units


@pytest.fixture(scope="module")
def whole(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[InputsUnit]:
    folder = tmp_path_factory.mktemp("whole")
    return joined(shards_of(files, folder, shards=1), folder)


@pytest.mark.parametrize("engine", ["resident", "streaming"])
@pytest.mark.parametrize("shards", [3, 8])
def test_any_cut_and_engine_gives_the_same_bytes(
    files: tuple[Path, Path], whole: list[InputsUnit], tmp_path: Path, shards: int, engine: Any
) -> None:
    units = [replace(u, engine=engine) for u in shards_of(files, tmp_path, shards=shards)]
    assert len(units) == shards

    found = joined(units, tmp_path)

    assert [u.output.read_bytes() for u in found] == [u.output.read_bytes() for u in whole]


def test_the_same_tokens_are_kept_in_every_layer(
    files: tuple[Path, Path], whole: list[InputsUnit]
) -> None:
    expected = sample_of(files[1], TOKENS, 0)
    for unit in whole:
        found = LayerInputs.read(unit.output)
        assert np.array_equal(found.block.numpy(), expected.block)
        assert np.array_equal(found.position.numpy(), expected.position)
        assert np.array_equal(found.domain.numpy(), expected.domain)
        assert (found.layer, found.domains, found.seed) == (unit.layer, ("code", "text"), 0)
        assert found.inputs == {"model": "abc"}
        assert len(found) == TOKENS


@torch.inference_mode()
def test_hidden_states_and_routing_are_those_of_the_model(
    files: tuple[Path, Path], whole: list[InputsUnit]
) -> None:
    """Against hooks on the unobserved model, one block at a time."""
    model = open_model(files[0])
    seen: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for layer, module in enumerate(model.model.layers):
        module.mlp.register_forward_pre_hook(lambda _, args, at=layer: seen[at].append(args[0][0]))
    for block in BLOCKS:
        model(input_ids=torch.tensor([block.tokens]), use_cache=False)

    for layer, unit in enumerate(whole):
        found = LayerInputs.read(unit.output)
        assert found.hidden.shape == (TOKENS, HIDDEN) and found.ids.shape == (TOKENS, TOP_K)
        places = zip(found.block.tolist(), found.position.tolist(), strict=True)
        hidden = torch.stack([seen[layer][block][position] for block, position in places])
        torch.testing.assert_close(found.hidden, hidden, rtol=1e-5, atol=1e-6)
        logits = found.hidden @ model.model.layers[layer].mlp.gate.weight.T
        torch.testing.assert_close(found.logits, logits)
        gates, ids = logits.softmax(-1).topk(TOP_K)
        assert found.ids.equal(ids)
        torch.testing.assert_close(found.gates, gates)
        dense = found.dense_gates()
        assert dense.gather(1, found.ids).equal(found.gates.double())
        assert (dense != 0).sum() == TOKENS * TOP_K


def test_inputs_have_the_type_that_the_model_runs_in(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    units = joined(shards_of(files, tmp_path, shards=2, dtype="bfloat16", batch_size=4), tmp_path)
    found = LayerInputs.read(units[0].output)
    assert found.hidden.dtype == torch.bfloat16
    assert found.gates.dtype == found.logits.dtype == torch.float32


def test_nothing_is_kept_when_it_is_off(files: tuple[Path, Path], tmp_path: Path) -> None:
    shards = shards_of(files, tmp_path, sample=None)
    make_worker()(shards[0])
    assert plan(shards, (0, 1), sorted(LENGTHS), tmp_path) == []
    assert [path.name for path in shards[0].outputs] == ["shard-00000.arrow"]
    assert not list(tmp_path.rglob("*.safetensors"))
    with_sample = shards_of(files, tmp_path)[0]
    assert "sample" in with_sample.fingerprint["config"]
    assert "sample" not in shards[0].fingerprint["config"]


def test_a_shard_that_lost_its_inputs_is_observed_again(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    unit = shards_of(files, tmp_path, shards=4)[1]
    work = make_worker()
    first = work(unit)
    content = unit.sampled.read_bytes()
    damaged = bytearray(content)
    damaged[-1] ^= 1
    unit.sampled.write_bytes(damaged)

    again = work(unit)

    assert not again.resumed and again.digests == first.digests
    assert unit.sampled.read_bytes() == content
    assert work(unit).resumed


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    for name in ("bad.safetensors", "none.safetensors"):
        with pytest.raises(StatisticsError, match="cannot read layer inputs"):
            LayerInputs.read(tmp_path / name)
