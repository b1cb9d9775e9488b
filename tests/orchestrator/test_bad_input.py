"""Bad input gives one clear message and exit code 2 before anything is computed or written."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import preflight
from orchestrator.load import load
from orchestrator.preflight import prepare
from tests.orchestrator.tiny_run import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    Command,
    Inputs,
    Outcome,
    expert,
    router,
    snapshot,
    write_jsonl,
)

Damage = Callable[[Inputs], object]


def assert_one_message(outcome: Outcome, *fragments: str) -> None:
    """Exit code 2; one error with these parts on stderr, and nothing that only we can read."""
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("error: "), outcome.err
    assert outcome.err.count("error: ") == 1
    assert "Traceback" not in outcome.err + outcome.out
    for fragment in fragments:
        assert fragment in outcome.err


def assert_refused(
    coalesce: Command,
    inputs: Inputs,
    recipe: Path,
    *fragments: str,
    overrides: tuple[str, ...] = (),
) -> None:
    """`run` and `validate` say the same, and neither leaves a file behind."""
    before = snapshot(inputs.root)
    ran = coalesce("run", recipe, *overrides)
    assert_one_message(ran, *fragments)
    assert snapshot(inputs.root) == before
    assert coalesce("validate", recipe, *overrides).err == ran.err


# Checkpoint files ---------------------------------------------------------------------------------


def raw_header(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def cut(inputs: Inputs) -> None:
    inputs.weights.write_bytes(inputs.weights.read_bytes()[:-100])


def lengthen(inputs: Inputs) -> None:
    inputs.weights.write_bytes(inputs.weights.read_bytes() + b"\0" * 100)


def header_of_unknown_type(inputs: Inputs) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}
    inputs.weights.write_bytes(raw_header(json.dumps({"x": entry}).encode(), b"\0" * 4))


def header_whose_shape_disagrees(inputs: Inputs) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}
    inputs.weights.write_bytes(raw_header(json.dumps({"x": entry}).encode(), b"\0" * 4))


def only_pickles(inputs: Inputs) -> None:
    inputs.weights.unlink()
    (inputs.model / "pytorch_model.bin").write_bytes(b"\x80\x04.")


FILES: dict[str, tuple[Damage, list[str]]] = {
    "no weights": (lambda i: i.weights.unlink(), ["holds neither model.safetensors nor"]),
    "only pickles": (only_pickles, ["convert it to safetensors", "pickle files are never opened"]),
    "truncated": (cut, ["is truncated", "bytes, the file has"]),
    "too long": (lengthen, ["is too long", "bytes, the file has"]),
    "empty": (lambda i: i.weights.write_bytes(b""), ["(0 bytes) has no safetensors header"]),
    "garbage": (lambda i: i.weights.write_bytes(b"\xff" * 200), ["(200 bytes) has no safetensors"]),
    "header not JSON": (
        lambda i: i.weights.write_bytes(raw_header(b"{nonsense")),
        ["has no safetensors header", "download the file again"],
    ),
    "header a list": (
        lambda i: i.weights.write_bytes(raw_header(b"[1, 2]")),
        ["has no safetensors header", "download the file again"],
    ),
    "header with text for numbers": (header_of_unknown_type, ["header entry of x is malformed"]),
    "shape against bytes": (header_whose_shape_disagrees, ["x 4 bytes", "[2] takes 8"]),
    "no folder": (lambda i: shutil.rmtree(i.model), ["no checkpoint folder at", "model.path"]),
    "no config": (lambda i: (i.model / "config.json").unlink(), ["config.json is missing"]),
    "config not JSON": (
        lambda i: (i.model / "config.json").write_text("{'hidden_size': 32}"),
        ["config.json is not JSON"],
    ),
    "config not text": (
        lambda i: (i.model / "config.json").write_bytes(b"\xff\xfe\x00"),
        ["config.json is not JSON"],
    ),
    "config a list": (
        lambda i: (i.model / "config.json").write_text("[]"),
        ["must hold a JSON object, not a list"],
    ),
    "no tokenizer": (
        lambda i: [path.unlink() for path in i.model.glob("tokenizer*")],
        ["holds no tokenizer", "set `model.tokenizer`"],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_folder_is_refused(
    coalesce: Command, inputs: Inputs, name: str
) -> None:
    damage, fragments = FILES[name]
    recipe = inputs.recipe()
    damage(inputs)
    assert_refused(coalesce, inputs, recipe, *fragments)


def test_a_file_in_place_of_the_folder_is_refused(coalesce: Command, inputs: Inputs) -> None:
    recipe = inputs.recipe(model__path=str(inputs.weights))
    assert_refused(coalesce, inputs, recipe, "no checkpoint folder at")


def test_a_hub_name_that_cannot_be_had_is_refused(
    coalesce: Command, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    recipe = inputs.recipe(model__path="nobody/no-such-model")
    assert_refused(
        coalesce, inputs, recipe, "nobody/no-such-model is no local folder", "set `model.path`"
    )


# The index ----------------------------------------------------------------------------------------


def index_with(inputs: Inputs, file: str) -> None:
    index = inputs.split()
    values = json.loads(index.read_text())
    values["weight_map"]["lm_head.weight"] = file
    index.write_text(json.dumps(values))


def outside(inputs: Inputs) -> Path:
    """A well-formed weight file beside the checkpoint folder."""
    path = inputs.root / "secret.safetensors"
    if inputs.weights.exists():
        shutil.copyfile(inputs.weights, path)
    return path


def linked_out(inputs: Inputs) -> None:
    target = outside(inputs)
    inputs.weights.unlink()
    inputs.weights.symlink_to(target)


def promised_tensor(inputs: Inputs) -> None:
    index = inputs.split()
    values = json.loads(index.read_text())
    values["weight_map"]["model.ghost.weight"] = "part-1.safetensors"
    index.write_text(json.dumps(values))


def unlisted_tensor(inputs: Inputs) -> None:
    index = inputs.split()
    values = json.loads(index.read_text())
    del values["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(values))


INDEX: dict[str, tuple[Damage, list[str]]] = {
    "a parent folder": (
        lambda i: (outside(i), index_with(i, "../secret.safetensors")),
        ["names '../secret.safetensors', a file outside the checkpoint folder"],
    ),
    "an absolute path": (
        lambda i: index_with(i, str(outside(i))),
        ["secret.safetensors', a file outside the checkpoint folder"],
    ),
    "a link out": (linked_out, ["outside the checkpoint folder", "model.allow_links=true"]),
    "a folder": (lambda i: index_with(i, "."), ["is not a file"]),
    "a missing file": (
        lambda i: index_with(i, "part-9.safetensors"),
        ["part-9.safetensors is missing", "download"],
    ),
    "a promised tensor": (
        promised_tensor,
        ["promises model.ghost.weight in part-1.safetensors, which does not hold it"],
    ),
    "an unlisted tensor": (unlisted_tensor, ["1 tensors are not in the index", "lm_head.weight"]),
    "another file": (
        lambda i: index_with(i, "part-2.safetensors"),
        ["promises lm_head.weight in part-2.safetensors, which does not hold it"],
    ),
    "not JSON": (lambda i: i.split().write_text("oops"), ["index.json is not JSON"]),
    "no map": (lambda i: i.split().write_text("{}"), ["has no weight_map"]),
}


@pytest.mark.parametrize("name", INDEX)
def test_an_index_that_does_not_fit_is_refused(
    coalesce: Command, inputs: Inputs, name: str
) -> None:
    damage, fragments = INDEX[name]
    recipe = inputs.recipe()
    damage(inputs)
    assert_refused(coalesce, inputs, recipe, *fragments)


def test_a_sharded_checkpoint_is_accepted(coalesce: Command, inputs: Inputs) -> None:
    recipe = inputs.recipe()
    inputs.split()
    assert coalesce("validate", recipe).code == 0


def test_links_of_a_hub_cache_are_accepted(coalesce: Command, inputs: Inputs) -> None:
    repository = inputs.root / "cache" / "models--someone--tiny"
    snapshot_folder, blobs = repository / "snapshots" / "0a1b2c", repository / "blobs"
    snapshot_folder.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(inputs.model.iterdir())):
        shutil.move(path, blobs / f"sha{number}")
        (snapshot_folder / path.name).symlink_to(Path("../../blobs") / f"sha{number}")
    recipe = inputs.recipe(model__path=str(snapshot_folder))
    assert coalesce("validate", recipe, "--deep").code == 0


def test_a_link_that_leads_out_is_followed_when_allowed(coalesce: Command, inputs: Inputs) -> None:
    linked_out(inputs)
    recipe = inputs.recipe(model__allow_links=True)
    assert coalesce("validate", recipe, "--deep").code == 0


# Tensors and config.json --------------------------------------------------------------------------

HEAD = "lm_head.weight"
TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], list[str]]] = {
    "missing expert": (
        lambda t: t.pop(expert(1, 3, "w2")),
        ["1 expert tensor(s) missing", expert(1, 3, "w2"), "promises 8 experts per layer"],
    ),
    "extra expert": (
        lambda t: t.update({expert(0, 8): torch.zeros(INTERMEDIATE, HIDDEN)}),
        ["1 expert tensor(s) unexpected", expert(0, 8), "promises 8 experts per layer"],
    ),
    "missing router": (lambda t: t.pop(router(1)), ["1 expert tensor(s) missing", router(1)]),
    "missing sparse block": (
        lambda t: [t.pop(name) for name in list(t) if "layers.1.block_sparse_moe" in name],
        ["layers 1 have neither router nor experts"],
    ),
    "no router": (lambda t: [t.pop(router(layer)) for layer in (0, 1)], ["has no MoE layer"]),
    "expert of wrong shape": (
        lambda t: t.update({expert(0, 1): torch.zeros(INTERMEDIATE, HIDDEN + 1)}),
        [expert(0, 1), "[16, 33]", "[16, 32]"],
    ),
    "router of wrong shape": (
        lambda t: t.update({router(0): torch.zeros(EXPERTS - 1, HIDDEN)}),
        [router(0), "[7, 32]", "[8, 32]"],
    ),
    "expert of wrong dtype": (
        lambda t: t.update({expert(0, 1): torch.zeros(INTERMEDIATE, HIDDEN, dtype=torch.int8)}),
        [expert(0, 1), "dtype I8", "dequantise"],
    ),
    "missing dense tensor": (lambda t: t.pop(HEAD), [f"tensor {HEAD} is missing"]),
    "extra dense tensor": (
        lambda t: t.update({"model.surprise.weight": torch.zeros(1)}),
        ["1 unexpected tensor(s)", "model.surprise.weight"],
    ),
    "dense tensor of wrong shape": (
        lambda t: t.update({HEAD: torch.zeros(63, HIDDEN)}),
        [HEAD, "[63, 32]", "[64, 32]"],
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_config_json_does_not_promise_are_refused(
    coalesce: Command, inputs: Inputs, name: str
) -> None:
    change, fragments = TENSORS[name]
    recipe = inputs.recipe()
    inputs.change_weights(change)
    assert_refused(coalesce, inputs, recipe, *fragments)


CONFIG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a misspelt family": ({"model_type": "mixtrall"}, ["'mixtrall'", "did you mean mixtral?"]),
    "a dense family": ({"model_type": "llama"}, ["no adapter", "'llama'", "known: mixtral, olmoe"]),
    "no family": ({"model_type": None}, ["no adapter for model_type"]),
    "no hidden size": ({"hidden_size": None}, ["hidden_size"]),
    "words for a number": ({"hidden_size": "wide"}, ["hidden_size"]),
    "no intermediate size": ({"intermediate_size": None}, ["intermediate_size"]),
    "no top-k": ({"num_experts_per_tok": None}, ["num_experts_per_tok"]),
    "no number of experts": ({"num_local_experts": None}, ["num_local_experts"]),
    "no vocabulary": ({"vocab_size": None}, ["vocab_size"]),
    "heads as words": ({"num_attention_heads": "four"}, ["num_attention_heads"]),
    "more selected than there are": (
        {"num_experts_per_tok": 9},
        ["selects 9 of 8 experts", "num_experts_per_tok"],
    ),
    "an impossible number of heads": ({"num_attention_heads": 0}, ["config.json"]),
}


@pytest.mark.parametrize("name", CONFIG)
def test_a_config_json_that_makes_no_model_is_refused(
    coalesce: Command, inputs: Inputs, name: str
) -> None:
    values, fragments = CONFIG[name]
    recipe = inputs.recipe()
    inputs.change_config(**values)
    assert_refused(coalesce, inputs, recipe, *fragments)


def poison(inputs: Inputs) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[expert(1, 5)][0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])

    inputs.change_weights(change)


def test_values_that_are_not_finite_end_the_run_in_verify(
    coalesce: Command, inputs: Inputs
) -> None:
    poison(inputs)
    outcome = coalesce("run", inputs.recipe(), "--quiet")
    assert_one_message(outcome, expert(1, 5), "3 values that are NaN or infinite, of 512")
    written = {path for path in snapshot(inputs.run_dir) if not path.startswith("verify")}
    assert written == {"run.json", "config.yaml", "events.jsonl"}


def test_deep_validation_finds_values_that_are_not_finite_and_writes_nothing(
    coalesce: Command, inputs: Inputs
) -> None:
    poison(inputs)
    recipe = inputs.recipe()
    before = snapshot(inputs.root)
    assert_one_message(coalesce("validate", recipe, "--deep"), expert(1, 5), "3 values")
    assert snapshot(inputs.root) == before


# Budget, method and format ------------------------------------------------------------------------

BUDGETS: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "fewer than top-k": (
        ("group.budget.keep_ratio=0.125",),
        ["1 experts per layer are fewer than the 2", "keep at least 2 of 8"],
    ),
    "more than there are": (
        ("group.budget={experts_per_layer: 9}",),
        ["asks for 18 experts, the model has 16", "must not exceed 8"],
    ),
    "bytes for not one expert": (
        ("group.budget={target_bytes: 1000}",),
        ["target_bytes is 1,000; the smallest", "2 of 8 experts", "takes 69,848 bytes"],
    ),
    "global scope, native format": (("group.scope=global",), ["group.scope=uniform", "mapped"]),
    "pruning, mapped format": (
        ("group={method: frequency}", "export.format=mapped"),
        ["mapped format redirects every expert", "export.format=native"],
    ),
    "pruning, expanded format": (
        ("group={method: reap}", "export.format=expanded"),
        ["expanded format redirects every expert", "export.format=native"],
    ),
    "a layer that is not there": (
        ("group.skip_layers=[1, 7]", "export.format=mapped"),
        ["skip_layers names [7]", "0 to 1"],
    ),
    "skipped layers, native format": (("group.skip_layers=[0]",), ["4 to 8", "format=mapped"]),
    "more per layer than the budget": (
        ("group.scope=global", "group.min_per_layer=5", "export.format=mapped"),
        ["a budget of 8 experts cannot keep 5 in each of 2 layers", "min_per_layer"],
    ),
}


@pytest.mark.parametrize("name", BUDGETS)
def test_a_budget_that_cannot_be_met_is_refused(
    coalesce: Command, inputs: Inputs, name: str
) -> None:
    overrides, fragments = BUDGETS[name]
    assert_refused(coalesce, inputs, inputs.recipe(), *fragments, overrides=overrides)


def expected_bytes(recipe: Path, *overrides: str) -> int:
    """Weight bytes of the output; test_plan shows that they are what is written."""
    prepared = prepare(load(str(recipe), overrides).config)
    layouts = preflight.expected_layouts(prepared.variants[0], prepared.moe)
    return sum(layout.file_bytes for layout in layouts)


@pytest.mark.parametrize("slack", [0, 1, -1])
@pytest.mark.parametrize("kept", [3, 6])
def test_a_size_in_bytes_is_used_to_the_last_expert_that_fits(
    inputs: Inputs, kept: int, slack: int
) -> None:
    recipe = inputs.recipe()
    size = expected_bytes(recipe, f"group.budget={{experts_per_layer: {kept}}}")
    smaller = expected_bytes(recipe, f"group.budget={{experts_per_layer: {kept - 1}}}")
    achieved = expected_bytes(recipe, f"group.budget={{target_bytes: {size + slack}}}")
    assert achieved == (smaller if slack < 0 else size)


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("skipped", ["[]", "[0]"])
def test_a_size_in_bytes_is_never_exceeded_by_a_mapped_model(
    inputs: Inputs, scope: str, skipped: str
) -> None:
    recipe = inputs.recipe()
    options = (f"group.scope={scope}", f"group.skip_layers={skipped}", "export.format=mapped")
    one_expert = 3 * HIDDEN * INTERMEDIATE * 4
    step = one_expert if scope == "global" else one_expert * (1 if skipped == "[0]" else 2)
    for target in range(104_000, 145_000, 2_500):
        achieved = expected_bytes(recipe, *options, f"group.budget={{target_bytes: {target}}}")
        assert achieved <= target < achieved + step + 100


# Text ---------------------------------------------------------------------------------------------


def parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return path


def test_a_data_file_that_is_missing_is_refused(coalesce: Command, inputs: Inputs) -> None:
    recipe = inputs.source(inputs.root / "nowhere.jsonl")
    assert_refused(coalesce, inputs, recipe, "no file matches", "nowhere.jsonl", "check the path")


def test_an_empty_data_file_is_refused(coalesce: Command, inputs: Inputs) -> None:
    (inputs.root / "empty.jsonl").write_text("")
    recipe = inputs.source(inputs.root / "empty.jsonl")
    assert_refused(coalesce, inputs, recipe, "empty.jsonl", "does it hold a document?")


def test_a_table_without_rows_is_refused(coalesce: Command, inputs: Inputs) -> None:
    import pyarrow as pa

    path = parquet(inputs.root / "none.parquet", {"text": pa.array([], pa.string())})
    recipe = inputs.source(path)
    assert_refused(coalesce, inputs, recipe, "none.parquet", "does it hold a document?")


def test_a_damaged_data_file_is_refused(coalesce: Command, inputs: Inputs) -> None:
    (inputs.root / "bad.parquet").write_bytes(b"PAR1 but no more")
    recipe = inputs.source(inputs.root / "bad.parquet")
    assert_refused(coalesce, inputs, recipe, "cannot read", "bad.parquet")


@pytest.mark.parametrize("key", ["text_column", "domain_column"])
def test_an_unknown_column_is_refused_with_those_that_exist(
    coalesce: Command, inputs: Inputs, key: str
) -> None:
    recipe = inputs.source(inputs.text, **{key: "body"})
    assert_refused(coalesce, inputs, recipe, "no column 'body'; it has text", f"`{key}`")


def test_a_text_column_of_numbers_is_refused(coalesce: Command, inputs: Inputs) -> None:
    path = write_jsonl(inputs.root / "numbers.jsonl", [{"text": 7}, {"text": 8}])
    assert_refused(coalesce, inputs, inputs.source(path), "'text'", "int64, not text")


def test_a_text_column_of_lists_is_refused(coalesce: Command, inputs: Inputs) -> None:
    path = write_jsonl(inputs.root / "lists.jsonl", [{"text": ["word1", "word2"]}])
    assert_refused(coalesce, inputs, inputs.source(path), "'text'", "List, not text")


def test_a_domain_of_blank_documents_is_refused_by_name(coalesce: Command, inputs: Inputs) -> None:
    rows = [{"text": "word1 word2", "kind": "law"}, {"text": " \n\t", "kind": "poems"}]
    path = write_jsonl(inputs.root / "mixed.jsonl", rows)
    recipe = inputs.source(path, domain_column="kind")
    assert_refused(coalesce, inputs, recipe, "'poems'", "mixed.jsonl")


def test_text_for_evaluation_is_looked_at_as_well(coalesce: Command, inputs: Inputs) -> None:
    sources = [{"path": str(inputs.root / "held-out.txt")}]
    recipe = inputs.recipe(evaluate__data__sources=sources)
    assert_refused(coalesce, inputs, recipe, "held-out.txt")


def tokens_of(inputs: Inputs, recipe: Path) -> dict[str, int]:
    """What the corpus stage makes of a recipe's calibration text."""
    from orchestrator.pipeline import corpus_units
    from stages.corpus import stage as corpus

    (unit,) = corpus_units(prepare(load(str(recipe)).config))
    unit = replace(unit, output=inputs.root / "tokens.arrow")
    tokens: dict[str, int] = corpus.run_one(unit)["tokens"]
    return tokens


