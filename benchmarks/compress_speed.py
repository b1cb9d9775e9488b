"""Bytes, memory, FLOPs and tokens/s of one random Mixtral: original, merged, decomposed.

Seconds are those of the processor, so that other work on the machine counts little; on one thread
that has it for itself they are the clock's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from models.mapped.registration import register
from models.moe import MoeCheckpoint
from stages.align.config import AlignConfig
from stages.compress.config import CompressConfig
from stages.compress.layer import shapes
from stages.export.config import ExportConfig
from stages.export.layout import file_layouts
from stages.export.stage import ExportUnit, assemble
from stages.group.decision import LayerDecision, from_labels
from stages.merge.config import MergeConfig
from stages.transform import stage as transform

EXPERTS, LAYERS, STEPS = 8, 2, 16


def original(folder: Path, hidden: int, neurons: int) -> MoeCheckpoint:
    """A Mixtral of 2 layers and 8 experts with random weights in bf16."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=neurons,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        max_position_embeddings=2048,
        pad_token_id=0,
    )
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return MoeCheckpoint.open(folder)


def written(moe: MoeCheckpoint, folder: Path, config: CompressConfig | None) -> Path:
    """The mapped checkpoint of pairs of experts merged, by the product's own stages."""
    decisions = [from_labels(n, [e // 2 * 2 for e in range(EXPERTS)], [1.0] * EXPERTS)
                 for n in moe.layers]  # fmt: skip
    export = ExportConfig(format="mapped", compress=config)
    layouts = file_layouts(moe, decisions, export)
    units = transform.plan(
        moe,
        decisions,
        layouts,
        align=AlignConfig(enabled=False),
        merge=MergeConfig(),
        export=export,
        folder=folder / "layers",
        model="random",
    )
    for unit in units:
        transform.run_one(unit)
    return _assembled(moe, decisions, [unit.output for unit in units], export, folder / "output")


def _assembled(
    moe: MoeCheckpoint,
    decisions: list[LayerDecision],
    files: list[Path],
    export: ExportConfig,
    output: Path,
) -> Path:
    output.mkdir()
    unit = ExportUnit(
        moe=moe,
        decisions=tuple(decisions),
        layouts=tuple(file_layouts(moe, decisions, export)),
        files=tuple(files),
        digests=tuple("-" for _ in files),
        config=export,
        threads=1,
        output=output,
    )
    assemble(unit, output)
    return output


def arithmetic(moe: MoeCheckpoint, folder: Path, config: CompressConfig) -> dict[str, float]:
    """File bytes over what the formulas of docs/compress.md and the other tensors come to."""
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    first = moe.layers[0]
    each = shapes(moe.meta_expert(first), config, first).values()
    experts = sum(2 * shape.values + 8 * shape.kept for shape in each)
    infos = moe.checkpoint.tensors.values()
    rest = sum(info.nbytes for info in infos if not moe.family.is_expert_tensor(info.name))
    maps = 8 * EXPERTS * LAYERS
    return {"bytes_over_arithmetic": stored / (EXPERTS // 2 * LAYERS * experts + rest + maps)}


def expert_bytes(model: Any) -> int:
    """Bytes of routed experts that an opened model holds."""
    state = model.state_dict().items()
    return sum(t.nbytes for name, t in state if ".experts." in name)


def _grouped_flops(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """[P, in] by [K, in, out], each row with one of K; torch counts none of it."""
    return 2 * int(x[0]) * int(weight[-2]) * int(weight[-1])


@torch.inference_mode()
def flops(model: Any, ids: Tensor) -> int:
    """Counted for one forward pass, grouped products included."""
    mapping = {torch.ops.aten._grouped_mm: _grouped_flops}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        model(ids, use_cache=False)
    return int(counter.get_total_flops())


@torch.inference_mode()
def _prefill(model: Any, ids: Tensor) -> float:
    start = time.process_time()
    model(ids, use_cache=False)
    return ids.numel() / (time.process_time() - start)


@torch.inference_mode()
def _decode(model: Any, ids: Tensor) -> float:
    """Tokens a second of `STEPS` steps behind a cached prompt."""
    cache = model(ids, use_cache=True).past_key_values
    last = ids[:, -1:]
    start = time.process_time()
    for _ in range(STEPS):
        found = model(last, past_key_values=cache, use_cache=True)
        last = found.logits[:, -1:].argmax(dim=-1)
    return ids.shape[0] * STEPS / (time.process_time() - start)


def speeds(models: dict[str, Any], repeats: int, tokens: int) -> dict[str, dict[str, float]]:
    """Median tokens/s of every model; the models take turns, so that load hits all alike."""
    prompt, batch = torch.randint(1, 1024, (1, tokens)), torch.randint(1, 1024, (4, 32))
    jobs: dict[str, Callable[[Any], float]] = {
        "prefill": lambda model: _prefill(model, prompt),
        "decode": lambda model: _decode(model, batch),
    }
    seen: dict[str, dict[str, list[float]]] = {name: {job: [] for job in jobs} for name in models}
    for turn in range(repeats + 1):
        for name, model in models.items():
            for job, measure in jobs.items():
                value = measure(model)
                if turn:  # the first turn warms up
                    seen[name][job].append(value)
    return {
        name: {job: statistics.median(values) for job, values in each.items()}
        for name, each in seen.items()
    }


def measure(
    folder: Path, config: CompressConfig, hidden: int, neurons: int, repeats: int, tokens: int
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows per model, and the figures that compare them."""
    register()
    moe = original(folder / "original", hidden, neurons)
    small = written(moe, folder / "small", config)
    places = {
        "original": folder / "original",
        "merged": written(moe, folder / "merged", None),
        "compressed": small,
    }
    models = {
        name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for name, path in places.items()
    }
    ids = torch.randint(1, 1024, (1, tokens))
    counted = {name: flops(model, ids) for name, model in models.items()}
    held = {name: expert_bytes(model) for name, model in models.items()}
    speed = speeds(models, repeats, tokens)
    rows = [
        {
            "model": name,
            "expert_bytes": held[name],
            "gflops": counted[name] / 1e9,
            "prefill_tokens_s": speed[name]["prefill"],
            "decode_tokens_s": speed[name]["decode"],
        }
        for name in models
    ]
    return rows, {
        **arithmetic(moe, small, config),
        "expert_memory_saved": 1 - held["compressed"] / held["original"],
        "flops_over_original": counted["compressed"] / counted["original"],
        "prefill_over_merged": speed["compressed"]["prefill"] / speed["merged"]["prefill"],
        "decode_over_merged": speed["compressed"]["decode"] / speed["merged"]["decode"],
        "prefill_over_original": speed["compressed"]["prefill"] / speed["original"]["prefill"],
        "decode_over_original": speed["compressed"]["decode"] / speed["original"]["decode"],
    }
