"""A causal LM of which one decoder layer is in memory at a time.

Every number comes from the family's own code: the model's forward runs with its layers replaced by
stubs, which yields the arguments (masks, rotary embeddings, positions) of each layer; layers then
run one by one on hidden states that the caller keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.checkpoint import FLOAT_BYTES, Checkpoint
from models.classes import prepare_classes
from models.errors import CheckpointError
from models.partial import is_needed, narrow, needed_part
from models.streaming.private import Converter

_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_REST = None


@dataclass(frozen=True)
class LayerCall:
    """How the model calls one of its layers: everything but the hidden states."""

    hidden: Tensor  # [B, S, H] what stood for the hidden states; the embeddings for layer 0
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, H], or what else the family hands on (`StreamedModel.states`)."""
        output = layer(hidden, *self.args, **self.kwargs)
        found: Tensor = output[0] if isinstance(output, tuple) else output
        return found

    def without_hidden(self) -> LayerCall:
        """The call with the shape and type of its hidden states only."""
        return replace(self, hidden=self.hidden.to("meta"))


def hidden_of(states: Tensor) -> Tensor:
    """[B, S, H], the hidden states, of [B, S, H] or [B, S, n, H]."""
    return states[:, :, 0] if states.ndim == 4 else states


def argument_bytes(calls: Sequence[LayerCall]) -> int:
    """Memory of everything that the calls hold besides hidden states, shared tensors once."""
    tensors = (t for call in calls for t in _tensors([call.args, call.kwargs]))
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


class StreamedModel:
    """Embeddings, final norm and head are resident; decoder layers come and go.

    Args:
        checkpoint: the folder; its safetensors are read through transformers' own conversion.
        dtype: `auto` (as stored), `float32`, `bfloat16` or `float16`, as in `from_pretrained`.
        device: where the resident part and the current layer live.
        experts: the only ones to be read in every layer (`models/partial.py`); None: all.
        layers_only: nothing is resident; layers can be read and no model can be run.

    Raises:
        CheckpointError: a tensor is unexpected, missing or of another shape; the family has no
            plain list of decoder layers.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: str = "auto",
        device: str | torch.device = "cpu",
        *,
        experts: range | None = None,
        layers_only: bool = False,
    ) -> None:
        self._checkpoint = checkpoint
        self._experts = experts
        self.device = torch.device(device)
        self.model, self.dtype = _build(checkpoint, dtype)
        self._prefix, self.layers = _decoder_layers(self.model)
        if experts is not None:
            narrow(self.layers, experts)
        self._converter = Converter(self.model, self.dtype, self.device)
        self._names = self._group_names()
        if not layers_only:
            self._load_rest()

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config

    @property
    def states(self) -> int:
        """Vectors of size H that a layer hands on for each token: the hidden state, and momentum.

        Where there are several, layers take and give `[B, S, states, H]`; the hidden state is the
        first, and `[B, S, H]` stands for it alone, in front of the first layer and behind the last.
        """
        return 1 + int(getattr(self.config, "momentum_parts", 0))

    def layer_name(self, index: int) -> str:
        """The path of a decoder layer in the model."""
        return f"{self._prefix}.{index}"

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Within the context a decoder layer is in memory."""
        try:
            yield self.load(index)
        finally:
            self.layers[index].to("meta")

    def load(self, index: int) -> nn.Module:
        """A decoder layer, in memory from now on."""
        layer = self.layers[index]
        wrong, _ = self._read(self._names.get(index, {}))
        self._refuse(wrong, layer, self.layer_name(index))
        return layer

    @torch.inference_mode()
    def calls(self, **inputs: Any) -> list[LayerCall]:
        """What the model passes to each of its layers for these inputs (`[B, S]` ids and mask)."""
        found: list[LayerCall] = []

        def stub(_: int, *args: Any, **kwargs: Any) -> Tensor:
            found.append(_as_call(args, dict(kwargs)))
            return found[-1].hidden

        with self._stubs(stub):
            self.model.base_model(use_cache=False, **inputs)
        if len(found) != len(self.layers):
            raise CheckpointError(
                f"{self.config.model_type} calls {len(found)} of its {len(self.layers)} layers",
                "set `calibrate.engine=resident`: this family cannot be streamed",
            )
        return found

    @torch.inference_mode()
    def logits(self, hidden: Tensor, **inputs: Any) -> Tensor:
        """[B, S, V]: the model's own final norm and head on what its last layer gave."""
        return self._headed(hidden, **inputs)

    def head(self, hidden: Tensor) -> Tensor:
        """[n, V] logits of [n, H] hidden states behind the last layer, each for itself.

        A gradient may pass through; the model's own tensors get none.
        """
        self.model.requires_grad_(False)
        ids = torch.zeros(len(hidden), 1, dtype=torch.int64, device=self.device)
        return self._headed(hidden[:, None], input_ids=ids)[:, 0]

    def _headed(self, hidden: Tensor, **inputs: Any) -> Tensor:
        def stub(index: int, *args: Any, **kwargs: Any) -> Tensor:
            last = index == len(self.layers) - 1
            return hidden if last else _as_call(args, dict(kwargs)).hidden

        with self._stubs(stub):
            found: Tensor = self.model(use_cache=False, **inputs).logits
        return found

    @contextmanager
    def _stubs(self, stub: Callable[..., Tensor]) -> Iterator[None]:
        """Layers keep what the model may ask them for (types, indices), only they do not run."""
        for index, layer in enumerate(self.layers):
            layer.forward = partial(stub, index)
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward  # the class's own method shows again

    def _group_names(self) -> dict[int | None, dict[str, str]]:
        """Decoder layer -> names on disk, each with the name of the parameter that it becomes (a
        part of); None: everything else, unknown names included."""
        groups: dict[int | None, dict[str, str]] = {_REST: {}}
        start = f"{self._prefix}."
        for name in self._checkpoint.tensors:
            if self._experts is not None and not is_needed(name, self._experts):
                continue
            memory = self._converter.memory_name(name) or ""
            number = memory.removeprefix(start).partition(".")[0]
            is_layer = memory.startswith(start) and number.isdigit()
            groups.setdefault(int(number) if is_layer else _REST, {})[name] = memory
        return groups

    def _load_rest(self) -> None:
        wrong, missing = self._read(self._names[_REST])
        self.model.tie_weights(missing_keys=missing, recompute_mapping=False)
        # Layers are set aside, so that only what stays is looked at.
        with _without_layers(self.model, self._prefix):
            self._refuse(wrong, self.model, "")

    def _read(self, names: Mapping[str, str]) -> tuple[list[str], set[str]]:
        """Loads tensors; the files are closed again, so that their pages can be given back."""
        from safetensors import SafetensorError, safe_open

        checkpoint, infos = self._checkpoint, [self._checkpoint.tensors[n] for n in names]
        try:
            with ExitStack() as stack:
                files = {
                    file: stack.enter_context(safe_open(checkpoint.path(file), framework="pt"))
                    for file in sorted({info.file for info in infos})
                }
                slices = {info.name: files[info.file].get_slice(info.name) for info in infos}
                if self._experts is not None:
                    slices = {
                        name: needed_part(name, names[name], tensor, self._experts)
                        for name, tensor in slices.items()
                    }
                return self._converter.load(slices)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {checkpoint.folder}: {error}") from error

    def _refuse(self, wrong: Sequence[str], module: nn.Module, prefix: str) -> None:
        """Nothing runs on a tensor that is not there or not what config.json promises."""
        unset = [f"buffer {name} is not set" for name in self._converter.restore_buffers(module)]
        tensors = chain(module.named_parameters(prefix), module.named_buffers(prefix))
        lost = [f"tensor {name} is missing" for name, tensor in tensors if tensor.is_meta]
        problems = [*wrong, *lost, *unset]
        if problems:
            raise CheckpointError(
                f"{self._checkpoint.folder}: {len(problems)} tensor(s) do not fit, first:"
                f" {problems[0]}",
                "download the checkpoint again, or correct config.json",
            )


