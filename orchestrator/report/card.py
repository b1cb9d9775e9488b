"""The model card that lies beside the compressed weights."""

from collections.abc import Iterable
from typing import Any

import yaml

from orchestrator.report import charts, facts, story, wording
from orchestrator.report.facts import Variant, part

PAPER = "[Merge, Then Compress](https://arxiv.org/abs/2310.01334) (arXiv:2310.01334)"
NATIVE = """\
The format is **native**: the tensor names and the configuration are those of the original family.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```"""
MAPPED = """\
The format is **mapped**: the router keeps all its rows and a map sends each original expert to a
merged one. The modeling file beside the weights does that, so either trust it or install Coalesce
and leave the flag out."""
BRINGS_CODE = """\
The format is **native**: the tensor names and the configuration are those of the original family.
transformers does not have this family; its code lies beside the weights, so either trust it or
install Coalesce and leave the flag out."""
TRUSTED = """

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(
    "path/to/this/folder", dtype="auto", trust_remote_code=True
)
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```"""


def render_card(report: dict[str, Any], config_yaml: str) -> str:
    """README.md with front matter for a model hub."""
    sections = [
        f"---\n{_front_matter(report)}---",
        f"# {_escape(part(report, 'run', 'name') or 'Compressed model')}",
        f"{_escape(story.headline(report))}\n\n{_verdict(report)}",
        f"## How to load it\n\n{_loading(report)}",
        f"## Quality\n\n{_quality(report)}",
        f"## Size\n\n{_sizes(report)}",
        f"## Method\n\n{_method(report)}",
        f"## Configuration of the run\n\n{_fenced(config_yaml, 'yaml')}",
        f"## Limits\n\n{_limits(report)}",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(report: dict[str, Any]) -> str:
    fields = {
        "base_model": str(part(report, "model", "path") or "unknown"),
        "library_name": "transformers",
        "tags": ["mixture-of-experts", "merge", "compression", "coalesce"],
    }
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def _escape(text: Any) -> str:
    """One line of text that Markdown shows as it is."""
    line = " ".join(str(text).split())
    for old in "\\`*_[]<>|":
        line = line.replace(old, "&lt;" if old == "<" else f"\\{old}")
    return line


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(heads)
    lines = [names, ["---"] + ["---:"] * (len(names) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _verdict(report: dict[str, Any]) -> str:
    return f"**{_escape(story.verdict(report).text)}** {story.no_recovery(report)}"


def _loading(report: dict[str, Any]) -> str:
    code = NATIVE
    if part(report, "format") == "mapped":
        code = MAPPED + TRUSTED
    elif story.brings_code(report):
        code = BRINGS_CODE + TRUSTED
    rows = ((program, opens, _escape(how)) for program, opens, how in story.loading(report))
    return f"{code}\n\n{_table(('program', 'opens', 'how'), rows)}".replace("---:", "---")


def _quality(report: dict[str, Any]) -> str:
    found = facts.variants(report)
    if not found:
        return "The model was not evaluated."
    original = facts.of_kind(found, "original")
    parts = [
        _table(
            ("model", "bytes", "perplexity", "rise (nats)", "KL (nats)"),
            (_overall_row(variant, original) for variant in found),
        )
    ]
    names = facts.domains(report)
    if names:
        labels = (_escape(charts.caption(variant)) for variant in found)
        rows = ([_escape(wording.domain(name)), *_perplexities(found, name)] for name in names)
        parts.append("Perplexity per domain:\n\n" + _table(("domain", *labels), rows))
    return "\n\n".join([story.no_recovery(report), *parts])


def _overall_row(variant: Variant, original: Variant | None) -> list[str]:
    reference = original.perplexity.overall if original else None
    rise = facts.log_ratio(variant.perplexity.overall, reference)
    return [
        _escape(charts.caption(variant)),
        wording.size(variant.bytes),
        wording.perplexity(variant.perplexity.overall),
        wording.nats(None if variant is original else rise),
        wording.decimal(variant.kl.overall),
    ]


def _perplexities(found: list[Variant], domain: str) -> list[str]:
    return [wording.perplexity(variant.perplexity.of(domain)) for variant in found]


def _sizes(report: dict[str, Any]) -> str:
    parameters, sizes = facts.table(report, "parameters"), facts.table(report, "bytes")
    rows = [
        [name, wording.size(sizes.get(key)), wording.count(parameters.get(key))]
        for name, key in (("original", "before"), ("compressed", "after"))
    ]
    return _table(("", "size", "parameters"), rows)


def _method(report: dict[str, Any]) -> str:
    name = _escape(part(report, "method", "name") or "not recorded")
    tokens = wording.count(part(report, "tokens", "calibration"))
    return (
        f"Made with Coalesce by the method **{name}**, from routing statistics over {tokens} "
        f"calibration tokens. {_experts(report)}\n\nReference for merging experts: {PAPER}."
    )


def _experts(report: dict[str, Any]) -> str:
    """What happened to the experts, counted over all layers."""
    layers = facts.layers(report)
    merged = sum(len(group) for layer in layers for group in layer.merged)
    groups = sum(len(layer.merged) for layer in layers)
    dropped = sum(len(layer.dropped) for layer in layers)
    parts = [story.experts_phrase(report)]
    parts += [f"{merged} experts merged into {groups}"] if groups else []
    parts += [f"{dropped} experts dropped"] if dropped else []
    text = "; ".join(text for text in parts if text)
    return f"In numbers: {text}." if text else ""


def _limits(report: dict[str, Any]) -> str:
    tokens = wording.count(part(report, "tokens", "evaluation"))
    lines = [
        f"- {story.no_recovery(report)}",
        f"- Quality is perplexity on {tokens} tokens of the domains above; other languages, "
        "domains and downstream tasks were not measured.",
        "- Experts that calibration text seldom selects are often the first to be merged or "
        "dropped, so text unlike the calibration text may suffer more.",
        "- The licence and the limits of the base model apply.",
    ]
    lines += [f"- Warning of the run: {_escape(text)}" for text in report.get("warnings") or []]
    return "\n".join(lines)
