"""One unit per file of the output; config.json is sent when all others have arrived."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from models.atomic import file_digest, write_json
from models.errors import StorageError
from models.remote.store import Stored, file_md5, head, join, listed, put, put_bytes
from models.remote.urls import url_key
from stages.unit import Fingerprint, beside
from stages.upload.config import VERSION

# Without it nothing opens a folder: it makes a checkpoint of what lies beside it.
LAST = "config.json"
# Says whose target it is.
CLAIM = "coalesce.json"


@dataclass(frozen=True)
class UploadUnit:
    """Sends one file."""

    source: Path
    url: str  # of the folder
    digest: str  # SHA-256 of the file
    folder: Path  # of the markers

    @property
    def name(self) -> str:
        """`upload/model-00001-of-00006.safetensors`."""
        return f"upload/{self.source.name}"

    @property
    def outputs(self) -> Sequence[Path]:
        """Nothing on this machine but the marker."""
        return ()

    @property
    def marker(self) -> Path:
        """In a folder of the target."""
        return beside(self.folder / url_key(self.url) / self.source.name)

    @property
    def fingerprint(self) -> Fingerprint:
        """The target; what was sent stands in the result, so that a new report is sent again."""
        return {"code": f"upload-{VERSION}", "url": self.url}


def plan(output: Path, url: str, folder: Path) -> list[UploadUnit]:
    """One unit per file of a finished output, `LAST` at the end."""
    # The digests of the export; the model card is younger.
    made = json.loads(beside(output).read_text())["outputs"]
    files = sorted(path for path in output.iterdir() if path.is_file())
    files.sort(key=lambda path: path.name == LAST)
    return [UploadUnit(path, url.rstrip("/"), _digest(path, made), folder) for path in files]


def _digest(path: Path, made: Mapping[str, Any]) -> str:
    return str(made[path.name]["sha256"]) if path.name in made else file_digest(path)


def run_one(unit: UploadUnit) -> dict[str, Any]:
    """Sends the file and compares what arrived.

    Raises:
        StorageError: another size arrived, or twice other bytes.
    """
    size = unit.source.stat().st_size
    found = put(unit.source, join(unit.url, unit.source.name))
    if found.bytes != size:
        raise StorageError(
            f"{found.bytes:,} of {size:,} bytes of {unit.source.name} arrived at {unit.url}",
            "run the same command again",
        )
    # The ETag of an encrypted or multi-part object is no MD5: then the size is what is compared.
    proven = found.md5 is not None and found.md5 == file_md5(unit.source)
    return {"bytes": size, "sha256": unit.digest, "version": found.version, "md5": proven}


def forget_stale(units: Sequence[UploadUnit]) -> None:
    """Removes markers of files that have changed since, or that the target lost."""
    there = listed(units[0].url)
    for unit in units:
        if not _arrived(unit, there.get(unit.source.name)):
            unit.marker.unlink(missing_ok=True)


def check_complete(units: Sequence[UploadUnit]) -> None:
    """All files are there with the versions that were sent; asked before `LAST` is.

    Raises:
        StorageError: names the first that is not.
    """
    there = listed(units[0].url)
    for unit in units:
        if not _arrived(unit, there.get(unit.source.name)):
            raise StorageError(
                f"{unit.source.name} was sent to {unit.url} and is not there as it was sent",
                "does something else write there? run the same command again",
            )


def _arrived(unit: UploadUnit, there: Stored | None) -> bool:
    try:
        sent = json.loads(unit.marker.read_text())["result"]
    except (OSError, ValueError, KeyError):
        return False
    wanted = Stored(sent["bytes"], sent["version"])
    return bool(there == wanted and sent["sha256"] == unit.digest)


def check_target(url: str, folder: Path) -> None:
    """Refuses a target that holds anything but what this run has sent; writes nothing.

    Raises:
        StorageError: no bucket, no permission, or somebody else's files.
    """
    there = listed(url)
    if not there:
        return
    token = _token(folder, url)
    if CLAIM not in there or token is None or _claimed(url) != token:
        raise StorageError(
            f"{url} is not empty and does not belong to this run: it holds {len(there)} file(s),"
            f" first {min(there)}",
            "set `upload.url` to a prefix that holds nothing; nothing was changed",
        )


def claim(url: str, folder: Path) -> None:
    """Writes to the target which run it belongs to: what cannot be written fails here already.

    Raises:
        StorageError: as `check_target`, or no permission to write.
    """
    check_target(url, folder)
    if _token(folder, url) is None:
        write_json(_claim_file(folder, url), {"run": uuid4().hex, "by": "coalesce"})
    put_bytes(_claim_file(folder, url).read_bytes(), join(url, CLAIM))
    check_target(url, folder)  # two runs that claim at the same moment: the later one has it


def _claim_file(folder: Path, url: str) -> Path:
    return folder / url_key(url.rstrip("/")) / CLAIM


def _token(folder: Path, url: str) -> str | None:
    try:
        return str(json.loads(_claim_file(folder, url).read_text())["run"])
    except FileNotFoundError:
        return None


def _claimed(url: str) -> str | None:
    try:
        return str(json.loads(head(join(url, CLAIM), 4096))["run"])
    except (ValueError, KeyError, TypeError):
        return None
