"""`coalesce ls`"""

from __future__ import annotations

from collections.abc import Callable, Mapping


def list_command(what: str) -> None:
    """Prints name and one line for each."""
    found = LISTS[what]()
    width = max(map(len, found))
    for name, text in found.items():
        print(f"{name:<{width}}  {text}")


def _methods() -> Mapping[str, str]:
    from stages.group.config import METHODS

    return {name: (config.__doc__ or "").strip() for name, config in METHODS.items()}


def _families() -> Mapping[str, str]:
    from models.families import FAMILIES

    return {name: f"experts in {family.block}" for name, family in sorted(FAMILIES.items())}


def _recipes() -> Mapping[str, str]:
    from orchestrator.load import recipes

    lines = {name: path.read_text().splitlines()[0] for name, path in recipes().items()}
    return {name: line.lstrip("# ") for name, line in sorted(lines.items())}


def _exporters() -> Mapping[str, str]:
    from stages.export.formats import FORMATS

    return {
        name: (type(form).__module__ and _first_line(type(form).__module__))
        for name, form in FORMATS.items()
    }


def _first_line(module: str) -> str:
    import sys

    return (sys.modules[module].__doc__ or "").strip().splitlines()[0]


LISTS: dict[str, Callable[[], Mapping[str, str]]] = {
    "methods": _methods,
    "families": _families,
    "recipes": _recipes,
    "exporters": _exporters,
}
