"""`coalesce ls`"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from orchestrator.errors import ConfigError


def list_command(what: str, *, as_json: bool = False) -> None:
    """Prints name and one line for each; families also as the whole matrix in JSON."""
    if as_json:
        print(json.dumps(_as_json(what), indent=2))
        return
    found = LISTS[what]()
    width = max(map(len, found))
    for name, text in found.items():
        print(f"{name:<{width}}  {text}")


def _as_json(what: str) -> Mapping[str, object]:
    if what != "families":
        raise ConfigError(f"`ls {what}` has no JSON form", "`coalesce ls families --json` has one")
    from models.support import matrix

    return matrix()


def _methods() -> Mapping[str, str]:
    from stages.group.config import METHODS

    return {name: (config.__doc__ or "").strip() for name, config in METHODS.items()}


def _families() -> Mapping[str, str]:
    from models.support import matrix

    return {name: _in_words(features) for name, features in matrix().items()}


def _in_words(features: Mapping[str, str]) -> str:
    """`observe, merge; not native: reason`; features that lack for one reason stand together."""
    able = [feature for feature, cell in features.items() if cell == "supported"]
    lacking: dict[str, list[str]] = {}
    for feature, cell in features.items():
        if cell != "supported":
            lacking.setdefault(cell.removeprefix("unsupported: "), []).append(feature)
    if not able:
        return f"not supported: {next(iter(lacking))}"
    parts = [", ".join(able), *(f"not {', '.join(what)}: {why}" for why, what in lacking.items())]
    return "; ".join(parts)


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
