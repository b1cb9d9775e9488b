"""What Coalesce needs to write and open `mapped` folders. Importing this loads no torch."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import Any

from models.errors import UnknownFamily


def modeling_source() -> Path:
    """The file to copy beside the weights, so that the folder opens without Coalesce."""
    return Path(__file__).with_name("modeling_coalesce.py")


# Families that transformers does not have: model type -> stem, and the file with their classes.
_OWN = {"momentum_smoe": ("Momentum", "modeling_coalesce_momentum.py")}


def code_files(model_type: str) -> tuple[Path, ...]:
    """Every file that a mapped folder of this family needs, but the family's own."""
    more = (modeling_source().with_name(_OWN[model_type][1]),) if model_type in _OWN else ()
    return (modeling_source(), *more)


@cache
def families() -> dict[str, str]:
    """Supported model types and the stems of their class names.

    Read from the source text of the modeling file, which holds the only copy of this table:
    importing that file would load torch.
    """
    for node in ast.parse(modeling_source().read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FAMILIES":
            table: dict[str, str] = ast.literal_eval(node.value)
            return table
    raise AssertionError(f"no FAMILIES table in {modeling_source()}")


def stems() -> dict[str, str]:
    """Every model type with a mapped form, and the stem of its own class names."""
    return families() | {name: stem for name, (stem, _) in _OWN.items()}


def config_json(
    base: dict[str, Any],
    experts_per_layer: dict[int, int],
    expert_width: int | dict[int, int] | None = None,
    expert_factors: dict[int, dict[str, list[int]]] | None = None,
    factor_axis: str | None = None,
) -> dict[str, Any]:
    """The config.json of a mapped checkpoint.

    Args:
        base: the original model's config.json. Its number of experts stays: it is the router width.
        experts_per_layer: stored experts of every MoE layer; dense layers are absent.
        expert_width: neurons of the routed experts, where they are fewer than the family's; by
            layer, where layers differ.
        expert_factors: layer -> matrix -> its rank and kept rows of S; other layers are whole.
        factor_axis: whether S keeps rows or columns.

    Raises:
        UnknownFamily: the base model type has no mapped form.
    """
    family = base.get("model_type", "")
    known = stems()
    if family not in known:
        raise UnknownFamily(
            f"no mapped format for model type {family!r}", f"supported: {', '.join(known)}"
        )
    width: Any = expert_width
    if isinstance(expert_width, dict):
        width = {str(layer): n for layer, n in sorted(expert_width.items())}
    config, model = (f"Coalesce{known[family]}{kind}" for kind in ("Config", "ForCausalLM"))
    module = code_files(family)[-1].stem
    factors = {str(layer): each for layer, each in sorted((expert_factors or {}).items())}
    return base | {
        "model_type": f"coalesce_{family}",
        "architectures": [model],
        "auto_map": {
            "AutoConfig": f"{module}.{config}",
            "AutoModelForCausalLM": f"{module}.{model}",
        },
        "experts_per_layer": {str(layer): n for layer, n in sorted(experts_per_layer.items())},
        **({} if expert_width is None else {"expert_width": width}),
        **({"expert_factors": factors, "factor_axis": factor_axis} if factors else {}),
    }


def register() -> None:
    """Lets transformers open mapped folders without trust_remote_code. May be called repeatedly."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from models.mapped import modeling_coalesce, modeling_coalesce_momentum

    known: list[tuple[str, str, Any]] = [(f, s, modeling_coalesce) for f, s in families().items()]
    known += [(family, stem, modeling_coalesce_momentum) for family, (stem, _) in _OWN.items()]
    for family, stem, module in known:
        config = getattr(module, f"Coalesce{stem}Config")
        model = getattr(module, f"Coalesce{stem}ForCausalLM")
        AutoConfig.register(f"coalesce_{family}", config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)
