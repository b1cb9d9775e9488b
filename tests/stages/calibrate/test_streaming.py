"""A shard that is observed layer by layer has the sums of the whole model, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from models.arrow import write_table
from models.errors import CheckpointError
from models.streaming.model import StreamedModel
from stages import passage
from stages.calibrate.config import CalibrateConfig
from stages.calibrate.recorder import Recorder
from stages.calibrate.stage import Replica, ShardUnit, make_worker, plan, reduce
from stages.corpus.blocks import Block
from stages.corpus.config import CorpusConfig, Source
from tests.tiny import EXPERTS, FAMILIES, random_ids, save_tiny

# packed: all blocks but a domain's last are full. padded: any lengths.
LAYOUTS = {
    "packed": {"code": [8, 8, 8], "text": [8, 8, 8, 8, 3]},
    "padded": {"code": [7, 7, 3], "text": [9, 2, 9, 1, 5]},
}


def write_corpus(path: Path, layout: str) -> list[Block]:
    blocks = [
        Block(domain, tuple(random_ids(1, length, seed)[0].tolist()))
        for domain, lengths in LAYOUTS[layout].items()
        for seed, length in enumerate(lengths)
    ]
    columns = {
        "domain": pa.array([b.domain for b in blocks]),
        "tokens": pa.array([b.tokens for b in blocks], pa.list_(pa.int32())),
    }
    write_table(path, pa.table(columns))
    return blocks


def units_of(root: Path, family: str, layout: str = "padded", **fields: Any) -> list[ShardUnit]:
    """Shards of a fresh tiny model and corpus, for the resident engine."""
    if not (root / "model").exists():
        save_tiny(root / "model", family)
    blocks = write_corpus(root / "tokens.arrow", layout)
    source = CorpusConfig(sources=(Source(path="x"),))
    return plan(
        CalibrateConfig(data=source, **({"shards": 2, "batch_size": 2} | fields)),
        blocks=len(blocks),
        corpus=root / "tokens.arrow",
        model=root / "model",
        num_experts=EXPERTS,
        folder=root / "resident",
        inputs={"model": "abc"},
    )


def streamed(units: list[ShardUnit], folder: str = "streaming") -> list[ShardUnit]:
    """The same shards for the other engine, in a folder of their own."""
    return [
        replace(u, engine="streaming", output=u.output.parents[1] / folder / u.output.name)
        for u in units
    ]


def run(units: list[ShardUnit]) -> list[bytes]:
    replica = Replica()
    for unit in units:
        replica.run_one(unit)
    return [path.read_bytes() for unit in units for path in unit.outputs]


# The same bytes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_both_engines_write_the_same_bytes(family: str, layout: str, tmp_path: Path) -> None:
    units = units_of(tmp_path, family, layout)

    assert run(streamed(units)) == run(units)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_gives_the_same_bytes(dtype: str, tmp_path: Path) -> None:
    units = units_of(tmp_path, "mixtral", dtype=dtype)

    assert run(streamed(units)) == run(units)


def test_a_sliding_window_gives_the_same_bytes(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "mixtral", sliding_window=3)
    units = units_of(tmp_path, "mixtral")

    assert run(streamed(units)) == run(units)


def test_a_half_done_resident_calibration_is_finished_by_streaming(tmp_path: Path) -> None:
    units = units_of(tmp_path, "qwen3_moe", shards=4, batch_size=1)
    for unit in units:
        make_worker()(unit)
    expected = reduce(units)
    lost = units[2:]
    for unit in lost:
        unit.output.unlink()

    work = make_worker()
    done = [work(replace(unit, engine="streaming")) for unit in units]

    assert [each.resumed for each in done] == [True, True, False, False]
    assert [each.result["engine"] for each in done] == ["resident"] * 2 + ["streaming"] * 2
    assert reduce(units).equals(expected, check_metadata=True)


def test_the_engine_is_no_part_of_the_fingerprint(tmp_path: Path) -> None:
    unit = units_of(tmp_path, "mixtral")[0]

    assert replace(unit, engine="streaming").fingerprint == unit.fingerprint


# How it reads -------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers in the order in which they are read."""
    found: list[int] = []
    own = StreamedModel.layer

    def layer(self: StreamedModel, index: int) -> Any:
        found.append(index)
        return own(self, index)

    monkeypatch.setattr(StreamedModel, "layer", layer)
    return found


def test_a_layer_is_read_once_for_all_batches_of_a_shard(tmp_path: Path, reads: list[int]) -> None:
    (unit,) = units_of(tmp_path, "mixtral", shards=1, batch_size=1)

    run(streamed([unit]))

    assert reads == [0, 1]


def test_layers_behind_the_last_sparse_one_are_not_read(tmp_path: Path, reads: list[int]) -> None:
    save_tiny(tmp_path / "model", "qwen3_moe", mlp_only_layers=[0, 2])
    (unit,) = units_of(tmp_path, "qwen3_moe", shards=1)

    assert run(streamed([unit])) == run([unit])
    assert reads == [0, 1]


@pytest.mark.parametrize("kept", [0, 400])
def test_arguments_that_are_not_kept_are_made_again(
    kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    own = StreamedModel.calls
    monkeypatch.setattr(StreamedModel, "calls", lambda s, **i: made.append(1) or own(s, **i))
    monkeypatch.setattr(passage, "KEPT_ARGUMENT_BYTES", kept)
    (unit,) = units_of(tmp_path, "mixtral", shards=1, batch_size=1)

    assert run(streamed([unit])) == run([unit])
    assert len(made) > 8  # batches


# What it leaves -----------------------------------------------------------------------------------


def left(unit: ShardUnit) -> list[str]:
    return sorted(path.name for path in unit.output.parent.iterdir())


def test_no_hidden_states_are_left(tmp_path: Path) -> None:
    (unit,) = streamed(units_of(tmp_path, "mixtral", shards=1))

    run([unit])

    assert left(unit) == sorted(path.name for path in unit.outputs)


def test_no_hidden_states_are_left_by_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (unit,) = streamed(units_of(tmp_path, "mixtral", shards=1))

    def fail(*_: Any) -> None:
        assert any(unit.output.parent.rglob("batch-00000"))
        raise CheckpointError("stop")

    monkeypatch.setattr(Recorder, "add", fail)
    with pytest.raises(CheckpointError, match="stop"):
        run([unit])

    assert left(unit) == []


@pytest.mark.parametrize("engine", ["streaming", "resident"])
def test_hidden_states_of_killed_attempts_are_removed(engine: Any, tmp_path: Path) -> None:
    (unit,) = streamed(units_of(tmp_path, "mixtral", shards=1))
    stale = unit.output.with_name(f".{unit.output.name}.1.hidden.tmp")
    stale.mkdir(parents=True)
    (stale / "batch-00000").write_bytes(b"old")

    run([replace(unit, engine=engine)])

    assert left(unit) == sorted(path.name for path in unit.outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hidden_states_are_kept_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    hidden = torch.randn(2, 3, 5).to(dtype)
    file = passage.HiddenStates(tmp_path / "batch")

    file.write(hidden)
    mapped = file.read()
    file.write(mapped * 2)

    assert file.read().equal(hidden * 2)


def test_what_a_layer_does_to_its_input_does_not_reach_the_file(tmp_path: Path) -> None:
    hidden = torch.randn(2, 3, 5)
    file = passage.HiddenStates(tmp_path / "batch")
    file.write(hidden)

    file.read().zero_()

    assert file.read().equal(hidden)
