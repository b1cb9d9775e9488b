"""From a recipe name or file and `key.path=value` words to a valid config and its sources.

Precedence: default < file < command line.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from orchestrator.config import RunConfig
from orchestrator.errors import ConfigError
from orchestrator.places import check_places
from stages.group.config import METHODS
from stages.refit.config import PRESETS

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Loaded:
    """A resolved config; `sources` says for each dotted key where its value came from."""

    config: RunConfig
    sources: dict[str, str]


def load(name: str, overrides: Sequence[str] = ()) -> Loaded:
    """Loads a recipe by name or path and applies overrides.

    Raises:
        ConfigError: no such recipe, not YAML, or a key or value that is not valid.
    """
    path = find_recipe(name)
    values = _read_yaml(path)
    origin = dict.fromkeys(flatten(values), str(path))
    for word in overrides:
        key, value = _parse_override(word)
        _assign(values, key.split("."), value)
        origin = {k: file for k, file in origin.items() if not f"{k}.".startswith(f"{key}.")}
        origin |= dict.fromkeys(flatten({key: value}), COMMAND_LINE)
    config = validate(values)
    check_places(config)
    resolved = flatten(config.model_dump(mode="json"))
    return Loaded(config, {key: _source(key, origin) for key in resolved})


def listed(loaded: Loaded) -> Iterator[tuple[str, object, str]]:
    """Every key of a config, its value and where that comes from.

    What differs between the presets that the size of the model decides between has no value yet.
    """
    given, refit = loaded.config.model_dump(mode="json"), loaded.config.refit
    one, other = (
        flatten(given | {"refit": refit.as_preset(name).model_dump(mode="json")})
        for name in PRESETS
    )
    known = flatten(given)
    for key in one:
        if key in known:
            yield key, known[key], loaded.sources[key]
        elif one[key] == other[key]:
            yield key, one[key], "default"
        else:
            yield key, f"{one[key]} | {other[key]}", "by refit.preset=auto: parallel | thorough"


def validate(values: Mapping[str, Any]) -> RunConfig:
    """A RunConfig, or one error that lists everything that is wrong."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines = [_explain(values, entry) for entry in error.errors()]
        raise ConfigError("the config is not valid:\n  " + "\n  ".join(lines)) from error


def recipe_folders() -> list[Path]:
    """Where recipes lie: in an installed wheel, and in a checkout."""
    here = Path(__file__).resolve().parent
    return [folder for folder in (here / "recipes", here.parent / "configs") if folder.is_dir()]


def recipes() -> dict[str, Path]:
    """Name -> file of every shipped recipe."""
    return {
        path.stem: path for folder in recipe_folders() for path in sorted(folder.glob("*.yaml"))
    }


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path, or the name of a shipped one.

    Raises:
        ConfigError: with the nearest name.
    """
    if Path(name).is_file():
        return Path(name)
    known = recipes()
    if name in known:
        return known[name]
    hint = _nearest(Path(name).stem, known)
    raise ConfigError(
        f"no config file or recipe {name!r}", f"{hint}recipes: {', '.join(sorted(known))}"
    )


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` to `{"a.b": 1}`; lists count as values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `key: value` lines")
    return values


def _parse_override(word: str) -> tuple[str, Any]:
    key, separator, text = word.partition("=")
    if not separator or not key:
        raise ConfigError(f"{word!r} is not an override", "write key.path=value")
    try:
        return key, yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {word!r} is not YAML: {error}") from error


def _assign(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        below = values.get(key)
        values[key] = below = below if isinstance(below, dict) else {}
        values = below
    values[keys[-1]] = value


def _source(key: str, origin: Mapping[str, str]) -> str:
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        found = origin.get(".".join(parts[:length]))
        if found:
            return found
    return "default"


def _explain(values: Mapping[str, Any], entry: Any) -> str:
    # pydantic puts the discriminator's value into the location of a tagged union.
    where = [str(part) for part in entry["loc"]]
    group = values.get("group")
    tag = str(group.get("method", "")) if isinstance(group, Mapping) else ""
    if len(where) > 1 and where[0] == "group" and where[1] == tag:
        del where[1]
    key, given = ".".join(where), entry.get("input")
    match entry["type"]:
        case "extra_forbidden":
            names = _valid_names(where[:-1], tag)
            return f"{key}: unknown key; {_hint(where[-1], names)}"
        case "literal_error":
            return f"{key}: {given!r} is not possible; {_hint(given, _quoted(entry['ctx']))}"
        case "union_tag_invalid":
            names = _quoted({"expected": entry["ctx"]["expected_tags"]})
            return f"{key}.method: {tag!r} is not possible; {_hint(tag, names)}"
        case "union_tag_not_found":
            return f"{key}.method: is missing; {_hint('', METHODS)}"
        case "model_type" | "model_attributes_type":
            names = _valid_names(where, tag)
            return f"{key}: holds keys of its own; {_hint('', names)} (got {given!r})"
    shown = "" if isinstance(given, dict) or entry["type"] == "missing" else f" (got {given!r})"
    return f"{key}: {entry['msg'].removeprefix('Value error, ')}{shown}"


def _quoted(context: Mapping[str, Any]) -> list[str]:
    """Names in pydantic's `'a', 'b' or 'c'`."""
    return re.findall(r"'([^']*)'", str(context["expected"]))


def _valid_names(where: Sequence[str], tag: str) -> list[str]:
    models: list[type[BaseModel]] = [RunConfig]
    for part in where:
        if part.isdigit():
            continue
        fields = (m.model_fields[part].annotation for m in models if part in m.model_fields)
        models = [model for annotation in fields for model in _models_in(annotation)]
    tagged = [m for m in models if tag and _default(m, "method") == tag]
    return sorted({name for model in tagged or models for name in model.model_fields})


def _default(model: type[BaseModel], field: str) -> Any:
    return model.model_fields[field].default if field in model.model_fields else None


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, types.UnionType, tuple) or get_args(annotation):
        for part in get_args(annotation):
            yield from _models_in(part)


def _hint(given: Any, names: Sequence[str] | Mapping[str, Any]) -> str:
    return f"{_nearest(str(given), names)}valid: {', '.join(names)}"


def _nearest(word: str, names: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(word, list(names), n=1, cutoff=0.5)
    return f"did you mean {near[0]}? " if near else ""