def test_blank_documents_among_others_are_skipped(inputs: Inputs) -> None:
    rows = [{"text": ""}, {"text": "word1 word2 word3"}, {"text": "   "}, {"text": None}]
    path = write_jsonl(inputs.root / "some.jsonl", rows)
    assert tokens_of(inputs, inputs.source(path)) == {"some": 4}  # and the end of the text


def test_jsonl_text_and_parquet_give_the_same_tokens(inputs: Inputs) -> None:
    texts = ["word1 word2", "word3 word4 word5"]
    (inputs.root / "as.txt").write_text("\n".join(texts) + "\n")
    paths = [
        write_jsonl(inputs.root / "as.jsonl", [{"text": text} for text in texts]),
        parquet(inputs.root / "as.parquet", {"text": texts}),
        inputs.root / "as.txt",
    ]
    assert [tokens_of(inputs, inputs.source(path)) for path in paths] == [{"as": 7}] * 3


def test_a_folder_of_files_is_one_source(inputs: Inputs) -> None:
    folder = inputs.root / "many"
    folder.mkdir()
    for name in ("a", "b"):
        write_jsonl(folder / f"{name}.jsonl", [{"text": "word1 word2"}])
    assert tokens_of(inputs, inputs.source(folder)) == {"many": 6}


# Statistics ---------------------------------------------------------------------------------------


