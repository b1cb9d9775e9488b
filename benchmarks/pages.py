"""Tables that a file of results gives to a page of the docs, between two marks."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

Marks = tuple[str, str]


def options(description: str | None, quick: str, out: Path) -> ArgumentParser:
    """The words of a benchmark whose rows lie in --out and whose table stands on a page.

    Args:
        quick: what --quick does.
        out: where rows lie unless --out says otherwise.
    """
    parser = ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--table", type=Path, help="print the table of such a file, run nothing")
    parser.add_argument("--page", type=Path, help="with --table: write it between a page's marks")
    return parser


def between(page: str, marks: Marks, body: str) -> str:
    """The page with what stands between its two marks replaced.

    Raises:
        ValueError: it has no such marks.
    """
    begin, end = marks
    before, _, rest = page.partition(begin)
    _, mark, after = rest.partition(end)
    if not mark:
        raise ValueError(f"the page has no lines {begin!r} and {end!r}")
    return f"{before}{begin}\n{body}\n{end}{after}"


def show_or_put(body: str, page: Path | None, marks: Marks) -> None:
    """Prints tables; with a page, writes them between its marks."""
    if page is None:
        print(body, end="")
    else:
        page.write_text(between(page.read_text(), marks, body))
