"""Cut the bundled calibration, validation and test texts out of a nine-domain text corpus.

    python prepare_data.py --corpus CORPUS --out ../bundled/data

Only the five domains whose texts are public domain or permissively licensed are used. Splits are by
family of related documents (see `families.py`), with the same number of UTF-8 bytes per domain, so
that no domain dominates a mean over documents. The result depends on the corpus and the seed only.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from corpus import DOMAINS, Document, read_domain, sources, write_documents
from families import Family, find_families


@dataclass(slots=True)
class Splits:
    """Documents per bundled split."""

    calibration: list[Document]
    validation: list[Document]
    test: list[Document]


@dataclass(frozen=True, slots=True)
class Budget:
    """UTF-8 bytes per domain, for calibration and for each of the two held-out splits."""

    calibration: int
    held_out: int


def shuffled(families: Sequence[Family], seed: int) -> list[Family]:
    """Families ordered by a keyed hash: independent of input order and of library versions."""

    def key(family: Family) -> str:
        name = min(document.source for document in family)
        return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()

    return sorted(families, key=key)


def family_size(family: Family) -> int:
    """UTF-8 bytes of all members."""
    return sum(document.size for document in family)


def fill(families: Sequence[Family], budgets: Sequence[int]) -> list[list[Family]]:
    """Deal families to bins, emptiest bin first; a family that does not fit there is left out."""
    bins: list[list[Family]] = [[] for _ in budgets]
    room = list(budgets)
    for family in families:
        index = max(range(len(room)), key=room.__getitem__)
        size = family_size(family)
        if size <= room[index]:
            bins[index].append(family)
            room[index] -= size
    return bins


def flatten(families: Sequence[Family]) -> list[Document]:
    """Members of all families, in order."""
    return [document for family in families for document in family]


def split_domain(
    train: Sequence[Document], validation: Sequence[Document], budget: Budget, seed: int
) -> Splits:
    """Split one domain.

    Held-out text comes from the validation split of the corpus as far as that reaches, and is
    topped up with whole families of its train split, which pretraining then has to leave out.
    """
    domain = train[0].domain
    train_sources = sources(train)
    families = shuffled(find_families([*validation, *train], domain), seed)
    families.sort(key=lambda family: bool(train_sources & sources(family)))  # stable
    held_validation, held_test = fill(families, [budget.held_out, budget.held_out])
    held_sources = sources(flatten([*held_validation, *held_test]))
    free = [document for document in train if document.source not in held_sources]
    free_families = shuffled([(document,) for document in free], seed)
    (calibration,) = fill(free_families, [budget.calibration])
    return Splits(flatten(calibration), flatten(held_validation), flatten(held_test))


def prepare(corpus: Path, out: Path, budget: Budget, seed: int) -> None:
    """Write `calibration.parquet`, `validation.parquet` and `test.parquet` to `out`."""
    merged = Splits([], [], [])
    for domain in DOMAINS:
        train, validation = (read_domain(corpus, name, domain) for name in ("train", "validation"))
        splits = split_domain(train, validation, budget, seed)
        merged.calibration += splits.calibration
        merged.validation += splits.validation
        merged.test += splits.test
    for name in ("calibration", "validation", "test"):
        documents: list[Document] = getattr(merged, name)
        write_documents(out / f"{name}.parquet", documents)
        report(out / f"{name}.parquet", documents)


def report(path: Path, documents: Sequence[Document]) -> None:
    """Print what a file holds."""
    print(f"{path.name}: {len(documents)} documents, {path.stat().st_size} bytes on disk")
    for domain in DOMAINS:
        members = [document for document in documents if document.domain == domain]
        size = sum(document.size for document in members)
        print(f"  {domain:<16} {len(members):>6} documents {size:>9} bytes of text")


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description="Make the bundled parquet files.")
    parser.add_argument("--corpus", type=Path, required=True, help="has train/, validation/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--calibration-bytes", type=int, default=2_000_000, help="per domain")
    parser.add_argument("--held-out-bytes", type=int, default=280_000, help="per domain and split")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    prepare(args.corpus, args.out, Budget(args.calibration_bytes, args.held_out_bytes), args.seed)


if __name__ == "__main__":
    main()
