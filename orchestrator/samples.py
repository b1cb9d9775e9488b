"""The sampled inputs of a run: how large they become, where they lie, and whose they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from models.expert_function import check_function
from models.moe import MoeCheckpoint
from models.tensors import read_metadata
from orchestrator.run_folder import RunFolder
from stages.calibrate.config import CalibrateConfig, SampleConfig
from stages.errors import StatisticsError
from stages.inputs import stage as inputs
from stages.subsample import stage as subsample
from stages.subsample.columns import table_bytes
from stages.subsample.evaluate import CHUNK_BYTES, HELD_BYTES, outputs_bytes, token_bytes

_COMPARED = 4


def settled_sample(config: CalibrateConfig, moe: MoeCheckpoint) -> SampleConfig:
    """What is sampled: nothing where another run observed, and nothing of an encoder-decoder.

    Its encoder reads one half of a block and its decoder the other: no token passes all layers.
    """
    halved = bool(moe.checkpoint.config.get("is_encoder_decoder"))
    off = halved or config.statistics is not None
    return SampleConfig(tokens=0) if off else config.sample


def sampled_tokens(config: CalibrateConfig, moe: MoeCheckpoint) -> int:
    """N; 0 when nothing is sampled."""
    return min(settled_sample(config, moe).count, config.data.tokens)


def available_tokens(folder: RunFolder, config: CalibrateConfig, moe: MoeCheckpoint) -> int:
    """N of this run, or of the run whose statistics are used."""
    if config.statistics is None:
        return sampled_tokens(config, moe)
    found = _complete(observed(folder, config).inputs, inputs.file_name, moe)
    return inputs.tokens_in(found[moe.layers[0]]) if found else 0


def evaluated_tokens(config: CalibrateConfig, moe: MoeCheckpoint) -> int:
    """Those of them that all experts run on; 0 when they run on none."""
    if not config.sample.statistics:
        return 0
    return min(sampled_tokens(config, moe), config.sample.statistics_tokens)


def evaluated(config: CalibrateConfig, moe: MoeCheckpoint) -> bool:
    """Whether all experts run on the sample."""
    return evaluated_tokens(config, moe) > 0


def layer_bytes(config: CalibrateConfig, moe: MoeCheckpoint) -> int:
    """The sampled inputs of one layer: hidden states, k ids and gates, E logits, the place."""
    width = {"auto": 0, "float32": 4}.get(config.dtype, 2)
    width = width or -(-moe.checkpoint.nbytes // moe.checkpoint.parameters)
    row = width * _hidden(moe) + 12 * moe.top_k + 4 * moe.num_experts + 16
    return sampled_tokens(config, moe) * row


def table_size(moe: MoeCheckpoint) -> int:
    """The sums of one layer and domain."""
    neurons = moe.meta_expert(moe.layers[0]).neurons
    return table_bytes(moe.num_experts, _hidden(moe), neurons)


def disk_bytes(config: CalibrateConfig, moe: MoeCheckpoint, domains: int) -> int:
    """What stays on disk: every input in its shard and in its layer's file, and the sums."""
    sums = domains * table_size(moe) if evaluated(config, moe) else 0
    return len(moe.layers) * (2 * layer_bytes(config, moe) + sums)


def scratch_bytes(config: CalibrateConfig, moe: MoeCheckpoint) -> int:
    """Outputs of all experts of a layer on disk while one worker adds them up."""
    size = outputs_bytes(evaluated_tokens(config, moe), moe.num_experts, _hidden(moe))
    return size if evaluated(config, moe) and size > HELD_BYTES else 0


def pair_bytes(config: CalibrateConfig, moe: MoeCheckpoint) -> int:
    """Memory for the outputs of all experts and for one chunk of them."""
    tokens, experts = evaluated_tokens(config, moe), moe.num_experts
    held = min(HELD_BYTES, outputs_bytes(tokens, experts, _hidden(moe)))
    return held + min(CHUNK_BYTES, tokens * token_bytes(experts, _hidden(moe)))


def check(config: CalibrateConfig, moe: MoeCheckpoint) -> None:
    """Refuses experts that cannot be evaluated, before anything is observed.

    Raises:
        CheckpointError: they compute a function that is not known here.
    """
    if not evaluated(config, moe):
        return
    layer = moe.layers[0]
    tensors = moe.read_expert(layer, 0).tensors().values()
    if all(bool(tensor.isfinite().all()) for tensor in tensors):  # else: `verify` names the tensor
        generator = torch.Generator().manual_seed(0)
        check_function(moe, layer, torch.randn(_COMPARED, _hidden(moe), generator=generator))


def layer_inputs(folder: RunFolder, config: CalibrateConfig, moe: MoeCheckpoint) -> dict[int, Path]:
    """Layer -> sampled inputs of this run, or of the run whose statistics are used; may be empty.

    Raises:
        StatisticsError: they were taken from another model than the statistics.
    """
    used = observed(folder, config)
    found = _complete(used.inputs, inputs.file_name, moe)
    if found and config.statistics is not None:
        _refuse_foreign(used, found[moe.layers[0]])
    return found


def subsamples(folder: RunFolder, config: CalibrateConfig, moe: MoeCheckpoint) -> dict[int, Path]:
    """Layer -> sums of all experts on the sample, from where the inputs are; may be empty."""
    return _complete(observed(folder, config).subsample, subsample.file_name, moe)


def observed(folder: RunFolder, config: CalibrateConfig) -> RunFolder:
    """The run that observed: this one, or the one in whose folder the given statistics lie."""
    return folder if config.statistics is None else RunFolder(config.statistics.absolute().parent)


def _complete(folder: Path, name: Callable[[int], str], moe: MoeCheckpoint) -> dict[int, Path]:
    """The files of all layers, or nothing."""
    found = {layer: folder / name(layer) for layer in moe.layers}
    return found if all(path.exists() for path in found.values()) else {}


def _refuse_foreign(used: RunFolder, path: Path) -> None:
    from stages.calibrate.statistics import metadata_of, read_statistics

    wanted = metadata_of(read_statistics(used.statistics))
    try:
        seen = dict(read_metadata(path)["inputs"])
    except Exception as error:  # safetensors has its own types; all mean: not such a file
        raise StatisticsError(f"cannot read layer inputs from {path}: {error}") from error
    if seen != wanted:
        raise StatisticsError(
            f"{path} and {used.statistics} were not observed together:"
            f" {json.dumps(seen)[:80]} and {json.dumps(wanted)[:80]}",
            f"remove {used.inputs}, or copy the whole run folder again",
        )


def _hidden(moe: MoeCheckpoint) -> int:
    return moe.hidden_size
