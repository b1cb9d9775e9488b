"""The names of transformers that it does not document: its own way from a checkpoint into memory.

Nothing else in Coalesce imports them. Tested with transformers 5.22.0 and 5.23.0 (pyproject.toml
admits no other minor version); `tests/models/test_streaming.py` compares logits bit for bit with
`from_pretrained`, so that a release that changes one of them is noticed there:
`core_model_loading.{WeightConverter, WeightRenaming, convert_and_load_state_dict_in_model,
rename_source_key}`, `conversion_mapping.get_model_conversion_mapping`,
`modeling_utils.LoadStateDictConfig`, and of a model `_get_dtype_plan`, `_init_weights`,
`_adjust_missing_and_unexpected_keys`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn


class Converter:
    """Puts tensors of a checkpoint into a model that was built on the meta device.

    A family's renaming, fusing and splitting are those that `from_pretrained` applies.
    """

    def __init__(self, model: Any, dtype: torch.dtype, device: torch.device) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
        from transformers.modeling_utils import LoadStateDictConfig

        mapping = get_model_conversion_mapping(model)
        self._model = model
        self._device = device
        self._renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        self._converters = [each for each in mapping if isinstance(each, WeightConverter)]
        self._names = model.state_dict()
        self._config = LoadStateDictConfig(
            dtype=dtype,
            # Some families keep a few tensors in fp32 whatever the model's type is.
            dtype_plan=model._get_dtype_plan(dtype),
            device_map={"": device},
            weight_mapping=mapping,
        )

    def memory_name(self, name: str) -> str | None:
        """The parameter that a tensor on disk becomes (a part of); None if the model has none."""
        from transformers.core_model_loading import rename_source_key

        prefix = self._model.base_model_prefix
        for renamings, converters in ((self._renamings, self._converters), ([], [])):
            found, _ = rename_source_key(name, renamings, converters, prefix, self._names)
            if found in self._names:
                return str(found)
        return None

    def load(self, tensors: Mapping[str, Any]) -> tuple[list[str], set[str]]:
        """Converts a subset of the checkpoint, given as safetensors slices.

        Returns:
            what went wrong, in words; and the parameters that are still missing in the whole model.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        # Parameters stay ordinary tensors even when the caller runs in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            info, _ = convert_and_load_state_dict_in_model(self._model, tensors, self._config)
        missing = set(info.missing_keys)
        self._model._adjust_missing_and_unexpected_keys(info)
        wrong = [f"unexpected tensor {name}" for name in sorted(info.unexpected_keys)]
        wrong += [
            f"{name} has shape {list(found)}, config.json promises {list(promised)}"
            for name, found, promised in sorted(info.mismatched_keys)
        ]
        errors = info.conversion_errors.items()
        wrong += [f"{name} cannot be converted: {_last_line(text)}" for name, text in errors]
        return wrong + list(info.error_msgs), missing

    def restore_buffers(self, module: nn.Module) -> list[str]:
        """Computes the buffers that no checkpoint holds, as the family initialises them.

        Returns:
            the names of those that the family's initialisation left unset.
        """
        unset = []
        for path, each in module.named_modules():
            buffers = dict(_computed_buffers(each))
            # Ordinary tensors, like parameters, even when the caller runs in inference mode.
            with torch.inference_mode(False), torch.no_grad():
                for name, buffer in buffers.items():
                    each._buffers[name] = _unset(buffer, self._device)
                if buffers:
                    self._model._init_weights(each)
            now = {name: each.get_buffer(name) for name in buffers}
            unset += [f"{path}.{name}" for name, b in now.items() if _is_unset(b)]
        return unset


def _computed_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Non-persistent buffers of one module that have no memory."""
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.is_meta and name in module._non_persistent_buffers_set:
            yield name, buffer


def _unset(buffer: torch.Tensor, device: torch.device) -> torch.Tensor:
    """NaN where the type has one: what nothing is written to would otherwise be whatever it was."""
    value = float("nan") if buffer.is_floating_point() else 0
    return torch.full_like(buffer, value, device=device)


def _is_unset(buffer: torch.Tensor) -> bool:
    return buffer.is_floating_point() and bool(buffer.isnan().any())


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
