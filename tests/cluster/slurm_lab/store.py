"""An S3 server inside the lab, whose network nobody outside can reach.

    python -m tests.cluster.slurm_lab.store serve ADDRESS FOLDER READY
    python -m tests.cluster.slurm_lab.store list URL

`serve` puts FOLDER below s3://lab/model, checks keys from then on, and writes the environment of a
user who may do everything to READY. `list`, in that environment, prints keys and digests as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

from models.atomic import write_json
from tests.s3 import Store


def serve(address: str, folder: str, ready: str) -> None:
    """Until it is ended."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(address, 0)
    server.start()
    host, port = server.get_host_and_port()
    store = Store(f"http://{host}:{port}")
    store.upload(Path(folder), f"{store.bucket('lab')}/model")
    (user,) = store.users(lab="s3:*")
    write_json(Path(ready), user.environment)
    signal.pause()


def listed(url: str) -> None:
    """Key below the URL -> SHA-256 of its content."""
    names = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    objects = Store(*(os.environ[name] for name in names)).objects(url)
    print(json.dumps({key: hashlib.sha256(data).hexdigest() for key, data in objects.items()}))


if __name__ == "__main__":
    {"serve": serve, "list": listed}[sys.argv[1]](*sys.argv[2:])
