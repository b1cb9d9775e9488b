"""Configs whose batch scripts are kept under `golden/`."""

from __future__ import annotations

from pathlib import Path

from orchestrator.slurm.config import SlurmConfig
from orchestrator.slurm.script import Places

PLAIN = SlurmConfig(cpus_per_task=8)
FULL = SlurmConfig(
    cpus_per_task=16,
    nodes=4,
    gpus_per_node=8,
    memory_per_node="0",
    time="1-12",
    partition="gpu,long",
    account="team:moe",
    qos="high",
    job_name="merge-8x7b",
    setup=("module load cuda/12.8", "source '/sw/my envs/moe/bin/activate'"),
    container=("apptainer", "exec", "--nv", "/sw/images/it's.sif"),
    options=("--constraint=a100&ib", "--comment='a b'", "--exclusive"),
    lead_seconds=300,
    join_seconds=900,
    interface="ib0",
    scratch="/local/scratch",
    fruitless_starts=5,
)


def places(run: str = "/shared/runs/demo", folder: str = "/home/ada/work") -> Places:
    """Where a job works, on no machine in particular."""
    return Places(
        Path(run), Path(folder), Path(run) / "slurm" / "config.yaml", "/sw/venv/bin/python"
    )


HOSTILE = places('/shared/it\'s 100% `of` $HOME; "mine" #1', "/home/ada/- and & others")
GOLDEN = {
    "plain": (PLAIN, places()),
    "full": (FULL, places()),
    "hostile": (PLAIN, HOSTILE),
}
