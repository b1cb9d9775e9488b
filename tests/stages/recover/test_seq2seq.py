"""An encoder-decoder learns to continue as its original does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stages.corpus.stage import read_blocks
from stages.recover.api import recover
from stages.recover.progress import read_course
from stages.recover.taught import Taught
from stages.recover.teach import teach
from tests.planted_families import planted_model
from tests.stages.recover.small import Small, config, write_text
from tests.tiny import same_bits

FAMILIES = ("switch_transformers", "nllb-moe")


def made(root: Path, family: str) -> Small:
    """The original, and a student whose experts and routers are somewhat off."""
    small = Small(root)
    model = planted_model(family)
    model.save_pretrained(small.original)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".experts." in name:
                value += 0.1 * torch.randn(value.shape, generator=generator)
    model.save_pretrained(small.student)
    write_text(small.corpus)
    return small


@pytest.mark.parametrize("family", FAMILIES)
def test_it_learns_and_only_experts_change(tmp_path: Path, family: str) -> None:
    small = made(tmp_path, family)
    wanted = config(steps=20, alpha=100, mode="experts", learning_rate=0.003)
    taught, states = small.taught(wanted), tmp_path / "states"
    recover(small.student, tmp_path / "out", wanted, small.corpus, taught, scratch=states)
    course = read_course(states / "course.jsonl")
    # Blocks of 10 tokens, of which 5 are continued; one of 5, of which 2.
    assert {line["tokens"] for line in course} == {20, 17}
    assert course[-1]["distillation"] < 0.7 * course[0]["distillation"]
    old, new = (load_file(f / "model.safetensors") for f in (small.student, tmp_path / "out"))
    assert old.keys() == new.keys()
    moved = {name for name in old if not same_bits(old[name], new[name])}
    assert moved and all(".experts." in name for name in moved)


def test_what_the_teacher_says_is_what_its_decoder_says(tmp_path: Path) -> None:
    small = made(tmp_path, "switch_transformers")
    exact = config(temperature=1.0, teacher={"top": None, "dtype": "float32"})
    taught = Taught(teach(small.original, small.corpus, tmp_path / "exact.arrow", exact))
    model = planted_model("switch_transformers")
    for index, block in enumerate(read_blocks(small.corpus)):
        half = (len(block.tokens) + 1) // 2
        read, behind = torch.tensor([block.tokens[:half]]), torch.tensor([block.tokens[half:]])
        with torch.inference_mode():
            said = model(input_ids=read, labels=behind).logits[0].log_softmax(-1)
        kept = taught.block(index)
        found = torch.zeros_like(said).scatter(1, kept.ids, kept.log_probabilities)
        assert torch.allclose(found, said, atol=1e-4), index
