"""Refitting behind reduced layers: what is carried, from where it goes on, and what it changes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.arrow import read_table
from orchestrator import pipeline, samples
from orchestrator.chain import Chain, chain_of, run_chain
from orchestrator.errors import ConfigError
from orchestrator.load import validate
from orchestrator.plan import rows
from orchestrator.preflight import Prepared, prepare
from orchestrator.run import run
from orchestrator.run_folder import MAIN
from stages.carry import stage as carry
from stages.corpus.stage import read_blocks
from stages.errors import StatisticsError
from stages.export.layout import file_layouts
from stages.group.decision import from_table
from stages.inputs.read import LayerInputs
from stages.refit.layer import target_of
from stages.transform.stage import TransformUnit
from stages.unit import execute
from tests import tiny_momentum
from tests.orchestrator.tiny_run import Inputs, snapshot, write_inputs
from tests.orchestrator.whole_models import Oracle
from tests.tiny import save_tiny
from tests.tiny_seq2seq import save_seq2seq

REFIT = {"enabled": True, "target": "sequential", "polish": {"steps": 2}}
COALESCE = {"method": "coalesce", "budget": {"keep_ratio": 0.5}}
REAP = {"method": "reap", "budget": {"keep_ratio": 0.5}}
MC_SMOE = {"method": "mc_smoe", "scope": "global", "budget": {"keep_ratio": 0.5}}
MAPPED = {"format": "mapped"}


def prepared(root: Path, family: str = "mixtral", layers: int = 3, **changes: Any) -> Prepared:
    """A run on a random checkpoint, with sixty documents of text of sixty words."""
    inputs = write_inputs(root)
    if family == "momentum_smoe":
        model = root / family
        tiny_momentum.model(num_hidden_layers=layers).save_pretrained(model)
    else:
        model = save_tiny(root / family, family, num_hidden_layers=layers)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(inputs.model / name, model / name)
    text = [{"path": str(inputs.text), "domain": "prose"}]
    values: dict[str, Any] = {
        "run_dir": str(root / "run"),
        "model": {"path": str(model)},
        "calibrate": {
            "data": {"sources": text, "tokens": 1000, "sequence_length": 48},
            "shards": 3,
            "batch_size": 4,
            "sample": {"tokens": 200, "statistics": False},
        },
        "group": COALESCE,
        "refit": REFIT,
        "executor": {"kind": "local"},
    }
    return prepare(validate(values | changes))


def chain(job: Prepared) -> Chain:
    """The chain of a run that has decided."""
    decisions = from_table(read_table(job.folder.decision(MAIN)))
    variant = job.variants[0]
    layouts = file_layouts(job.moe, decisions, variant.export)
    units = pipeline.transform_units(job, variant, decisions, layouts)
    found = chain_of(job, variant, decisions, units)
    assert found is not None
    return found


def here(stage: str, units: Sequence[Any], run_one: Callable[[Any], Any], _: int) -> None:
    """Runs units one after another; see `orchestrator.chain.Schedule`."""
    for unit in units:
        execute(unit, run_one)


def carried_again(found: Chain) -> dict[str, Tensor]:
    """What a finished run carried to its layers, all parts joined."""
    done: list[TransformUnit] = []
    tensors: dict[str, Tensor] = {}
    for block in found.blocks:
        units = found.carries(block, done)
        here("carry", units, carry.run_one, 0)
        parts = [load_file(unit.output) for unit in units]
        tensors |= {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        done += found.transforms(block, units)
    return tensors


# The slow, obvious loop ---------------------------------------------------------------------------


def opened(folder: Path, *, code: bool = False) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=code).eval()


CASES = {
    "narrower experts, layer after layer": ("mixtral", COALESCE, {}, "sequential", 1),
    "fewer experts behind their own router": ("qwen3_moe", REAP, {}, "sequential", 1),
    "merged experts behind a map, two at once": ("mixtral", MC_SMOE, MAPPED, "blockwise", 2),
    "merged experts behind a map": ("qwen2_moe", MC_SMOE, MAPPED, "sequential", 1),
    "with momentum": ("momentum_smoe", MC_SMOE, MAPPED, "sequential", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_carried_is_what_whole_models_with_hooks_show(tmp_path: Path, case: Any) -> None:
    family, group, export, target, size = case
    refit = REFIT | {"target": target, "block_layers": size}
    job = prepared(tmp_path, family, 4, group=group, export=export, refit=refit)
    run(job)
    found = chain(job)
    tensors = carried_again(found)
    oracle = Oracle(
        opened(job.moe.checkpoint.folder), opened(job.folder.output(MAIN), code=bool(export))
    )
    blocks = read_blocks(job.folder.calibration_tokens)
    moved = []
    for block in found.blocks:
        for layer in block.layers:
            sampled = samples.layer_inputs(job.folder, job.config.calibrate, job.moe)[layer]
            inputs = LayerInputs.read(sampled)
            given, wanted = [], []
            for number in inputs.block.unique().tolist():
                ids = torch.tensor([blocks[number].tokens])
                with torch.inference_mode():
                    pair = oracle.expected(ids, block.start, layer, block.share)
                places = inputs.position[inputs.block == number].long()
                given.append(pair[0][places])
                wanted.append(pair[1][places])
            assert torch.allclose(tensors[f"{layer}.hidden"], torch.cat(given), atol=2e-4)
            assert torch.allclose(tensors[f"{layer}.target"], torch.cat(wanted), atol=2e-4)
            moved.append(not torch.allclose(inputs.hidden, torch.cat(given), atol=1e-2))
    # Behind reduced layers inputs differ from those of the original, before them they do not.
    assert moved == [layer >= found.blocks[1].start for layer in found.units]


# Targets ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A sequential run that ended; to be read only."""
    job = prepared(tmp_path_factory.mktemp("finished"))
    run(job)
    return job