def test_statistics_that_are_not_there_are_refused(coalesce: Command, inputs: Inputs) -> None:
    recipe = inputs.recipe(calibrate__statistics=str(inputs.root / "no.arrow"))
    assert_refused(coalesce, inputs, recipe, "cannot read statistics from", "no.arrow")


def test_a_table_of_something_else_is_refused(coalesce: Command, inputs: Inputs) -> None:
    import pyarrow as pa

    from models.arrow import write_table

    path = inputs.root / "other.arrow"
    write_table(path, pa.table({"domain": ["prose"]}))
    recipe = inputs.recipe(calibrate__statistics=str(path))
    assert_refused(coalesce, inputs, recipe, "is no statistics table: it lacks tokens")


def test_statistics_of_another_model_are_refused_with_both_fingerprints(
    coalesce: Command, inputs: Inputs, finished: Inputs
) -> None:
    inputs.change_weights(lambda tensors: tensors[HEAD].add_(1))
    recipe = inputs.recipe(calibrate__statistics=str(finished.run_dir / "statistics.arrow"))
    ours = prepare(load(str(inputs.recipe())).config).model
    theirs = json.loads((finished.run_dir / "run.json").read_text())["model"]
    recipe = inputs.recipe(calibrate__statistics=str(finished.run_dir / "statistics.arrow"))
    assert_refused(coalesce, inputs, recipe, "another model", ours[:12], theirs[:12])


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_damaged_statistics_are_refused(
    coalesce: Command, inputs: Inputs, finished: Inputs, damage: str
) -> None:
    path = inputs.root / "statistics.arrow"
    for name in (path.name, f"{path.name}.json"):
        shutil.copyfile(finished.run_dir / name, inputs.root / name)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle] ^= 0xFF
    path.write_bytes(data[:middle] if damage == "cut" else data)
    recipe = inputs.recipe(calibrate__statistics=str(path))
    assert_refused(coalesce, inputs, recipe, str(path))


