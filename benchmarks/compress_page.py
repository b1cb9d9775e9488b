"""The tables of docs/compress.md, from what `benchmarks.compress` measured."""

from __future__ import annotations

from typing import Any

from benchmarks.pages import Marks, between

TITLES = {"original": "original", "merged": "merged", "compressed": "merged, U V + S"}


def marks(name: str) -> Marks:
    """Two lines of the page."""
    return f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"


def put(page: str, found: dict[str, Any]) -> str:
    """The page with all tables of the results."""
    tables = {
        "svd": svd(found["svd"]),
        "paper": paper(found["plans"]),
        "speed": speed(found["speed"]),
        "quality": quality(found),
    }
    for name, body in tables.items():
        page = between(page, marks(name), body)
    return page


def svd(rows: list[dict[str, Any]]) -> str:
    """Seconds, and the error over the best one of that rank."""
    size = f"{rows[0]['height']} x {rows[0]['width']}"
    lines = [f"| random {size} matrix, fp32 | rank | seconds | error over the best |"]
    lines.append("|---|---:|---:|---:|")
    lines += [
        f"| {row['way']} | {row['rank']} | {row['seconds']:.2f} | {row['error_over_best']:.4f} |"
        for row in rows
    ]
    return "\n".join(lines)


def paper(plans: dict[str, dict[str, Any]]) -> str:
    """What is counted beside what the paper prints."""
    switch, mixtral = plans["switch-base-32"], plans["mixtral-8x7b"]
    shares = switch["flops_share"], switch["flops_share_with_attention"]
    lines = [
        "| switch-base-32 | values, counted | paper |",
        "|---|---:|---:|",
        f"| full | {millions(switch['full'])} | 2.0 B |",
        f"| merged, each expert once | {millions(switch['merged'])} | 733 M |",
        f"| merged, U V + S, zeros of S not counted | {millions(switch['decomposed'])} | 381 M |",
        f"| FLOPs, products with weights | {percent(shares[0])} | |",
        f"| FLOPs, with attention scores at {switch['attention_tokens']} tokens |"
        f" {percent(shares[1])} | 82.4 % (4.65 -> 3.83 TFLOPs) |",
        "",
        "| Mixtral-8x7B | values | files | GFLOP per token |",
        "|---|---:|---:|---:|",
        f"| full | {millions(mixtral['full'])} | {giga(mixtral['file_bytes_before'], 'GB')} |"
        f" {giga(mixtral['flops_before'], '')} |",
        f"| merged, each expert once | {millions(mixtral['merged'])} | | |",
        f"| merged, U V + S | {millions(mixtral['decomposed'])} |"
        f" {giga(mixtral['file_bytes_after'], 'GB')} | {giga(mixtral['flops_after'], '')} |",
    ]
    return "\n".join(lines)


def speed(sizes: dict[str, dict[str, Any]]) -> str:
    """The wider model in full, and how the narrower one compares."""
    rows = {row["model"]: row for row in sizes["quarter"]["rows"]}
    lines = ["| | " + " | ".join(TITLES.values()) + " |", "|---|---:|---:|---:|"]
    for title, key, form, unit in (
        ("expert bytes in memory", "expert_bytes", ".0f", 1e6),
        ("GFLOPs for 512 tokens", "gflops", ".1f", 1),
        ("prefill, tokens/s", "prefill_tokens_s", ".0f", 1),
        ("decode at batch 4, tokens/s", "decode_tokens_s", ".1f", 1),
    ):
        behind = " MB" if unit > 1 else ""
        shown = (f"{rows[name][key] / unit:{form}}{behind}" for name in TITLES)
        lines.append(f"| {title} | " + " | ".join(shown) + " |")
    wide, narrow = (sizes[name]["figures"] for name in ("quarter", "sixteenth"))
    lines.append(
        f"\nFiles are {wide['bytes_over_arithmetic']:.5f} of the arithmetic. Against the merged"
        f" model prefill is {wide['prefill_over_merged']:.2f} times and decoding"
        f" {wide['decode_over_merged']:.2f} times as fast;\nat width"
        f" {sizes['sixteenth']['width'][0]} it is {narrow['prefill_over_merged']:.2f} and"
        f" {narrow['decode_over_merged']:.2f} times. Medians of {sizes['quarter']['turns']}"
        " turns."
    )
    return "\n".join(lines)


def quality(found: dict[str, Any]) -> str:
    """Bytes and perplexity over the original's."""
    lines = ["| | bytes | perplexity |", "|---|---:|---:|"]
    lines += [
        f"| {row['variant']} | {percent(row['bytes_over_original'])} |"
        f" {row['perplexity_over_original']:.3f} |"
        for row in found["quality"]
    ]
    steps, batch = found["recovery"]["steps"], found["recovery"]["batch"]
    lines.append(
        f"\nBoth over the original's; {steps} steps of {batch} blocks, seed {found['seed']}."
    )
    return "\n".join(lines)


def millions(count: int) -> str:
    """`1,979 M`"""
    return f"{count / 1e6:,.0f} M"


def percent(share: float) -> str:
    """`80.3 %`"""
    return f"{100 * share:.1f} %"


def giga(count: float, unit: str) -> str:
    """`93.4 GB`"""
    return f"{count / 1e9:.1f} {unit}".strip()