def _build(checkpoint: Checkpoint, dtype: str) -> tuple[Any, torch.dtype]:
    """The model without memory, in the type it will run in. Code in the folder is never run."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    prepare_classes(checkpoint.config)
    try:
        config = AutoConfig.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=False
        )
        kind = _type_of(checkpoint, config) if dtype == "auto" else getattr(torch, dtype)
        # The logits of routers are read where they are made; collecting them again needs layers.
        if hasattr(config, "output_router_logits"):
            config.output_router_logits = False
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=kind, trust_remote_code=False)
    except Exception as error:  # whatever a value of the wrong kind leads to inside transformers
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'} makes no model: {' '.join(str(error).split())}",
            "download config.json again",
        ) from error
    return model.eval(), kind


def _type_of(checkpoint: Checkpoint, config: Any) -> torch.dtype:
    """As `from_pretrained(dtype="auto")`: what config.json says, else the first weights' type."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    first = next(info for info in checkpoint.tensors.values() if info.dtype in FLOAT_BYTES)
    kind: torch.dtype = getattr(torch, _TYPES[first.dtype])
    return kind


def _decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """Path and modules of the one list that is as long as the config says the model is deep."""
    depth, base = model.config.num_hidden_layers, model.base_model
    found = [
        (name, each)
        for name, each in base.named_children()
        if isinstance(each, nn.ModuleList) and len(each) == depth
    ]
    if len(found) != 1:
        raise CheckpointError(
            f"{model.config.model_type} has {len(found)} lists of {depth} decoder layers",
            "set `calibrate.engine=resident`: this family cannot be streamed",
        )
    name, layers = found[0]
    return f"{model.base_model_prefix}.{name}", layers


@contextmanager
def _without_layers(model: Any, path: str) -> Iterator[None]:
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    layers = getattr(owner, name)
    setattr(owner, name, nn.ModuleList())
    try:
        yield
    finally:
        setattr(owner, name, layers)


def _as_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerCall:
    if args:
        return LayerCall(args[0], args[1:], kwargs)
    return LayerCall(kwargs.pop("hidden_states"), (), kwargs)


def open_streamed(folder: Path, dtype: str, **parts: Any) -> StreamedModel:
    """A streamed causal LM on this worker's device; `parts` as in `StreamedModel`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Links were looked at when the run was prepared.
    return StreamedModel(Checkpoint.open(folder, allow_links=True), dtype, device, **parts)
