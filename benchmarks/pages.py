"""Tables that a file of results gives to a page of the docs, between two marks."""

from __future__ import annotations

from pathlib import Path

Marks = tuple[str, str]


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
