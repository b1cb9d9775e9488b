"""Code that comes with a checkpoint is never executed."""

from __future__ import annotations

import json

import pytest

from tests.orchestrator.refusals import assert_refused
from tests.orchestrator.tiny_run import (
    Command,
    Inputs,
)


@pytest.mark.slow
def test_code_in_a_checkpoint_is_never_executed(coalesce: Command, inputs: Inputs) -> None:
    marker = inputs.root / "executed"
    evil = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    for module in ("configuration_evil", "modeling_evil", "tokenization_evil"):
        (inputs.model / f"{module}.py").write_text(evil)
    inputs.change_config(
        auto_map={
            "AutoConfig": "configuration_evil.MixtralConfig",
            "AutoModelForCausalLM": "modeling_evil.MixtralForCausalLM",
        }
    )
    tokenizer = inputs.model / "tokenizer_config.json"
    auto_map = {"AutoTokenizer": ["tokenization_evil.Tokenizer", "tokenization_evil.Tokenizer"]}
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"auto_map": auto_map}))
    outcome = coalesce("run", inputs.recipe(), "--quiet")
    assert outcome.code == 0, outcome.err
    assert not marker.exists()
    output = inputs.run_dir / "output"
    assert not list(output.glob("*.py"))
    assert "auto_map" not in json.loads((output / "config.json").read_text())


def test_a_tokenizer_that_needs_code_is_refused(coalesce: Command, inputs: Inputs) -> None:
    marker = inputs.root / "executed"
    evil = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    (inputs.model / "tokenization_evil.py").write_text(evil)
    (inputs.model / "tokenizer.json").unlink()
    values = {
        "tokenizer_class": "EvilTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_evil.EvilTokenizer", None]},
    }
    (inputs.model / "tokenizer_config.json").write_text(json.dumps(values))
    assert_refused(coalesce, inputs, inputs.recipe(), "no tokenizer can be loaded from")
    assert not marker.exists()