@pytest.mark.slow
def test_statistics_of_another_run_lead_to_the_same_decision(
    coalesce: Command, inputs: Inputs, finished: Inputs
) -> None:
    recipe = inputs.recipe(calibrate__statistics=str(finished.run_dir / "statistics.arrow"))
    assert coalesce("run", recipe, "--quiet").code == 0
    decisions = [i.run_dir / "decision.arrow" for i in (inputs, finished)]
    assert decisions[0].read_bytes() == decisions[1].read_bytes()
    assert not (inputs.run_dir / "calibration").exists()


# An expert without tokens -------------------------------------------------------------------------


def close_expert(tensors: dict[str, torch.Tensor]) -> None:
    """Hidden states of one sign and a router row of the other: expert 6 is never chosen."""
    tensors["model.embed_tokens.weight"].abs_()
    tensors["model.layers.0.post_attention_layernorm.weight"].fill_(1)
    for name in list(tensors):
        if "layers.0.self_attn.o_proj" in name:
            tensors[name].zero_()
    tensors[router(0)][6] = -10


@pytest.mark.slow
def test_an_expert_that_no_token_chose_is_merged_and_named(
    coalesce: Command, inputs: Inputs
) -> None:
    inputs.change_weights(close_expert)
    outcome = coalesce("run", inputs.recipe())
    assert outcome.code == 0, outcome.err
    message = "layer 0: experts [6] received none of 512 calibration tokens"
    assert message in outcome.out
    report = json.loads((inputs.run_dir / "report" / "report.json").read_text())
    assert [text for text in report["warnings"] if text.startswith(message)]
    assert any(6 in group and group[0] != 6 for group in report["groups"]["0"])
    events = (inputs.run_dir / "events.jsonl").read_text().splitlines()
    warnings = [e for line in events if (e := json.loads(line))["event"] == "warning"]
    assert any(event["message"].startswith(message) for event in warnings)


