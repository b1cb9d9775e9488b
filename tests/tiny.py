"""Small real things to test with: checkpoints of every family, experts, statistics, tokenizers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from hypothesis import settings
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.expert import Expert
from models.moe import MoeCheckpoint
from stages.align.config import AlignConfig
from stages.calibrate.observer import Sums, empty_sums
from stages.calibrate.statistics import LayerStatistics
from stages.export.config import ExportConfig
from stages.export.formats import FORMATS
from stages.export.layout import file_layouts
from stages.group.decision import LayerDecision
from stages.merge.config import MergeConfig
from stages.transform.stage import TransformUnit, plan, run_one

# Reproducible: a failing example is the same on every machine.
PROPERTY = settings(deadline=None, derandomize=True, database=None, max_examples=30)

EXPERTS, TOP_K, HIDDEN, WIDTH, VOCABULARY = 6, 2, 32, 16, 64
FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")

_CLASSES = {
    "mixtral": "Mixtral",
    "olmoe": "Olmoe",
    "qwen2_moe": "Qwen2Moe",
    "qwen3_moe": "Qwen3Moe",
}
# What is particular to a family: shared experts, a dense layer between sparse ones, tied weights.
_PARTICULAR: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": WIDTH},
    "olmoe": {"intermediate_size": WIDTH, "tie_word_embeddings": True},
    "qwen2_moe": {"shared_expert_intermediate_size": 20},
    "qwen3_moe": {
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
        "head_dim": 8,
        "norm_topk_prob": True,
    },
}
MOE_LAYERS = {"mixtral": (0, 1), "olmoe": (0, 1), "qwen2_moe": (0, 1), "qwen3_moe": (0, 2)}


def tiny_config(family: str, **overrides: object) -> Any:
    """A config with 6 experts, top-2, hidden size 32."""
    count = "num_local_experts" if family == "mixtral" else "num_experts"
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        count: EXPERTS,
        "num_experts_per_tok": TOP_K,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if family in ("qwen2_moe", "qwen3_moe"):
        common["moe_intermediate_size"] = WIDTH
    fields = common | _PARTICULAR[family] | overrides
    return getattr(transformers, f"{_CLASSES[family]}Config")(**fields)


def tiny_model(family: str, dtype: torch.dtype = torch.float32, **overrides: object) -> Any:
    """A random model in eval mode."""
    torch.manual_seed(7)
    model = getattr(transformers, f"{_CLASSES[family]}ForCausalLM")
    return model(tiny_config(family, **overrides)).to(dtype).eval()


def save_tiny(
    folder: Path, family: str, dtype: torch.dtype = torch.float32, **overrides: object
) -> Path:
    """A random checkpoint as `save_pretrained` writes it."""
    tiny_model(family, dtype, **overrides).save_pretrained(folder)
    return folder


def random_ids(rows: int, length: int, seed: int = 0, vocabulary: int = VOCABULARY) -> Tensor:
    """[rows, length] token ids without the padding token."""
    return torch.randint(1, vocabulary, (rows, length), generator=_generator(seed))


def open_model(folder: Path) -> Any:
    """The checkpoint as transformers opens it, in its own dtype."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """[B, S, V] logits without gradients."""
    with torch.inference_mode():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def random_expert(
    neurons: int,
    hidden: int,
    seed: int,
    *,
    gated: bool = True,
    biases: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Expert:
    """An expert with normal weights; all its neurons differ."""
    generator = _generator(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return Expert(
        up=normal(neurons, hidden),
        down=normal(hidden, neurons),
        gate=normal(neurons, hidden) if gated else None,
        up_bias=normal(neurons) if biases else None,
        gate_bias=normal(neurons) if biases and gated else None,
        down_bias=normal(hidden) if biases else None,
    )


def random_permutation(count: int, seed: int) -> Tensor:
    """A seeded permutation of 0..count-1."""
    return torch.randperm(count, generator=_generator(seed))


def random_input(rows: int, hidden: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[rows, hidden] normal values."""
    return torch.randn(rows, hidden, generator=_generator(seed), dtype=torch.float64).to(dtype)


def apply(expert: Expert, x: Tensor) -> Tensor:
    """[T, H] -> [T, H]: the function of an expert, written out."""
    up = F.linear(x, expert.up, expert.up_bias)
    if expert.gate is None:
        neurons = F.relu(up)
    else:
        neurons = F.silu(F.linear(x, expert.gate, expert.gate_bias)) * up
    return F.linear(neurons, expert.down, expert.down_bias)


def same(a: Expert, b: Expert) -> bool:
    """Equal bit for bit, tensor by tensor."""
    ours, theirs = a.tensors(), b.tensors()
    return ours.keys() == theirs.keys() and all(same_bits(ours[n], theirs[n]) for n in ours)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal type and values; the sign of a zero counts."""
    return a.dtype == b.dtype and a.equal(b) and a.signbit().equal(b.signbit())


def statistics_of(
    layer: int, selected: Sequence[int], logits: np.ndarray[Any, Any] | None = None
) -> LayerStatistics:
    """Statistics of a layer with given selections and router logits [T, E]."""
    sums: Sums = empty_sums(len(selected))
    sums["selected"][:] = selected
    sums["tokens"][:] = max(sum(selected), 1)
    if logits is None:
        logits = np.random.default_rng(layer).normal(size=(64, len(selected)))
    sums["logit_gram"] = logits.T @ logits
    return LayerStatistics(layer, sums)


def transform_units(
    moe: MoeCheckpoint,
    decisions: Sequence[LayerDecision],
    folder: Path,
    export: ExportConfig,
    *,
    aligned: bool = True,
    weights: Any = "frequency",
    inputs: Mapping[int, tuple[Path, str]] | None = None,
) -> list[TransformUnit]:
    """The units that write an output, one per file."""
    return plan(
        moe,
        decisions,
        file_layouts(moe, decisions, export),
        align=AlignConfig(enabled=aligned),
        merge=MergeConfig(weights=weights),
        export=export,
        folder=folder / "layers",
        model="fingerprint",
        inputs=inputs,
    )


def compress(
    moe: MoeCheckpoint,
    decisions: Sequence[LayerDecision],
    folder: Path,
    export: ExportConfig | None = None,
    *,
    aligned: bool = True,
    weights: Any = "frequency",
    inputs: Mapping[int, tuple[Path, str]] | None = None,
) -> Path:
    """Transforms every file and joins them to a single-file checkpoint folder."""
    export = export or ExportConfig()
    units = transform_units(
        moe, decisions, folder, export, aligned=aligned, weights=weights, inputs=inputs
    )
    tensors: dict[str, Tensor] = {}
    for unit in units:
        run_one(unit)
        tensors |= load_file(unit.output)
    form = FORMATS[export.format]
    output = folder / "output"
    output.mkdir()
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    (output / "config.json").write_text(json.dumps(form.config_json(moe, decisions, export)))
    return output


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
