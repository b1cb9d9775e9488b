"""A tiny real checkpoint, tokenizer and text, and the `coalesce` command in this process."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from orchestrator import cli

EXPERTS, TOP_K, LAYERS, HIDDEN, INTERMEDIATE = 8, 2, 2, 32, 16
WORDS = [f"word{i}" for i in range(60)]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Outcome:
    """What a person sees of one command."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@dataclass(frozen=True)
class Inputs:
    """A folder of its own for every test: model, text and recipe, free to be damaged."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def weights(self) -> Path:
        return self.model / "model.safetensors"

    @property
    def text(self) -> Path:
        return self.root / "text.jsonl"

    @property
    def run_dir(self) -> Path:
        return self.root / "run"

    def recipe(self, **changes: Any) -> Path:
        """Writes the recipe; a key `a__b` of `changes` stands for `a.b`."""
        values: dict[str, Any] = {
            "run_dir": str(self.run_dir),
            "model": {"path": str(self.model)},
            "calibrate": {
                "data": {
                    "sources": [{"path": str(self.text), "domain": "prose"}],
                    "tokens": 512,
                    "sequence_length": 16,
                },
                "shards": 2,
                "sample": {"tokens": 48},
            },
            "group": {"method": "mc_smoe", "budget": {"keep_ratio": 0.5}},
            "executor": {"kind": "local"},
        }
        for key, value in changes.items():
            *parents, last = key.split("__")
            place = values
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = value
        path = self.root / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    def source(self, path: Path, **more: Any) -> Path:
        """The recipe with this one source of calibration text."""
        return self.recipe(calibrate__data__sources=[{"path": str(path), **more}])

    def change_weights(self, change: Callable[[Tensors], object]) -> None:
        """Rewrites the weight file after `change` has altered its tensors."""
        tensors = load_file(self.weights)
        change(tensors)
        save_file(tensors, self.weights, metadata={"format": "pt"})

    def change_config(self, **values: Any) -> None:
        """Alters keys of config.json."""
        path = self.model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def split(self) -> Path:
        """Makes the checkpoint a sharded one of two files; returns the index."""
        tensors = load_file(self.weights)
        self.weights.unlink()
        names = sorted(tensors)
        parts = {"part-1.safetensors": names[::2], "part-2.safetensors": names[1::2]}
        for file, members in parts.items():
            save_file({name: tensors[name] for name in members}, self.model / file)
        index = self.model / "model.safetensors.index.json"
        weight_map = {name: file for file, members in parts.items() for name in members}
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return index


def expert(layer: int, index: int, part: str = "w1") -> str:
    """Name of one matrix of one expert on disk."""
    return f"model.layers.{layer}.block_sparse_moe.experts.{index}.{part}.weight"


def router(layer: int) -> str:
    """Name of the router of a layer on disk."""
    return f"model.layers.{layer}.block_sparse_moe.gate.weight"


def write_inputs(root: Path) -> Inputs:
    """A Mixtral of 2 layers and 8 experts with random weights, and sixty documents."""
    from transformers import MixtralConfig, MixtralForCausalLM

    inputs = Inputs(root)
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    MixtralForCausalLM(config).save_pretrained(inputs.model)
    save_tokenizer(inputs.model)
    write_jsonl(inputs.text, [{"text": " ".join(WORDS[i:] + WORDS[:i])} for i in range(60)])
    return inputs


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def snapshot(root: Path) -> dict[str, str]:
    """Relative path -> digest of everything below a folder, hidden files included."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(root.rglob("*"))
    }


def caller(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """The entry point of the `coalesce` script, with its words, streams and exit code."""

    def call(*words: object) -> Outcome:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["coalesce", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
            sys.exit(0)
        out, err = capfd.readouterr()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return Outcome(code or 0, out, err)

    return call


def private_cache(folder: Path, inputs: Inputs) -> Iterator[Inputs]:
    """Keeps the `datasets` library from filling the user's own cache."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield inputs


def save_tokenizer(folder: Path) -> None:
    """The tokenizer of the tiny model: one token per word, 1 ends a text."""
    _tokenizer().save_pretrained(folder)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *WORDS]
    words_model = WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(words_model)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
