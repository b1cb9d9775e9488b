"""Checkpoints of other programs: measured like ours, or refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.peers.commands import PEERS, Job
from benchmarks.peers.evaluate import check_complete, measure, named, rows, weight_bytes
from benchmarks.peers.text import export
from models.errors import CheckpointError
from models.moe import MoeCheckpoint
from stages.corpus.config import CorpusConfig, Source
from stages.corpus.stage import CorpusUnit, read_blocks, run_one
from stages.group.decision import from_labels
from tests.orchestrator.tiny_run import EXPERTS, WORDS, Inputs, write_inputs, write_jsonl
from tests.tiny import compress, open_model

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import datasets

    found = write_inputs(tmp_path_factory.mktemp("inputs"))
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("datasets")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        yield found


@pytest.fixture(scope="module")
def halved(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every other expert, as another program might have written it."""
    moe = MoeCheckpoint.open(inputs.model)
    labels = [expert if expert % 2 == 0 else None for expert in range(EXPERTS)]
    decisions = [from_labels(layer, labels, [1.0] * EXPERTS) for layer in moe.layers]
    return compress(moe, decisions, tmp_path_factory.mktemp("halved"))


def corpus_of(inputs: Inputs) -> CorpusConfig:
    texts = [{"text": " ".join(WORDS[i:]), "domain": "ab"[i % 2]} for i in range(20)]
    path = write_jsonl(inputs.root / "held.jsonl", texts)
    source = Source(path=str(path), domain_column="domain")
    return CorpusConfig(sources=(source,), tokens=256, sequence_length=32)


def test_checkpoints_are_measured_beside_the_original(
    inputs: Inputs, halved: Path, tmp_path: Path
) -> None:
    data, folders = corpus_of(inputs), {"same": inputs.model, "half": halved}

    found = measure(inputs.model, folders, data, tmp_path)
    again = measure(inputs.model, folders, data, tmp_path)

    assert again == found
    original, same, half = rows(found)
    assert original["checkpoint"] == "original" and set(found["half"]["perplexity"]["domains"]) == {
        "a",
        "b",
    }
    assert (same["rise"], same["bytes"]) == (0.0, original["bytes"])
    assert same["kl"] == pytest.approx(0, abs=1e-6)
    assert half["kl"] > 1e-3 and half["bytes"] < original["bytes"] == weight_bytes(inputs.model)
    model = open_model(halved)
    blocks = [b for b in read_blocks(tmp_path / "tokens.arrow") if b.domain == "a"]
    losses = [_loss(model, block.tokens) for block in blocks]
    expected = math.exp(sum(sum(each) for each in losses) / sum(map(len, losses)))
    assert found["half"]["perplexity"]["domains"]["a"] == pytest.approx(expected, rel=1e-4)


def _loss(model: Any, tokens: tuple[int, ...]) -> list[float]:
    """By hand: minus the log-probability of each token after the first."""
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        scores = model(input_ids=ids).logits[0].float().log_softmax(dim=-1)
    return [-float(scores[i, token]) for i, token in enumerate(tokens[1:])]


def test_a_folder_without_a_weight_is_refused(halved: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    tensors = load_file(halved / "model.safetensors")
    gone = "model.layers.1.block_sparse_moe.gate.weight"
    del tensors[gone]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    (broken / "config.json").write_text((halved / "config.json").read_text())

    check_complete(halved)
    with pytest.raises(
        CheckpointError, match=r"lacks 1 weights, first .*layers\.1\..*gate\.weight"
    ):
        check_complete(broken)


@pytest.mark.parametrize("words", [["folder"], ["a=x", "a=y"], ["=x"], ["original=x"], ["a="]])
def test_checkpoints_are_given_by_name(words: list[str]) -> None:
    with pytest.raises(ValueError, match="NAME=FOLDER"):
        named(words)
    assert named(["a=/x", "b=/y"]) == {"a": Path("/x"), "b": Path("/y")}


def test_the_calibration_text_can_be_read_by_others(inputs: Inputs, tmp_path: Path) -> None:
    unit = CorpusUnit("corpus", corpus_of(inputs), inputs.model, tmp_path / "tokens.arrow")
    run_one(unit)

    count = export(unit.output, inputs.model, tmp_path / "text.jsonl")

    lines = [json.loads(line) for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    blocks = read_blocks(unit.output)
    assert count == len(lines) == len(blocks)
    assert [line["domain"] for line in lines] == [block.domain for block in blocks]
    assert lines[0]["text"].split() == [WORDS[t - 3] for t in blocks[0].tokens if t > 2]


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_is_documented_and_is_told_model_and_size(name: str) -> None:
    page = (REPOSITORY / "benchmarks" / "peers" / "README.md").read_text()
    job = Job("python3", Path("/model"), Path("/out"), 8, 6)

    words = PEERS[name].command(job)

    assert PEERS[name].repository.removeprefix("github.com/") in page
    assert words[0] == "python3" and "/model" in words
    assert "6" in words or "0.25" in words


def test_a_command_is_printed_and_only_then_run(tmp_path: Path) -> None:
    (tmp_path / "merge.py").write_text("import sys; print('ran', sys.argv[1:])\n")
    words = ["--peer", "ream", "--checkout", str(tmp_path), "--python", sys.executable]
    words += ["--model", "m", "--out", "o", "--experts", "8", "--kept", "4"]

    def call(*more: str) -> str:
        command = [sys.executable, "-m", "benchmarks.peers.commands", *words, *more]
        ran = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
        return ran.stdout

    assert "merge.py" in call() and "ran" not in call().splitlines()[-1].split()[:1]
    assert call("--run").splitlines()[-1].startswith("ran ['--model'")
