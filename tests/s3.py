"""A real S3 server (moto's) in a process of its own, and what tests put into it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

KEY, SECRET = "AKIAPLANTEDS3TEST", "planted/s3secret+5c1d9e"


@dataclass(frozen=True)
class Store:
    """Its address; whoever has this environment talks to it."""

    url: str
    key: str = KEY
    secret: str = SECRET

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @property
    def client(self) -> Any:
        """boto3's own, to look past the code under test."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
        )

    def bucket(self, name: str) -> str:
        """A new bucket; its URL."""
        self.client.create_bucket(Bucket=name)
        return f"s3://{name}"

    def upload(self, folder: Path, url: str) -> str:
        """Every file of a folder, below a URL; that URL."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{url}/{path.relative_to(folder)}", path.read_bytes())
        return url

    def put(self, url: str, data: bytes) -> None:
        bucket, _, key = url.removeprefix("s3://").partition("/")
        self.client.put_object(Bucket=bucket, Key=key, Body=data)

    def objects(self, url: str) -> dict[str, bytes]:
        """Key below the URL -> content."""
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        client, prefix = self.client, f"{prefix}/" if prefix else ""
        found = client.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])
        return {
            each["Key"].removeprefix(prefix): client.get_object(Bucket=bucket, Key=each["Key"])[
                "Body"
            ].read()
            for each in found
        }

    def modified(self, url: str) -> dict[str, Any]:
        """Key below the URL -> when it was written."""
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        found = self.client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/")["Contents"]
        return {each["Key"].removeprefix(f"{prefix}/"): each["LastModified"] for each in found}

    def users(self, **actions: str) -> list[Store]:
        """From now on keys are checked. The same store for users who may do one kind of action."""
        import boto3
        import urllib3

        # So many calls are still answered whoever asks.
        calls = str(3 * len(actions)).encode()
        urllib3.request("POST", f"{self.url}/moto-api/reset-auth", body=calls)
        iam = boto3.client(
            "iam",
            endpoint_url=self.url,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
        )
        found = []
        for name, action in actions.items():
            iam.create_user(UserName=name)
            statement = {"Effect": "Allow", "Action": action, "Resource": "*"}
            policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
            iam.put_user_policy(UserName=name, PolicyName="only", PolicyDocument=policy)
            made = iam.create_access_key(UserName=name)["AccessKey"]
            found.append(replace(self, key=made["AccessKeyId"], secret=made["SecretAccessKey"]))
        return found


@contextmanager
def serving(environment: Mapping[str, str] | None = None) -> Iterator[Store]:
    """A server on a free port of the loopback, ended with the context."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(
        words,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _await(port, process)
        yield Store(f"http://127.0.0.1:{port}")
    finally:
        process.kill()
        process.wait()


def _await(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, "no S3 server"
            time.sleep(0.05)


@contextmanager
def talking_to(store: Store) -> Iterator[Store]:
    """Within it, this process and its children use the store."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        forget_clients()
        yield store
    forget_clients()


def forget_clients() -> None:
    """Clients keep the environment in which they were made."""
    from models.remote import store

    store._filesystem.cache_clear()
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
