"""Gathers report.json from what the stages left (schema: docs/architecture.md)."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from orchestrator import flops
from orchestrator.config import RunConfig
from orchestrator.events import read_events
from orchestrator.preflight import Prepared
from orchestrator.recovery import untrained_lines
from orchestrator.report.cautions import cautions, overlaps, untrained
from orchestrator.report.history import history
from orchestrator.run_folder import MAIN, RECOVERED, versions
from stages.calibrate import coverage
from stages.calibrate.statistics import domain_sums
from stages.compress.config import CompressConfig
from stages.corpus.stage import count_tokens
from stages.evaluate.stage import ORIGINAL
from stages.export.layout import FileLayout
from stages.group.decision import LayerDecision
from stages.group.super_experts import protected_lines
from stages.group.task import task_layers
from stages.transform.stage import file_name
from stages.unit import Done


@dataclass(frozen=True)
class Collected:
    """What a finished run has in hand."""

    prepared: Prepared
    statistics: pa.Table
    decisions: Sequence[LayerDecision]
    layouts: Sequence[FileLayout]
    baseline_bytes: Mapping[str, int]
    measured: Mapping[str, Mapping[str, Any]]
    done: Mapping[str, Sequence[Done]]


# Of the result of a layer's job.
_REFIT = (
    "strength",
    "error_before",
    "error_after",
    "held_out_before",
    "held_out_after",
    "held_out_kl_before",
    "held_out_kl_after",
    "condition",
    "tokens_per_unknown",
    "few_tokens",
    "polished",
)


def collect(found: Collected) -> dict[str, Any]:
    """The whole report as JSON values."""
    config = found.prepared.config
    moe = found.prepared.moe
    course = history(read_events(found.prepared.folder.events))
    return {
        "schema": 1,
        "run": {
            "name": found.prepared.folder.root.name,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": f"coalesce run {found.prepared.folder.config.name}",
            "versions": versions(),
        },
        "model": {
            "path": config.model.path,
            "family": moe.family.model_type,
            "layers": len(moe.layers),
            "top_k": moe.top_k,
            "parameters": moe.checkpoint.parameters,
        },
        "method": {
            "name": config.group.method,
            "config": {
                "group": config.group.model_dump(mode="json"),
                "align": config.align.model_dump(mode="json"),
                "merge": config.merge.model_dump(mode="json"),
                "narrow": config.narrow.model_dump(mode="json"),
                "refit": config.refit.model_dump(mode="json"),
                **_compress(config),
                **_recover(config),
                "export": config.export.model_dump(mode="json", exclude={"compress"}),
            },
        },
        "format": config.export.format,
        **_sizes(found),
        "flops_per_token": {
            "before": flops.per_token(moe),
            "after": flops.per_token(moe, found.decisions, _computed(found.prepared)),
        },
        **_layers(found),
        "warnings": [*_warnings(found), *found_cautions(found)],
        "overlap": overlaps(found.done.get("corpus", ())),
        "tokens": _tokens(found),
        "calibrate": _engines(found),
        "routing": _routing(found.statistics),
        **_training(found),
        **_quality(found.measured),
        "baseline_bytes": dict(found.baseline_bytes),
        "history": course,
        "seconds": {name: each["seconds"] for name, each in course["stages"].items()},
        "peak_rss_bytes": {n: each["peak_rss_bytes"] for n, each in course["stages"].items()},
        "gate": _export_result(found),
    }


def _computed(prepared: Prepared) -> CompressConfig | None:
    """How experts are computed: only `mapped` leaves them as U V + S."""
    export = prepared.variants[0].export
    return export.compress if export.format == "mapped" else None


def _compress(config: RunConfig) -> dict[str, Any]:
    section = config.compress
    return {} if section is None else {"compress": section.model_dump(mode="json")}


def _recover(config: RunConfig) -> dict[str, Any]:
    section = config.recover
    return {} if section is None else {"recover": section.model_dump(mode="json")}


def _training(found: Collected) -> dict[str, Any]:
    """What the recovery trained, on how much, and how far the loss fell."""
    done = found.done.get("recover", ())
    if found.prepared.config.recover is None or not done:
        return {}
    mode = found.prepared.config.recover.mode
    return {"recover": done[-1].result | {"mode": mode, "seconds": done[-1].seconds}}


def _sizes(found: Collected) -> dict[str, Any]:
    moe, config = found.prepared.moe, found.prepared.config
    sizes = {
        "before": moe.checkpoint.file_bytes,
        "after": _export_result(found)["bytes"],
        "predicted": sum(layout.file_bytes for layout in found.layouts),
    }
    requested = config.group.budget.target_bytes
    parameters = sum(layout.parameters for layout in found.layouts)
    return {
        "bytes": sizes | ({} if requested is None else {"requested": requested}),
        "parameters": {"before": moe.checkpoint.parameters, "after": parameters},
    }


def _width(decisions: Sequence[LayerDecision]) -> int | None:
    """Neurons per expert; where layers differ, their mean. None: all of them."""
    widths = [each.width for each in decisions if each.width is not None]
    return round(sum(widths) / len(widths)) if widths else None


def _layers(found: Collected) -> dict[str, Any]:
    decisions = found.decisions
    merged = {d.name: d.result for d in found.done.get("transform", ())}
    results = {d.layer: merged.get(f"{MAIN}/{file_name(d.layer)}", {}) for d in decisions}
    return {
        "experts": {
            "before": {str(d.layer): len(d.group) for d in decisions},
            "after": {str(d.layer): len(d.representatives) for d in decisions},
        },
        "width": {
            "before": found.prepared.moe.meta_expert(decisions[0].layer).neurons,
            "after": _width(decisions),
            "layers": {str(each.layer): each.width for each in decisions},
        },
        "refit": {
            str(layer): {key: result.get(key) for key in _REFIT}
            for layer, result in results.items()
            if "error_after" in result
        },
        "groups": {str(d.layer): _groups(d) for d in decisions},
        "align": {
            str(layer): {
                "objective_before": result["distance_before"],
                "objective_after": result["distance_after"],
            }
            for layer, result in results.items()
            if "distance_before" in result
        },
    }


def _groups(decision: LayerDecision) -> list[list[int]]:
    """Members of every group, its representative first."""
    pairs = zip(decision.representatives, decision.members, strict=True)
    return [[first, *(e for e in members if e != first)] for first, members in pairs]


def _tokens(found: Collected) -> dict[str, int]:
    by_domain = {domain: int(s["tokens"][0]) for (domain, _), s in _sums(found.statistics).items()}
    counts = {"calibration": sum(by_domain.values())}
    if found.prepared.config.evaluate is not None:
        counts["evaluation"] = count_tokens(found.prepared.folder.evaluation_tokens)
    return counts


def _warnings(found: Collected) -> list[str]:
    config = found.prepared.config
    layers = task_layers(found.statistics, config.group.task)
    return [
        *found.prepared.notes,
        *coverage.warnings(layers, config.calibrate.min_tokens_per_expert),
        *protected_lines(layers, config.group),
    ]


def found_cautions(found: Collected) -> list[str]:
    """What is known of domains once everything was measured."""
    config = found.prepared.config
    lines = cautions(
        _quality(found.measured).get("perplexity", {}),
        found.statistics["domain"].unique().to_pylist(),
        config.group.task,
        overlaps(found.done.get("corpus", ())),
        config.calibrate.dedup,
        _layers(found)["refit"],
    )
    return [
        *lines,
        *(untrained(config.export.router) if config.recover is None else ()),
        *untrained_lines(found.done.get("recover", ())),
    ]


def _engines(found: Collected) -> dict[str, dict[str, int]]:
    """Shards by the engine that observed them; a run may be finished by the other one."""
    results = [done.result for done in found.done.get("calibrate", ())]
    return {"engines": dict(sorted(Counter(r.get("engine", "resident") for r in results).items()))}


def _routing(table: pa.Table) -> dict[str, dict[str, list[float]]]:
    """Layer -> domain -> share of the selections of each expert."""
    found: dict[str, dict[str, list[float]]] = {}
    for (domain, layer), sums in _sums(table).items():
        total = max(int(sums["selected"].sum()), 1)
        shares = [round(int(count) / total, 6) for count in sums["selected"]]
        found.setdefault(str(layer), {})[domain] = shares
    return found


def _sums(table: pa.Table) -> dict[tuple[str, int], Any]:
    return dict(sorted(domain_sums(table).items()))


def _quality(measured: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    if not measured:
        return {}
    ours = (ORIGINAL, MAIN, RECOVERED)
    baselines = {name: m for name, m in measured.items() if name not in ours}
    # What the run is for; without a recovery that is what was measured as it was reduced.
    result = measured.get(RECOVERED, measured[MAIN])
    found: dict[str, Any] = {
        "perplexity": {
            "original": measured[ORIGINAL]["perplexity"],
            "compressed": result["perplexity"],
            "baselines": {name: each["perplexity"] for name, each in baselines.items()},
        }
    }
    if "kl" in result:
        found["kl"] = {
            "compressed": result["kl"],
            "baselines": {name: each["kl"] for name, each in baselines.items()},
        }
    if RECOVERED in measured:
        for name, numbers in found.items():
            numbers["unrecovered"] = measured[MAIN][name]
    return found


def _export_result(found: Collected) -> dict[str, Any]:
    """Of the checkpoint that the run is for: the last one, where it was trained."""
    last = found.prepared.config.recover is not None
    return found.done["export"][-1 if last else 0].result
