"""`coalesce submit ray` and `coalesce submit slurm`"""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

import cluster
import models
import orchestrator
import stages
from cluster.ray_jobs import JobError, JobRequest, RayJobs
from orchestrator.absolute import absolute
from orchestrator.config import RunConfig
from orchestrator.errors import ConfigError
from orchestrator.interrupt import Interrupted
from orchestrator.preflight import prepare
from orchestrator.slurm import submit as slurm

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_REMEDY = (
    "give the address of the cluster's dashboard with --address http://HOST:8265; the client needs"
    " pip install 'coalesce-moe[jobs]'"
)


def slurm_command(config: RunConfig, *, dry_run: bool) -> None:
    """Checks the run as `run` would, writes the script, submits it, says how to go on."""
    submission = slurm.plan(config)
    prepare(config)
    if dry_run:
        print(submission.script, end="")
        return
    submission.write()
    job = submission.submit()
    run = shlex.quote(str(submission.folder.root))
    log = shlex.quote(str(submission.folder.slurm / f"job-{job}.log"))
    print(f"submitted: job {job}, {submission.script_path}")
    print(f"status:    coalesce status {run}")
    print(f"queue:     squeue -j {job}")
    print(f"log:       tail -F {log}")
    print(f"cancel:    scancel {job}")


def ray_command(
    config: RunConfig,
    *,
    address: str | None,
    dry_run: bool,
    wait: bool,
    upload_code: bool,
    runtime_env: Path | None,
    python: str,
) -> int:
    """Sends the run to a cluster; the exit code is the run's own, or 0 with `wait` off."""
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    with tempfile.TemporaryDirectory(prefix="coalesce-job-") as folder:
        request = _request(absolute(config), Path(folder), upload_code, runtime_env, python)
        if dry_run:
            _show(address, request, absolute(config))
            return 0
        try:
            jobs = RayJobs(address)
            job = jobs.submit(request)
            print(f"submitted: job {job} to {address}", flush=True)
            if not wait:
                _print_steps(config, address, job)
                return 0
            try:
                ended = jobs.follow(job, _write)
            except Interrupted as stop:
                print(f"no longer followed: job {job} goes on", flush=True)
                _print_steps(config, address, job)
                return stop.exit_code
        except JobError as error:
            raise ConfigError(str(error), _REMEDY) from error
    print(f"job {job}: {ended.status.lower()}, exit code {ended.code}", file=sys.stderr)
    return ended.code


def _request(
    config: RunConfig, folder: Path, upload_code: bool, runtime_env: Path | None, python: str
) -> JobRequest:
    """The job, and the folder with the config that travels with it: no weights, no text."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    (folder / "config.yaml").write_text(text)
    words = [python, "-m", "orchestrator", "run", "config.yaml"]
    packages = (orchestrator, stages, cluster, models) if upload_code else ()
    return JobRequest(
        entrypoint=shlex.join([*words, "executor.kind=ray", "executor.address=auto"]),
        working_dir=folder,
        packages=[Path(each.__path__[0]) for each in packages],
        runtime_env=_read_environment(runtime_env),
    )


def _read_environment(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the runtime environment {path}: {error}") from error
    if not isinstance(found, dict) or {"working_dir", "py_modules"} & set(found):
        raise ConfigError(
            f"{path} is not a runtime environment for a run",
            "write keys such as pip or env_vars; working_dir and py_modules are set by coalesce",
        )
    return found


def _show(address: str, request: JobRequest, config: RunConfig) -> None:
    environment = request.environment
    # Values of variables may be secrets; their names are not.
    variables = dict.fromkeys(environment.get("env_vars", {}), "***")
    shown = environment | ({"env_vars": variables} if variables else {})
    job = {"address": address, "entrypoint": request.entrypoint, "runtime_env": shown}
    print(json.dumps(job | {"config.yaml": config.model_dump(mode="json")}, indent=2))


def _print_steps(config: RunConfig, address: str, job: str) -> None:
    print(f"status:    coalesce status {shlex.quote(str(config.run_dir.absolute()))}")
    print(f"log:       ray job logs --follow --address {address} {job}")
    print(f"cancel:    ray job stop --address {address} {job}")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
