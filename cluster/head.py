"""Is the head of the Ray cluster still there? Without one Ray ends the driver, as if by a bug."""

from __future__ import annotations

import os
import socket
import time

import ray

from cluster.errors import InfrastructureError

_RAYS_LIMIT = "RAY_gcs_rpc_server_reconnect_timeout_s"
_ANSWER_SECONDS = 2.0


class Head:
    """The process that all nodes of a cluster report to."""

    def __init__(self) -> None:
        """Of the cluster that this process has joined."""
        self.address: str = ray.get_runtime_context().gcs_address
        # Ray waits a minute for it by default. What then ends this process must come later.
        self.patience = float(os.environ.get(_RAYS_LIMIT, "60")) / 2

    def check(self) -> None:
        """Returns as soon as it answers.

        Raises:
            InfrastructureError: it did not for half the time after which Ray gives up.
        """
        deadline = time.monotonic() + self.patience
        while not self._answers():
            if time.monotonic() > deadline:
                raise InfrastructureError(
                    f"the head of the Ray cluster, {self.address}, has not answered for"
                    f" {self.patience:g} s; finished units are kept, the same command goes on"
                    " once there is a cluster"
                )
            time.sleep(0.5)

    def _answers(self) -> bool:
        host, port = self.address.rsplit(":", 1)
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS):
                return True
        except OSError:
            return False
