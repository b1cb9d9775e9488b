"""The subsample's sums against the family's own modules, chunked in any way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from models.arrow import write_table
from models.errors import CheckpointError
from models.moe import MoeCheckpoint
from models.tensors import write_tensors
from stages.errors import StatisticsError
from stages.inputs.read import LayerInputs
from stages.subsample import evaluate
from stages.subsample.columns import VECTORS, Sums, empty_sums, table_bytes
from stages.subsample.read import SubsampleStatistics
from stages.subsample.stage import SubsampleUnit, run_one
from tests.tiny import EXPERTS, FAMILIES, HIDDEN, MOE_LAYERS, TOP_K, WIDTH, open_model, save_tiny

TOKENS, DOMAINS = 23, ("code", "prose")


def write_inputs(path: Path, layer: int, dtype: torch.dtype = torch.float32) -> LayerInputs:
    """Random tokens of two domains, routed at random."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(TOKENS, EXPERTS, generator=generator)
    gates, ids = logits.softmax(-1).topk(TOP_K)
    tensors = {
        "hidden": torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype),
        "ids": ids,
        "gates": gates,
        "logits": logits,
        "block": torch.arange(TOKENS),
        "position": torch.zeros(TOKENS, dtype=torch.int32),
        "domain": torch.tensor([0] * 9 + [1] * (TOKENS - 9), dtype=torch.int32),
    }
    write_tensors(
        path, tensors, {"layer": layer, "domains": DOMAINS, "seed": 3, "inputs": {"corpus": "c"}}
    )
    return LayerInputs.read(path)


def unit_of(
    root: Path, family: str, dtype: torch.dtype = torch.float32, **overrides: object
) -> SubsampleUnit:
    if not (root / "model").exists():
        save_tiny(root / "model", family, dtype, **overrides)
    moe = MoeCheckpoint.open(root / "model")
    write_inputs(root / "inputs.safetensors", moe.layers[-1], dtype)
    return SubsampleUnit(
        moe=moe,
        layer=moe.layers[-1],
        inputs=root / "inputs.safetensors",
        upstream="u",
        model="abc",
        threads=1,
        output=root / "out" / "layer.arrow",
    )


def written(unit: SubsampleUnit) -> SubsampleStatistics:
    run_one(unit)
    return SubsampleStatistics.read(unit.output)


@torch.inference_mode()
def oracle(unit: SubsampleUnit) -> dict[str, Sums]:
    """Token by token and pair by pair; outputs by the transformers module, neurons by hand."""
    inputs = LayerInputs.read(unit.inputs)
    model = open_model(unit.moe.checkpoint.folder).float()
    block = unit.moe.family.memory_block
    module = model.get_submodule(f"model.layers.{unit.layer}.{block}.experts")
    hidden, gates = inputs.hidden.float(), inputs.dense_gates().numpy()
    one = torch.ones(TOKENS, 1)
    outputs = [module(hidden, (one * e).long(), one).double().numpy() for e in range(EXPERTS)]
    sums = {domain: empty_sums(EXPERTS, HIDDEN, WIDTH) for domain in DOMAINS}
    for t in range(TOKENS):
        total = sums[DOMAINS[int(inputs.domain[t])]]
        f, g = [outputs[e][t] for e in range(EXPERTS)], gates[t]
        for i in range(EXPERTS):
            chosen = i in inputs.ids[t]
            expert = unit.moe.read_expert(unit.layer, i).map(torch.Tensor.float)
            assert expert.gate is not None
            neurons = torch.nn.functional.silu(expert.gate @ hidden[t]) * (expert.up @ hidden[t])
            energy = neurons.double().square().numpy()
            total["sampled"][i] += 1
            total["sampled_selected"][i] += chosen
            total["mean_output"][i] += f[i]
            total["routed_output"][i] += chosen * f[i]
            total["output_sq"][i] += f[i] @ f[i]
            total["gated_energy"][i] += g[i] ** 2 * (f[i] @ f[i])
            total["neuron_energy"][i] += chosen * energy
            total["neuron_gated"][i] += g[i] ** 2 * energy
            columns = expert.down.double().square().sum(0).numpy()
            total["neuron_output"][i] += g[i] ** 2 * energy * columns
            for j in range(EXPERTS):
                distance = (f[i] - f[j]) @ (f[i] - f[j])
                total["swap"][i, j] += g[i] ** 2 * distance
                total["both"][i, j] += g[i] * g[j] * distance
                total["gated_gram"][i, j] += g[i] * g[j] * (f[i] @ f[j])
                total["output_gram"][i, j] += f[i] @ f[j]
                total["cosine"][i, j] += f[i] @ f[j] / np.sqrt((f[i] @ f[i]) * (f[j] @ f[j]))
    return sums


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_are_those_of_the_family_s_own_experts(family: str, tmp_path: Path) -> None:
    unit = unit_of(tmp_path, family)

    found = written(unit)

    assert (found.layer, sorted(found.domains)) == (MOE_LAYERS[family][-1], list(DOMAINS))
    for domain, expected in oracle(unit).items():
        for name, values in expected.items():
            got = found.domains[domain][name]
            assert got.dtype == values.dtype and got.shape == values.shape, name
            scale = float(np.abs(values).max())
            np.testing.assert_allclose(got, values, rtol=0, atol=1e-5 * scale, err_msg=name)