def copied(job: Prepared, root: Path) -> Prepared:
    """The same run in a folder of its own."""
    shutil.copytree(job.folder.root, root / "run")
    return prepare(job.config.model_copy(update={"run_dir": root / "run"}))


def layers_of(job: Prepared) -> dict[str, str]:
    found = snapshot(job.folder.layers(MAIN))
    return {name: digest for name, digest in found.items() if not name.endswith(".json")}


@pytest.mark.slow
def test_the_first_block_is_fitted_to_its_own_outputs(finished: Prepared, tmp_path: Path) -> None:
    job = copied(finished, tmp_path)
    inputs = LayerInputs.read(samples.layer_inputs(job.folder, job.config.calibrate, job.moe)[0])
    tensors = carried_again(chain(job))
    assert torch.allclose(tensors["0.target"].double(), target_of(job.moe, inputs), atol=1e-5)
    assert tensors["0.ids"].equal(inputs.ids)
    assert torch.allclose(tensors["0.hidden"], inputs.hidden, atol=1e-5)


@pytest.mark.slow
def test_nothing_of_the_streams_is_left_when_all_layers_are_finished(finished: Prepared) -> None:
    assert not finished.folder.refit.exists()
    assert not list(finished.folder.root.rglob("*.tmp"))


@pytest.mark.slow
def test_a_damaged_layer_is_made_again_from_streams_carried_anew(
    finished: Prepared, tmp_path: Path
) -> None:
    job = copied(finished, tmp_path)
    before = layers_of(job)
    path = job.folder.layers(MAIN) / "layer-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"abcd")
    ran: list[str] = []

    def listening(stage: str, units: Sequence[Any], run_one: Any, memory: int) -> None:
        ran.extend(unit.name for unit in units if not unit.marker.exists())
        here(stage, units, run_one, memory)

    run_chain(chain(job), listening)
    assert layers_of(job) == before
    assert {name.rpartition("/")[0] for name in ran if name.startswith("carry")} == {
        "carry/block-00000",
        "carry/block-00001",
        "carry/block-00002",
    }
    assert not job.folder.refit.exists()


class Stopped(Exception):
    """Stands for a kill between two units."""


@pytest.mark.slow
def test_a_chain_stopped_between_any_two_units_does_none_of_them_twice(
    finished: Prepared, tmp_path: Path
) -> None:
    job = copied(finished, tmp_path)
    before, names = layers_of(job), list[str]()
    for path in job.folder.layers(MAIN).glob("layer-*"):
        path.unlink()

    def one_more(stage: str, units: Sequence[Any], run_one: Any, memory: int) -> None:
        for unit in units:
            if not unit.marker.exists():
                names.append(unit.name)
                execute(unit, run_one)
                raise Stopped
            execute(unit, run_one)

    for _ in range(20):
        try:
            run_chain(chain(job), one_more)
            break
        except Stopped:
            continue
    assert len(names) == len(set(names)) == 3 * 3 + 3
    assert layers_of(job) == before
    assert not job.folder.refit.exists()


