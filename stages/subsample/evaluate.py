"""All experts of a layer on the sampled tokens, one expert in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from models.atomic import attempt, reporting_full_disk
from models.expert_function import activation, activations, output
from models.moe import MoeCheckpoint
from stages.inputs.read import LayerInputs
from stages.subsample.columns import Sums, empty_sums
from stages.subsample.pairs import chunk_sums

# Outputs of all experts stay in memory up to this size and lie in a file beyond it.
HELD_BYTES = 256 << 20
# What a chunk takes while its pairs are added up.
CHUNK_BYTES = 256 << 20
# Tokens that pass an expert at a time.
_PASSED = 1024


@torch.inference_mode()
def layer_sums(moe: MoeCheckpoint, inputs: LayerInputs, beside: Path) -> dict[str, Sums]:
    """Domain -> sums over its sampled tokens, in float64.

    Experts run in float32, whatever type the model ran in. Weights are read once.

    Args:
        beside: the file that the sums will become; outputs that do not fit lie beside it.
    """
    first = moe.read_expert(inputs.layer, 0)
    hidden, neurons = inputs.hidden.shape[1], first.neurons
    sums = {name: empty_sums(moe.num_experts, hidden, neurons) for name in inputs.domains}
    with _room((moe.num_experts, len(inputs), hidden), beside) as outputs:
        _evaluate(moe, inputs, outputs, sums)
        for domain in inputs.domains:
            _add_pairs(inputs, inputs.rows_of(domain), outputs, sums[domain])
    return sums


def chunk_tokens(experts: int, hidden: int) -> int:
    """Tokens of a chunk."""
    return max(1, CHUNK_BYTES // token_bytes(experts, hidden))


def token_bytes(experts: int, hidden: int) -> int:
    """One token in a chunk: its outputs and two copies, three matrices of pairs, in float64."""
    return 24 * experts * (hidden + experts)


def outputs_bytes(tokens: int, experts: int, hidden: int) -> int:
    """Bytes of the outputs of all experts, float32."""
    return 4 * tokens * experts * hidden


def _evaluate(
    moe: MoeCheckpoint, inputs: LayerInputs, outputs: Tensor, sums: dict[str, Sums]
) -> None:
    """Fills `outputs` [E, N, H]; adds up neurons where their expert was selected."""
    device, act = _device(), activation(moe.checkpoint.config)
    hidden, gates = inputs.hidden.float().to(device), inputs.dense_gates()
    for index in range(moe.num_experts):
        expert = moe.read_expert(inputs.layer, index).map(lambda t: t.float().to(device))
        selected = (inputs.ids == index).any(dim=1)
        for start in range(0, len(inputs), _PASSED):
            rows = slice(start, start + _PASSED)
            neurons = activations(expert, hidden[rows], act)
            outputs[index, rows] = output(expert, neurons).cpu()
            _add_neurons(inputs, rows, selected, gates[:, index], neurons, index, sums)
        lengths = expert.down.double().square().sum(0).numpy(force=True)  # [I] of the columns
        for each in sums.values():
            each["neuron_output"][index] = each["neuron_gated"][index] * lengths


def _add_neurons(
    inputs: LayerInputs,
    rows: slice,
    selected: Tensor,
    gates: Tensor,
    neurons: Tensor,
    index: int,
    sums: dict[str, Sums],
) -> None:
    """Squared activations `[T, I]` of the rows that selected the expert, by domain."""
    for code, domain in enumerate(inputs.domains):
        mask = selected[rows] & (inputs.domain[rows] == code)
        if mask.any():
            squares = neurons[mask.to(neurons.device)].double().square()
            weights = gates[rows][mask].square().to(neurons.device)
            sums[domain]["neuron_energy"][index] += squares.sum(0).numpy(force=True)
            sums[domain]["neuron_gated"][index] += (weights @ squares).numpy(force=True)


def _add_pairs(inputs: LayerInputs, rows: Tensor, outputs: Tensor, sums: Sums) -> None:
    """Adds the chunks of one domain's tokens, in their order."""
    device, gates = _device(), inputs.gates.double()
    size = chunk_tokens(outputs.shape[0], outputs.shape[2])
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        values = outputs[:, some].to(device).transpose(0, 1).double()
        found = chunk_sums(values, inputs.ids[some].to(device), gates[some].to(device))
        for name, value in found.items():
            sums[name] += value.numpy(force=True)


@contextmanager
def _room(shape: tuple[int, int, int], beside: Path) -> Iterator[Tensor]:
    """`[E, N, H]` float32, in memory or mapped from a file that is gone afterwards."""
    size = outputs_bytes(shape[1], shape[0], shape[2])
    if size <= HELD_BYTES:
        yield torch.empty(shape)
        return
    path = beside.with_name(f".{beside.name}.{attempt()}.outputs.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # All blocks are taken first: on a full disk, writing to a mapping would kill the process.
        with reporting_full_disk(path), path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
        yield torch.from_file(str(path), shared=True, size=size // 4).view(shape)
    finally:
        path.unlink(missing_ok=True)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
