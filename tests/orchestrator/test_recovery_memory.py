"""What a rank of the recovery needs, as the plan says it, and the refusal of too little."""

from __future__ import annotations

from typing import Any

from orchestrator import estimate
from orchestrator.load import load
from orchestrator.preflight import prepare
from tests.orchestrator.refusals import assert_refused
from tests.orchestrator.tiny_run import Command, Inputs

RECOVER: dict[str, Any] = {"mode": "full", "steps": 4, "batch": 8, "warmup": 1, "micro_batch": 1}


def needed(inputs: Inputs, **section: Any) -> int:
    """Bytes of a rank, without what it takes before it opens anything."""
    recipe = inputs.recipe(recover=RECOVER | section, executor__kind="ray")
    return estimate.recover(prepare(load(str(recipe)).config)) - estimate.PROCESS_BYTES


def test_more_ranks_need_less_each_and_most_so_with_stage_3(inputs: Inputs) -> None:
    stages = {
        stage: [needed(inputs, ranks=n, deepspeed={"zero_stage": stage}) for n in (2, 4)]
        for stage in (0, 1, 3)
    }
    assert stages[0][0] == stages[0][1] > stages[1][0] > stages[1][1] > stages[3][1]
    assert stages[3][0] > stages[3][1]
    rounded = needed(inputs, ranks=2, deepspeed={"zero_stage": 3, "bf16": True})
    assert rounded < stages[3][0]


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
