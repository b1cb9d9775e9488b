"""Calibration documents that are also evaluated: compared by what they consist of, exactly.

A document is known by its runs of n consecutive tokens. Runs are compared themselves, not by a
hash, so that nothing is found that is not there. Documents shorter than a run are compared whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from stages.corpus.config import DedupConfig
from stages.errors import DataError

# Bytes that a held token takes in memory, as an entry of a set.
BYTES_PER_TOKEN = 160


class Evaluated:
    """The documents that are evaluated, as sets of runs and of whole documents."""

    def __init__(self, run: int) -> None:
        self._run = run
        self._runs: set[bytes] = set()
        self._whole: set[bytes] = set()

    def collect(self, documents: Iterable[list[int]]) -> Iterator[list[int]]:
        """Hands documents through and remembers them."""
        for document in documents:
            self._whole.add(_stored(document))
            self._runs.update(runs(document, self._run))
            yield document

    def identical(self, document: list[int]) -> bool:
        """Whether the very same tokens are a document that is evaluated."""
        return _stored(document) in self._whole

    def share(self, document: list[int]) -> float:
        """Share of a document's runs that occur in evaluated documents; 0 if it has none."""
        found = [each in self._runs for each in runs(document, self._run)]
        return sum(found) / len(found) if found else 0.0


@dataclass
class Overlap:
    """Counts of one domain of calibration text, over the documents that were looked at."""

    documents: int = 0
    tokens: int = 0
    identical: int = 0
    similar: int = 0  # not identical, but at least `share` of their runs
    shared_tokens: int = 0  # in either
    dropped: bool = False


@dataclass
class Deduplication:
    """Compares every calibration document on its way, and leaves it out if that is asked for."""

    config: DedupConfig
    evaluated: Evaluated
    found: dict[str, Overlap] = field(default_factory=dict)

    def passed(self, domain: str, documents: Iterable[list[int]]) -> Iterator[list[int]]:
        """The documents that are calibrated on, in their order.

        Raises:
            DataError: every document is left out.
        """
        drop = self.config.mode == "drop"
        counts = self.found.setdefault(domain, Overlap(dropped=drop))
        for document in documents:
            counts.documents += 1
            counts.tokens += len(document)
            shared = self._is_shared(document, counts)
            if shared:
                counts.shared_tokens += len(document)
            if not (shared and drop):
                yield document
        if drop and counts.documents == counts.identical + counts.similar > 0:
            raise DataError(
                f"all {counts.documents:,} calibration documents of domain {domain!r} are also"
                " evaluated, and none is left",
                "give other text, or set calibrate.dedup.mode=warn",
            )

    def _is_shared(self, document: list[int], counts: Overlap) -> bool:
        if self.evaluated.identical(document):
            counts.identical += 1
            return True
        if self.evaluated.share(document) >= self.config.share:
            counts.similar += 1
            return True
        return False

    def as_json(self) -> dict[str, dict[str, Any]]:
        """Domain -> counts."""
        return {domain: asdict(self.found[domain]) for domain in sorted(self.found)}


def runs(document: list[int], length: int) -> list[bytes]:
    """Every `length` consecutive tokens of a document, in order."""
    raw = _stored(document)
    return [raw[4 * i : 4 * (i + length)] for i in range(len(document) - length + 1)]


def warnings(found: Mapping[str, Mapping[str, Any]], share: float) -> list[str]:
    """One line per domain in which documents are shared."""
    lines = []
    for domain, each in found.items():
        if shared := each["identical"] + each["similar"]:
            lines.append(
                f"calibration text of {domain}: {shared:,} of {each['documents']:,} documents"
                f" ({each['shared_tokens']:,} of {each['tokens']:,} tokens) are also evaluated:"
                f" {each['identical']:,} as they are, {each['similar']:,} by {share:.0%} or more of"
                " their wording; " + _consequence(bool(each["dropped"]))
            )
    return lines


def _consequence(dropped: bool) -> str:
    if dropped:
        return "they were left out of the calibration"
    return "its numbers may flatter (calibrate.dedup.mode=drop leaves them out)"


def _stored(document: list[int]) -> bytes:
    return np.asarray(document, dtype="<i4").tobytes()