@pytest.mark.slow
def test_a_block_of_all_layers_is_the_original_target_but_for_rounding(tmp_path: Path) -> None:
    outputs = []
    for target, folder in (("original", "a"), ("blockwise", "b")):
        refit = REFIT | {"target": target, "block_layers": 3, "polish": {"steps": 0}}
        job = prepared(tmp_path / folder, refit=refit)
        run(job)
        outputs.append(load_file(job.folder.layers(MAIN) / "layer-00002.safetensors"))
    plain, block = outputs
    assert plain.keys() == block.keys()
    assert all(torch.allclose(plain[name], block[name], atol=1e-3) for name in plain)


@pytest.mark.slow
def test_sequential_layers_leave_less_missing_to_the_original_stream(
    tmp_path: Path,
) -> None:
    off = []
    for target in ("original", "sequential"):
        refit = REFIT | {"target": target, "polish": {"steps": 0}, "strengths": [0.01]}
        sample = {"tokens": 2000, "statistics": False}
        inputs = write_inputs(tmp_path / target)
        data = {
            "sources": [{"path": str(inputs.text), "domain": "prose"}],
            "tokens": 3000,
            "sequence_length": 48,
        }
        calibrate = {"data": data, "shards": 2, "batch_size": 8, "sample": sample}
        job = prepared(tmp_path / target, refit=refit, calibrate=calibrate)
        run(job)
        blocks = read_blocks(job.folder.calibration_tokens)
        ids = torch.tensor([block.tokens for block in blocks if len(block.tokens) == 48])
        with torch.inference_mode():
            whole, reduced = (
                opened(folder).base_model(ids).last_hidden_state
                for folder in (job.moe.checkpoint.folder, job.folder.output(MAIN))
            )
        off.append(float((whole - reduced).square().sum() / whole.square().sum()))
    assert off[1] < off[0]


# Where it runs ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ray_workers_give_the_bytes_of_the_local_executor(
    finished: Prepared, tmp_path: Path
) -> None:
    job = copied(finished, tmp_path)
    shutil.rmtree(job.folder.layers(MAIN))
    shutil.rmtree(job.folder.output(MAIN))
    for path in job.folder.root.glob("output*json"):
        path.unlink()
    executor = {"kind": "ray", "workers": 2}
    values = job.config.model_dump(mode="json") | {"executor": executor}
    run(prepare(validate(values)))
    assert layers_of(job) == layers_of(finished)


@pytest.mark.slow
def test_statistics_of_another_run_are_refitted_behind_reduced_layers_too(
    finished: Prepared, tmp_path: Path
) -> None:
    values = finished.config.model_dump(mode="json")
    values["calibrate"]["statistics"] = str(finished.folder.statistics)
    job = prepare(validate(values | {"run_dir": str(tmp_path / "run")}))
    run(job)
    assert layers_of(job) == layers_of(finished)


# Refused, and planned -----------------------------------------------------------------------------


@pytest.mark.slow
def test_statistics_without_their_text_are_refused(finished: Prepared, tmp_path: Path) -> None:
    copy = copied(finished, tmp_path)
    copy.folder.calibration_tokens.with_name("tokens.arrow.json").unlink()
    values = finished.config.model_dump(mode="json")
    values["calibrate"]["statistics"] = str(copy.folder.statistics)
    with pytest.raises(StatisticsError, match=r"refit.target=sequential.*no .*tokens.arrow"):
        prepare(validate(values | {"run_dir": str(tmp_path / "other")}))


def test_an_encoder_decoder_is_refused_before_anything_is_observed(tmp_path: Path) -> None:
    inputs: Inputs = write_inputs(tmp_path)
    model = save_seq2seq(tmp_path / "switch", "SwitchTransformers")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(inputs.model / name, model / name)
    recipe = inputs.recipe(model__path=str(model), refit=REFIT, calibrate__statistics=None)
    from orchestrator.load import load

    with pytest.raises(ConfigError, match=r"refit.target=sequential.*decoder layers also need"):
        prepare(load(str(recipe)).config)


def test_a_plan_counts_what_is_carried_and_the_room_for_it(tmp_path: Path) -> None:
    job = prepared(tmp_path)
    row = next(row for row in rows(job) if row.stage == "carry")
    assert (row.units, row.done) == (3 * 3, 0)
    # Two streams of 1,000 tokens x 32 x 4 bytes at three blocks.
    assert row.written_bytes == 3 * 2 * 1000 * 32 * 4
    plain = job.config.refit.model_copy(update={"target": "original"})
    values = job.config.model_dump(mode="json") | {"refit": plain.model_dump(mode="json")}
    assert "carry" not in {each.stage for each in rows(prepare(validate(values)))}
