"""The reload gate: a fresh process opens the checkpoint the way a user would.

This file is run as a script, isolated from the working folder, and imports nothing of Coalesce:
what it can open, anybody can. It prints one JSON object.

Where the whole does not fit into memory it is opened on the meta device: transformers goes through
the same loading, conversion and comparison of names and shapes, and keeps no value.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_TOKENS = (2, 24)  # batch, length of the trial input


def main() -> None:
    """`gate.py FOLDER EXPECTATIONS_JSON`"""
    folder, expected = Path(sys.argv[1]), json.loads(sys.argv[2])
    print(json.dumps(examine(folder, expected)))


def examine(folder: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Opens the folder and says what was found; `problems` is empty when all is well."""
    import torch
    import transformers

    torch.set_num_threads(expected["threads"])
    model, info = getattr(transformers, expected["opens_with"]).from_pretrained(
        folder,
        dtype="auto",
        output_loading_info=True,
        local_files_only=True,
        trust_remote_code=expected["needs_code"],
        **({} if expected["whole"] else {"device_map": "meta"}),
    )
    model.eval()
    faults = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    problems = [f"{key}: {sorted(map(str, info[key]))[:4]}" for key in faults if info.get(key)]
    parameters = sum(tensor.numel() for tensor in _stored(model))
    if parameters != expected["parameters"]:
        problems.append(f"{parameters:,} parameters, expected {expected['parameters']:,}")
    found: dict[str, Any] = {"class": type(model).__name__, "parameters": parameters}
    found["opened"] = "whole" if expected["whole"] else "meta"
    if expected["whole"]:
        found |= _run(model, expected, problems)
    return found | {"problems": problems}


def _run(model: Any, expected: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Looks at every value and at what the model makes of a few tokens."""
    problems += [
        f"{name} is not finite" for name, p in model.named_parameters() if not p.isfinite().all()
    ]
    if not _logits(model).isfinite().all():
        problems.append("logits are not finite")
    if expected["expanded_config"] is None:
        return {}
    difference = _expanded_difference(model, expected["expanded_config"])
    if not difference <= expected["tolerance"]:
        problems.append(f"logits differ from the expanded model's by {difference:.2e}")
    return {"expanded_max_difference": difference}


def _stored(model: Any) -> list[Any]:
    """Parameters, each once, and the floating buffers that checkpoints hold (correction biases)."""
    kept = set(model.state_dict())
    buffers = [b for name, b in model.named_buffers() if name in kept and b.is_floating_point()]
    return [*model.parameters(), *buffers]


def _logits(model: Any) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, _TOKENS, generator=generator)
    inputs = {"input_ids": ids, "use_cache": False}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.inference_mode():
        return model(**inputs).logits.float()


def _expanded_difference(mapped: Any, base_config: dict[str, Any]) -> float:
    """Largest |difference| of logits to a plain model in which every slot is filled, in fp32."""
    # The mapped classes derive from the family's own, which transformers need not have.
    family, plain_config = type(mapped).__bases__[-1], type(mapped.config).__bases__[-1]
    state = mapped.state_dict()
    for name, module in mapped.named_modules():
        if hasattr(module, "dense_tensors"):  # stored as U V + S
            state = {n: t for n, t in state.items() if not n.startswith(f"{name}.") or "_map" in n}
            state |= {f"{name}.{part}": t for part, t in module.dense_tensors().items()}
    for name in [n for n in state if n.endswith(".expert_map")]:
        slots = state.pop(name)
        block = name.removesuffix("expert_map")
        for part in [n for n in state if n.startswith(block)]:
            state[part] = state[part][slots]
    fields = {key: value for key, value in base_config.items() if key != "model_type"}
    plain = family(plain_config(**fields)).float()
    if (
        getattr(mapped.config, "_experts_implementation", None) == "eager"
    ):  # narrow rows suit no other
        plain.set_experts_implementation("eager")
    plain.load_state_dict(state)
    return float((_logits(plain.eval()) - _logits(mapped.float())).abs().max())


if __name__ == "__main__":
    main()
