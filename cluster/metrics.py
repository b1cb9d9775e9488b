"""What a run does, as metrics of Ray: its dashboard and any Prometheus that scrapes it show them.

Ray prefixes the names with `ray_`. Where no agent exports metrics they go nowhere, at no cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

_SECONDS = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0]


class Metrics:
    """Counts units, tokens and lost workers of one driver."""

    def __init__(self) -> None:
        self._done = Counter("coalesce_units_done", "Units that ended well.", ("stage",))
        self._seconds = Histogram(
            "coalesce_unit_seconds", "Seconds of one unit.", _SECONDS, ("stage",)
        )
        self._flying = Gauge("coalesce_units_in_flight", "Units that are running.")
        self._tokens = Counter("coalesce_tokens", "Tokens that were observed or measured.")
        self._retries = Counter(
            "coalesce_retries", "Units run again after their worker was lost.", ("cause",)
        )

    def in_flight(self, units: int) -> None:
        """How many units run now."""
        self._flying.set(units)

    def count(self, event: Mapping[str, Any]) -> None:
        """Takes in an event of the run; units that were found done count for nothing."""
        kind = event["event"]
        if kind == "unit_done" and not event.get("resumed"):
            stage = {"stage": event["stage"]}
            self._done.inc(1, stage)
            if "seconds" in event:
                self._seconds.observe(event["seconds"], stage)
            if event.get("tokens"):
                self._tokens.inc(event["tokens"])
        elif kind == "unit_lost" and event["retried"]:
            self._retries.inc(1, {"cause": event["cause"]})
