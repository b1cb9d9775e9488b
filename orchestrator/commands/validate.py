"""`coalesce validate`"""

from __future__ import annotations

from orchestrator.config import RunConfig
from orchestrator.plan import summary
from orchestrator.preflight import prepare
from stages.verify import stage as verify


def validate_command(config: RunConfig, *, deep: bool) -> None:
    """Everything that `run` would refuse, without writing anything."""
    prepared = prepare(config)
    if deep:
        for unit in verify.plan(prepared.moe.checkpoint, prepared.folder.verify):
            verify.run_one(unit)
    print(f"valid: {summary(prepared)}")
