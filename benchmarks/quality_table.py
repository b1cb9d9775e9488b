"""The tables of docs/methods.md, from the file that the benchmark wrote."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.quality_summary import OURS, Row, best_other, fewer

# The name of the bundled model's folder, of which a page shows everything.
BUNDLED = "model"


def marks(found: Mapping[str, Any]) -> tuple[str, str]:
    """What stands between these lines of a page comes from the file."""
    model = found["setup"]["model"]
    name = "quality" if model == BUNDLED else f"quality of {model}"
    return f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"


def tables(found: Mapping[str, Any]) -> str:
    """All tables in Markdown, separated by blank lines; of another model the first two."""
    rows = found["rows"]
    parts = [_against_best(rows), _rises(rows)]
    parts += [_details(found, 0.5)] if found["setup"]["model"] == BUNDLED else []
    parts += [tokens_table(found["calibration_tokens"])] if found.get("calibration_tokens") else []
    parts += [one_domain_table(found)] if found.get("one_domain") else []
    return "\n\n".join(parts) + "\n"


def _against_best(rows: Sequence[Row]) -> str:
    """The default and what costs more beside the best published method without our refit."""
    lines = []
    ours = [row for row in rows if row["method"] in OURS and row["refit"]]
    for row in sorted(ours, key=lambda row: (OURS.index(row["method"]), -row["keep"])):
        other = best_other(rows, row["keep"])
        if other is not None:
            ratio = row["rise"] / other["rise"]
            names = [f"`{other['method']}`", _plus_minus(other), f"{ratio:.3f}"]
            cost = "" if row.get("cpu_seconds") is None else f"{row['cpu_seconds']:.0f}"
            name = [fewer(row["keep"]), f"`{row['method']}`", row["format"]]
            lines.append([*name, _plus_minus(row), *names, cost])
    head = ["fewer expert bytes", "ours", "format", "rise", "best published, no refit"]
    return _markdown([*head, "its rise", "ratio", "CPU seconds"], lines, left=(0, 1, 2, 4))


def _rises(rows: Sequence[Row]) -> str:
    """Rise of the log-perplexity, every method with and without refit."""
    ratios = list(dict.fromkeys(row["keep"] for row in rows))
    cells = {(row["method"], row["keep"], row["refit"]): row for row in rows}
    head = ["method", "format"]
    for keep in ratios:
        head += [f"{fewer(keep)} fewer", "with refit"]
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        form = next(row["format"] for row in rows if row["method"] == method)
        line = [_name(method), form]
        for keep in ratios:
            for refit in (False, True):
                row = cells.get((method, keep, refit))
                best = row is not None and row == best_other(rows, keep)
                text = "" if row is None else _plus_minus(row)
                line.append(f"**{text}**" if best else text)
        lines.append(line)
    return _markdown(head, lines, left=(0, 1))


def _details(found: Mapping[str, Any], keep: float) -> str:
    """Everything else that was measured, at one ratio."""
    rows = [row for row in found["rows"] if row["keep"] == keep]
    domains = list(found["original"]["perplexity"]["domains"])
    head = [f"{fewer(keep)} fewer", "perplexity", "se domains", "KL", "agreement"]
    head += ["MFLOPs", "bytes, M", *domains]
    original = found["original"]
    per_domain = [f"({original['perplexity']['domains'][d]:.1f})" for d in domains]
    lines = [
        [
            *("original", f"{original['perplexity']['overall']:.1f}", "", "", ""),
            *(_millions(original[each]) for each in ("flops_per_token", "bytes")),
            *per_domain,
        ]
    ]
    for row in rows:
        name = _name(row["method"]) + (" + refit" if row["refit"] and not row["control"] else "")
        numbers = [f"{row['perplexity']:.1f}", _error(row["se_domains"]), f"{row['kl']:.3f}"]
        numbers += [f"{100 * row['agreement']:.0f} %", _millions(row["flops_per_token"])]
        numbers += [_millions(row["bytes"]), *(f"{row['domains'][d]:.3f}" for d in domains)]
        lines.append([name, *numbers])
    return _markdown(head, lines, left=(0,))


def tokens_table(groups: Sequence[Mapping[str, Any]]) -> str:
    """Rise against the number of calibration tokens."""
    names = [_refitted(row) for row in groups[0]["rows"]]
    lines = [[f"{g['tokens']:,}", *(_plus_minus(row) for row in g["rows"])] for g in groups]
    return _markdown(["calibration tokens", *names], lines, left=())


def one_domain_table(found: Mapping[str, Any]) -> str:
    """Per-domain rise when the calibration text is of one domain, beside that of all domains."""
    only, rows = found["one_domain"]["domain"], found["one_domain"]["rows"]
    mixed = {(row["method"], row["refit"], row["keep"]): row for row in found["rows"]}
    domains, lines = list(rows[0]["domains"]), []
    for row in rows:
        beside = mixed[row["method"], row["refit"], row["keep"]]
        for text, each in (("all", beside), (f"`{only}`", row)):
            values = [f"{each['domains'][d]:.3f}" for d in domains]
            lines.append([_refitted(row), text, f"{each['rise']:.3f}", *values])
    return _markdown(
        [fewer(rows[0]["keep"]) + " fewer", "calibrated on", "mean", *domains], lines, left=(0, 1)
    )


def _markdown(head: Sequence[str], lines: Iterable[Sequence[str]], left: Sequence[int]) -> str:
    marks = ["---" if i in left else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, marks, *lines))


def _name(method: str) -> str:
    return method if ":" in method else f"`{method}`"


def _refitted(row: Row) -> str:
    return _name(row["method"]) + (" + refit" if row["refit"] else "")


def _plus_minus(row: Row) -> str:
    error = _error(row["se_seeds"])
    return f"{row['rise']:.3f}" + (f" ± {error}" if error else "")


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _millions(value: float) -> str:
    return f"{value / 1e6:.2f}"
