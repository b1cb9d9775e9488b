"""What a rank of the recovery needs, as the plan says it, and the refusal of too little."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.recover_memory import CASES
from orchestrator import estimate
from orchestrator.load import load
from orchestrator.preflight import prepare
from stages.recover.config import RecoverConfig
from tests.orchestrator.refusals import assert_refused
from tests.orchestrator.tiny_run import Command, Inputs

RECOVER: dict[str, Any] = {"mode": "full", "steps": 4, "batch": 8, "warmup": 1, "micro_batch": 1}
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "recover_memory.json"
FOUND: dict[str, Any] = json.loads(RESULTS.read_text())


def needed(inputs: Inputs, **section: Any) -> int:
    """Bytes of a rank, without what it takes before it opens anything."""
    recipe = inputs.recipe(recover=RECOVER | section, executor__kind="ray")
    return estimate.recover(prepare(load(str(recipe)).config)) - estimate.PROCESS_BYTES


def test_more_ranks_need_less_each(inputs: Inputs) -> None:
    whole = {"deepspeed": {"zero_stage": 0}}
    assert needed(inputs, ranks=2, **whole) == needed(inputs, ranks=4, **whole)
    shared = [needed(inputs, ranks=n, deepspeed={"zero_stage": 3}) for n in (2, 4)]
    assert shared[0] > shared[1]


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_a_close_upper_bound_of_what_was_measured(case: str) -> None:
    config = RecoverConfig(mode="full", batch=2, ranks=FOUND["ranks"], **CASES[case])
    values = FOUND["checkpoint_bytes"] // 4
    # Ten layers, and little beside them.
    planned = estimate.held_by_rank(config, values, values, values // 10)
    (peak,) = (
        row["peak_bytes"] for row in FOUND["rows"] if (row["version"], row["case"]) == ("now", case)
    )
    assert peak < planned < 1.3 * peak


def test_ranks_that_do_not_fit_are_refused_before_any_work(
    coalesce: Command, inputs: Inputs
) -> None:
    recipe = inputs.recipe(recover=RECOVER)
    assert_refused(
        coalesce,
        inputs,
        recipe,
        "the training needs about",
        "in each of 1 rank(s), 300.0 MB are there (calibrate.memory_bytes)",
        "recover.deepspeed.zero_stage=3",
        overrides=("calibrate.memory_bytes=300000000",),
    )
    planned = coalesce("plan", recipe)
    assert planned.code == 0 and "each of 1 rank(s) needs about" in " ".join(planned.out.split())