# Disk and run folder ------------------------------------------------------------------------------

MOUNTABLE = shutil.which("mount") is not None and os.geteuid() == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    if not MOUNTABLE:
        pytest.skip("only root can mount a small disk")
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(path)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("no disk can be mounted here")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def fill(disk: Path, free: int) -> Path:
    """Leaves so many bytes free."""
    filler, usage = disk / "filler", os.statvfs(disk)
    filler.write_bytes(b"x" * (usage.f_bavail * usage.f_frsize - free))
    return filler


def test_a_run_that_will_not_fit_on_the_disk_is_refused_with_numbers(
    coalesce: Command, inputs: Inputs, small_disk: Path
) -> None:
    fill(small_disk, 64 << 10)
    recipe = inputs.recipe(run_dir=str(small_disk / "run"))
    assert_refused(coalesce, inputs, recipe, "will write 96,312 bytes", "65,536 are free")
    assert not (small_disk / "run").exists()


@pytest.fixture
def optimist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Free space as it was before somebody else filled the disk."""
    usage = shutil.disk_usage("/")._replace(free=1 << 40)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)


def assert_disk_full(outcome: Outcome, run_dir: Path) -> None:
    assert_one_message(outcome, "no space left on the device while writing", str(run_dir))
    assert "run the same command again" in outcome.err
    assert not [path for path in snapshot(run_dir.parent) if path.endswith(".tmp")]


@pytest.mark.parametrize("pages", [0, 1, 3, 6, 9, 12, 18, 24])
@pytest.mark.usefixtures("optimist")
def test_a_disk_that_fills_up_leaves_no_temporary_file(
    coalesce: Command, inputs: Inputs, small_disk: Path, pages: int
) -> None:
    run_dir = small_disk / "run"
    fill(small_disk, pages << 12)
    assert_disk_full(coalesce("run", inputs.recipe(run_dir=str(run_dir)), "--quiet"), run_dir)


def test_an_event_that_finds_no_space_is_reported_like_any_other_write(
    coalesce: Command, inputs: Inputs
) -> None:
    inputs.run_dir.mkdir()
    (inputs.run_dir / "events.jsonl").symlink_to("/dev/full")
    assert_disk_full(coalesce("run", inputs.recipe(), "--quiet"), inputs.run_dir)


@pytest.mark.slow
@pytest.mark.usefixtures("optimist")
def test_a_run_goes_on_once_there_is_space_again(
    coalesce: Command, inputs: Inputs, small_disk: Path
) -> None:
    run_dir = small_disk / "run"
    recipe = inputs.recipe(run_dir=str(run_dir), model__verify="full")
    filler = fill(small_disk, 96 << 10)
    assert_disk_full(coalesce("run", recipe, "--quiet"), run_dir)
    finished_before = len(list(run_dir.glob("calibration/shards/*.json")))
    filler.unlink()
    outcome = coalesce("run", recipe)
    assert outcome.code == 0, outcome.err
    assert finished_before == 2
    assert "calibrate: resuming: 2/2 done" in outcome.out


def test_a_run_folder_that_cannot_be_written_is_refused(
    coalesce: Command, inputs: Inputs, small_disk: Path
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    recipe = inputs.recipe(run_dir=str(small_disk / "run"))
    assert_refused(coalesce, inputs, recipe, f"nothing can be written to {small_disk}", "run_dir")


def test_a_run_folder_below_a_file_is_refused(coalesce: Command, inputs: Inputs) -> None:
    recipe = inputs.recipe(run_dir=str(inputs.text / "run"))
    assert_refused(coalesce, inputs, recipe, "nothing can be written to", "text.jsonl", "run_dir")


# Code that comes with a checkpoint ----------------------------------------------------------------


@pytest.mark.slow
def test_code_in_a_checkpoint_is_never_executed(coalesce: Command, inputs: Inputs) -> None:
    marker = inputs.root / "executed"
    evil = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    for module in ("configuration_evil", "modeling_evil", "tokenization_evil"):
        (inputs.model / f"{module}.py").write_text(evil)
    inputs.change_config(
        auto_map={
            "AutoConfig": "configuration_evil.MixtralConfig",
            "AutoModelForCausalLM": "modeling_evil.MixtralForCausalLM",
        }
    )
    tokenizer = inputs.model / "tokenizer_config.json"
    auto_map = {"AutoTokenizer": ["tokenization_evil.Tokenizer", "tokenization_evil.Tokenizer"]}
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"auto_map": auto_map}))
    outcome = coalesce("run", inputs.recipe(), "--quiet")
    assert outcome.code == 0, outcome.err
    assert not marker.exists()
    output = inputs.run_dir / "output"
    assert not list(output.glob("*.py"))
    assert "auto_map" not in json.loads((output / "config.json").read_text())


def test_fewer_tokens_than_domains_are_refused(coalesce: Command, inputs: Inputs) -> None:
    outcome = coalesce("run", inputs.recipe(calibrate__data__tokens=1), "--quiet")
    assert outcome.code == 2
    assert "1 tokens leave 1 for domain 'prose'" in outcome.err


def test_a_tokenizer_that_needs_code_is_refused(coalesce: Command, inputs: Inputs) -> None:
    marker = inputs.root / "executed"
    evil = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    (inputs.model / "tokenization_evil.py").write_text(evil)
    (inputs.model / "tokenizer.json").unlink()
    values = {
        "tokenizer_class": "EvilTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_evil.EvilTokenizer", None]},
    }
    (inputs.model / "tokenizer_config.json").write_text(json.dumps(values))
    assert_refused(coalesce, inputs, inputs.recipe(), "no tokenizer can be loaded from")
    assert not marker.exists()
