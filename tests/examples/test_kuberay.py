"""The RayJob example: fields of the RayJob API only, one cluster that can hold it together."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

HERE = Path(__file__).resolve().parent
EXAMPLE = HERE.parents[1] / "examples" / "kuberay" / "rayjob.yaml"
SCHEMA = json.loads((HERE / "rayjob.schema.json").read_text())


@pytest.fixture
def manifest() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text())
    return found


def test_the_manifest_holds_the_schema(manifest: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(manifest, SCHEMA)


def test_the_schema_can_refuse(manifest: dict[str, Any]) -> None:
    manifest["spec"]["entryPoint"] = manifest["spec"].pop("entrypoint")
    with pytest.raises(jsonschema.ValidationError, match="entryPoint"):
        jsonschema.validate(manifest, SCHEMA)


def test_volumes_exist_and_the_version_of_ray_is_the_tested_one(manifest: dict[str, Any]) -> None:
    cluster = manifest["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        mounts = [mount for each in pod["containers"] for mount in each["volumeMounts"]]
        assert {mount["name"] for mount in mounts} <= volumes
        assert [mount["mountPath"] for mount in mounts] == ["/data"]
    assert cluster["rayVersion"] == version("ray")


def test_the_entrypoint_is_a_command_of_this_program(manifest: dict[str, Any]) -> None:
    program, verb, config, *overrides = shlex.split(manifest["spec"]["entrypoint"])
    assert (program, verb, config) == ("coalesce", "run", "/data/config.yaml")
    assert overrides == ["executor.kind=ray", "executor.address=auto"]
