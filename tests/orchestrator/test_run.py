"""The main job in this process, for every family and format, down to a folder that opens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checkpoint import Checkpoint
from orchestrator.load import validate
from orchestrator.preflight import Prepared, prepare
from orchestrator.run import run
from orchestrator.run_folder import MAIN
from stages.errors import GateError, StaleUnit
from stages.export import stage as export
from stages.export.layout import file_layouts, placeholder
from stages.transform import stage as transform
from tests.orchestrator.tiny_run import write_inputs
from tests.tiny import EXPERTS, FAMILIES, MOE_LAYERS, TOP_K, logits_of, random_ids, save_tiny


def prepared(root: Path, family: str, **changes: Any) -> Prepared:
    """A run on a random checkpoint of a family, with sixty documents of text."""
    inputs = write_inputs(root)
    model = save_tiny(root / family, family)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(inputs.model / name, model / name)
    text = [{"path": str(inputs.text), "domain": "prose"}]
    data = {"sources": text, "tokens": 1024, "sequence_length": 16}
    values: dict[str, Any] = {
        "run_dir": str(root / "run"),
        "model": {"path": str(model)},
        "calibrate": {"data": data, "shards": 2},
        "group": {"method": "mc_smoe", "budget": {"keep_ratio": 0.5}},
        "executor": {"kind": "local"},
    }
    return prepare(validate(values | changes))


def opened(folder: Path, *, code: bool = False) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=code).eval()


def report_of(job: Prepared) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((job.folder.report / "report.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_native_output_opens_in_plain_transformers_with_half_the_experts(
    tmp_path: Path, family: str
) -> None:
    job = prepared(tmp_path, family)
    run(job)
    model = opened(job.folder.output(MAIN))
    assert type(model).__module__.startswith("transformers.")
    assert model.config.num_experts == EXPERTS // 2
    assert logits_of(model, random_ids(2, 9)).isfinite().all()
    report = report_of(job)
    assert report["bytes"]["after"] == report["bytes"]["predicted"] < report["bytes"]["before"]
    assert report["experts"]["after"] == {str(n): EXPERTS // 2 for n in MOE_LAYERS[family]}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_mapped_output_equals_the_expanded_one(tmp_path: Path, family: str) -> None:
    group = {"method": "mc_smoe", "scope": "global", "budget": {"experts_per_layer": 3}}
    mapped = prepared(tmp_path / "a", family, group=group, export={"format": "mapped"})
    expanded = prepared(tmp_path / "b", family, group=group, export={"format": "expanded"})
    run(mapped)
    run(expanded)
    ids = random_ids(2, 11)
    ours = logits_of(opened(mapped.folder.output(MAIN), code=True), ids)
    plain = logits_of(opened(expanded.folder.output(MAIN)), ids)
    assert (ours - plain).abs().max() < 1e-5
    kept = report_of(mapped)["experts"]["after"]
    assert sum(kept.values()) == 3 * len(MOE_LAYERS[family])
    assert report_of(mapped)["gate"]["checks"]["expanded_max_difference"] < 1e-5


@pytest.mark.slow
def test_keeping_every_expert_gives_the_original_tensors_bit_for_bit(tmp_path: Path) -> None:
    job = prepared(tmp_path, "mixtral", group={"method": "mc_smoe", "budget": {"keep_ratio": 1.0}})
    run(job)
    before = Checkpoint.open(job.moe.checkpoint.folder)
    after = Checkpoint.open(job.folder.output(MAIN))
    assert set(before.tensors) == set(after.tensors)
    for name in before.tensors:
        assert before.read([name])[name].equal(after.read([name])[name])


@pytest.mark.slow
def test_the_baselines_cost_the_same_bytes_and_are_removed_after_measuring(tmp_path: Path) -> None:
    data = {"sources": [{"path": str(tmp_path / "text.jsonl"), "domain": "prose"}], "tokens": 256}
    evaluate = {"data": data | {"sequence_length": 16}, "kl_positions": 8}
    job = prepared(tmp_path, "mixtral", evaluate=evaluate)
    run(job)
    report = report_of(job)
    assert set(report["perplexity"]["baselines"]) == {"frequency", "reap"}
    for name, size in report["baseline_bytes"].items():
        assert size == report["bytes"]["after"]
        assert not job.folder.output(name).exists()
        assert job.folder.decision(name).exists()
    assert report["perplexity"]["compressed"]["domains"].keys() == {"prose"}
    assert report["kl"]["compressed"]["overall"] > 0


def exported(job: Prepared, damage: Any) -> export.ExportUnit:
    """An export unit whose first layer file was changed after it was finished."""
    decisions = placeholder(job.moe, dict.fromkeys(job.moe.layers, TOP_K))
    layouts = file_layouts(job.moe, decisions, job.config.export)
    units = transform.plan(
        job.moe,
        decisions,
        layouts,
        align=job.config.align,
        merge=job.config.merge,
        export=job.config.export,
        folder=job.folder.layers(MAIN),
        model=job.model,
    )
    for unit in units:
        transform.run_one(unit)
    tensors = load_file(units[0].output)
    damage(tensors)
    save_file(tensors, units[0].output, metadata={"format": "pt"})
    return export.ExportUnit(
        moe=job.moe,
        decisions=tuple(decisions),
        layouts=tuple(layouts),
        files=tuple(unit.output for unit in units),
        digests=("",) * len(units),
        config=job.config.export,
        threads=1,
        output=job.folder.output(MAIN),
    )


ROUTER = "model.layers.0.block_sparse_moe.gate.weight"
ATTENTION = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda tensors: tensors.pop(ATTENTION), "missing_keys"),
        (lambda tensors: tensors.update({ROUTER: torch.zeros(TOP_K + 1, 32)}), "fresh process"),
        (lambda tensors: tensors[ATTENTION].fill_(float("nan")), "not finite"),
        (lambda tensors: tensors.update(extra=torch.zeros(400, 400)), "bytes written"),
    ],
    ids=["a tensor is missing", "a wrong shape", "a NaN", "more bytes than predicted"],
)
def test_the_reload_gate_refuses_and_publishes_nothing(
    tmp_path: Path, damage: Any, words: str
) -> None:
    unit = exported(prepared(tmp_path, "mixtral"), damage)
    with pytest.raises(GateError, match=words):
        export.run_one(unit)
    assert not unit.output.exists()
    assert not list(unit.output.parent.glob(".*"))


@pytest.mark.slow
def test_a_run_whose_text_changed_stops_and_says_so(tmp_path: Path) -> None:
    job = prepared(tmp_path, "mixtral")
    run(job)
    before = {p: p.read_bytes() for p in job.folder.root.rglob("*") if p.suffix == ".arrow"}
    with (tmp_path / "text.jsonl").open("a") as text:
        text.write('{"text": "word1 word2"}\n')
    with pytest.raises(StaleUnit, match=r"corpus/calibration was finished .* data was"):
        run(prepare(job.config))
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_what_a_kill_left_of_the_marker_is_no_obstacle(tmp_path: Path) -> None:
    job = prepared(tmp_path, "mixtral")
    job.folder.root.mkdir()
    (job.folder.root / ".output.json.host-1.tmp").write_text("{")

    run(job)

    assert (job.folder.output(MAIN) / "config.json").exists()
    assert not list(job.folder.root.glob(".*.tmp"))