def test_half_precision_weights_run_in_float32(tmp_path: Path) -> None:
    unit = unit_of(tmp_path, "mixtral", torch.bfloat16)
    found, expected = written(unit), oracle(unit)
    for domain in DOMAINS:
        np.testing.assert_allclose(
            found.domains[domain]["mean_output"], expected[domain]["mean_output"], atol=1e-5
        )


@pytest.mark.parametrize("name", ["gelu", "relu"])
def test_the_activation_is_the_one_of_the_config(name: str, tmp_path: Path) -> None:
    unit = unit_of(tmp_path, "qwen3_moe", hidden_act=name)
    found, expected = written(unit), oracle(unit)
    for domain in DOMAINS:
        np.testing.assert_allclose(
            found.domains[domain]["output_gram"], expected[domain]["output_gram"], rtol=1e-4
        )


@pytest.mark.parametrize(
    ("bound", "value"), [("CHUNK_BYTES", 1), ("CHUNK_BYTES", 20_000), ("_PASSED", 4)]
)
def test_chunks_change_nothing_but_rounding(
    bound: str, value: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = unit_of(tmp_path, "olmoe")
    whole = written(unit)
    monkeypatch.setattr(evaluate, bound, value)
    for domain, sums in written(unit).domains.items():
        for name, values in sums.items():
            expected = whole.domains[domain][name]
            scale = float(np.abs(expected).max())
            np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6 * scale, err_msg=name)


def test_outputs_that_do_not_fit_lie_in_a_file_and_the_bytes_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = unit_of(tmp_path, "mixtral")
    run_one(unit)
    expected = unit.output.read_bytes()
    mapped: list[bool] = []
    own = torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda *a, **k: mapped.append(True) or own(*a, **k))
    monkeypatch.setattr(evaluate, "HELD_BYTES", 0)

    run_one(unit)

    assert mapped and unit.output.read_bytes() == expected
    assert [path.name for path in unit.output.parent.iterdir()] == ["layer.arrow"]


def test_the_chunk_of_the_largest_models_stays_within_its_bound() -> None:
    for experts, hidden in ((8, 4096), (128, 2048), (256, 7168), (384, 7168)):
        count = evaluate.chunk_tokens(experts, hidden)
        assert count >= 1
        assert count * evaluate.token_bytes(experts, hidden) <= evaluate.CHUNK_BYTES


def test_a_function_that_is_not_the_family_s_is_refused_with_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = unit_of(tmp_path, "mixtral")
    monkeypatch.setattr(
        "models.expert_function.activation", lambda _: lambda gate, up: gate.relu() * up
    )
    with pytest.raises(CheckpointError, match=r"layer 1 compute something else .* differ by 0\.\d"):
        run_one(unit)
    assert not unit.output.exists()


def test_domains_are_summed_with_their_weights(tmp_path: Path) -> None:
    found = written(unit_of(tmp_path, "mixtral"))
    code, prose = (found.domains[domain] for domain in DOMAINS)

    plain, weighted = found.summed(), found.summed({"prose": 0.25})

    assert plain["sampled"].tolist() == [TOKENS] * EXPERTS
    assert plain["sampled"].dtype == np.int64
    for name, values in code.items():
        np.testing.assert_array_equal(plain[name], values + prose[name])
        np.testing.assert_array_equal(weighted[name], values + 0.25 * prose[name])
    errors = found.pair_errors()
    np.testing.assert_array_equal(errors.remap, plain["swap"].T)


def test_size_and_provenance_are_those_that_are_documented(tmp_path: Path) -> None:
    unit = unit_of(tmp_path, "mixtral")
    run_one(unit)
    table = pa.ipc.open_file(unit.output).read_all()
    keys: Any = table.select(["domain", "layer", "expert"])
    assert table.nbytes - keys.nbytes == 2 * table_bytes(EXPERTS, HIDDEN, WIDTH)
    found = SubsampleStatistics.read(unit.output)
    assert found.metadata == {"corpus": "c", "model": "abc", "seed": "3"}


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.arrow").write_bytes(b"nothing")
    write_table(tmp_path / "other.arrow", pa.table({"sampled": [1]}))
    with pytest.raises(StatisticsError, match="cannot read subsample"):
        SubsampleStatistics.read(tmp_path / "bad.arrow")
    with pytest.raises(StatisticsError, match=f"lacks sampled_selected, .*{VECTORS[-1]}"):
        SubsampleStatistics.read(tmp_path / "other.arrow")
