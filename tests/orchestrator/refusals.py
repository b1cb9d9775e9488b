"""What every refusal of bad input has in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.orchestrator.tiny_run import (
    Command,
    Inputs,
    Outcome,
    snapshot,
)

Damage = Callable[[Inputs], object]


def assert_one_message(outcome: Outcome, *fragments: str) -> None:
    """Exit code 2; one error with these parts on stderr, and nothing that only we can read."""
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("error: "), outcome.err
    assert outcome.err.count("error: ") == 1
    assert "Traceback" not in outcome.err + outcome.out
    for fragment in fragments:
        assert fragment in outcome.err


def assert_refused(
    coalesce: Command,
    inputs: Inputs,
    recipe: Path,
    *fragments: str,
    overrides: tuple[str, ...] = (),
) -> None:
    """`run` and `validate` say the same, and neither leaves a file behind."""
    before = snapshot(inputs.root)
    ran = coalesce("run", recipe, *overrides)
    assert_one_message(ran, *fragments)
    assert snapshot(inputs.root) == before
    assert coalesce("validate", recipe, *overrides).err == ran.err
