"""The report says what the numbers say, survives hostile or missing parts, and needs no network."""

import copy
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.report import facts, story, wording
from orchestrator.report.canvas import png, svg_data_uri
from orchestrator.report.card import render_card
from orchestrator.report.figures import overview_figure
from orchestrator.report.html import render_html
from orchestrator.report.write import write_report

VOID = {"meta", "br", "img", "link", "hr", "input", "source"}
DOMAINS = ("chinese_poetry", "code_python", "english_prose", "legal", "scripture")
HOSTILE = "<script>alert('x')</script> $\\frac & \"quoted\""
OPTIONAL = (
    "run", "model", "method", "format", "bytes", "parameters", "experts", "groups", "warnings",
    "tokens", "routing", "align", "perplexity", "kl", "baseline_bytes", "seconds",
    "peak_rss_bytes", "history", "gate", "flops_per_token",
)  # fmt: skip


def grouped(generator: random.Random, experts: int, kept: int) -> list[list[int]]:
    """Random groups; a few experts are dropped so that every kind of fate occurs."""
    order = generator.sample(range(experts), experts)
    groups = [[expert] for expert in order[:kept]]
    for expert in order[kept : experts - experts // 16]:
        generator.choice(groups[: max(1, kept * 2 // 3)]).append(expert)
    return sorted(groups)


def shares(generator: random.Random, experts: int) -> list[float]:
    weights = [generator.expovariate(1) ** 1.6 for _ in range(experts)]
    weights[generator.randrange(experts)] = 0.0
    return [weight / sum(weights) for weight in weights]


def scores(values: list[float]) -> dict[str, Any]:
    mean = math.exp(sum(math.log(value) for value in values) / len(values))
    return {"overall": mean, "domains": dict(zip(DOMAINS, values, strict=True))}


def make_report(layers: int = 5, experts: int = 16, kept: int = 8) -> dict[str, Any]:
    generator = random.Random(7)
    names = [str(layer) for layer in range(layers)]
    groups = {name: grouped(generator, experts, kept) for name in names}
    return {
        "schema": 1,
        "run": {
            "name": "mixtral-half", "created": "2026-11-22T04:00:00Z",
            "command": "coalesce run configs/quickstart.yaml",
            "versions": {"coalesce": "0.1.0", "python": "3.11.7", "torch": "2.9.1"},
        },
        "model": {"path": "examples/bundled/model", "family": "mixtral", "layers": layers,
                  "top_k": 2, "parameters": 5_950_000},
        "method": {"name": "msmoe", "config": {"group": "router-logits", "align": "weights"}},
        "format": "native",
        "bytes": {"before": 11_912_345, "after": 6_801_234, "predicted": 6_800_110,
                  "requested": 6_900_000},
        "parameters": {"before": 5_950_000, "after": 3_395_000},
        "experts": {"before": dict.fromkeys(names, experts), "after": dict.fromkeys(names, kept)},
        "groups": groups,
        "warnings": ["layer 3: expert 9 was selected by 4 tokens only"],
        "tokens": {"calibration": 36_864, "evaluation": 20_480},
        "routing": {name: {d: shares(generator, experts) for d in DOMAINS} for name in names},
        "align": {n: {"objective_before": 0.41, "objective_after": 0.38} for n in names},
        "perplexity": {
            "original": scores([64.2, 21.7, 41.3, 12.9, 28.8]),
            "compressed": scores([91.5, 29.9, 55.1, 18.4, 38.6]),
            "baselines": {
                "frequency": scores([131.0, 33.5, 59.3, 22.8, 47.4]),
                "reap": scores([83.6, 28.1, 50.2, 17.3, 36.9]),
                "random": scores([166.9, 47.2, 77.7, 29.5, 60.3]),
            },
        },
        "kl": {
            "compressed": scores([0.36, 0.31, 0.29, 0.35, 0.28]),
            "baselines": {"reap": scores([0.27, 0.26, 0.2, 0.29, 0.25])},
        },
        "baseline_bytes": {"frequency": 6_801_234, "reap": 6_801_234, "random": 6_801_234},
        "seconds": {"verify": 0.8, "corpus": 1.2, "calibrate": 41.7, "group": 0.3, "align": 6.1,
                    "merge": 9.4, "export": 0.9, "evaluate": 83.0},
        "peak_rss_bytes": {"calibrate": 612_000_000, "merge": 480_000_000, "evaluate": 655_000_000},
        "flops_per_token": {"before": 3_400_000, "after": 2_900_000},
        "history": {
            "starts": [
                {"begun": "2026-05-01T10:00:00Z", "seconds": 71.0, "units": 9, "ended": "killed"},
                {"begun": "2026-05-01T10:09:00Z", "seconds": 80.0, "units": 12, "ended": None},
            ],
            "stages": {"calibrate": {"units": 8, "seconds": 41.7, "slowest": ["shard-3", 9.25],
                                     "peak_rss_bytes": 612_000_000, "lost": {"out_of_memory": 2},
                                     "failed": 1}},
        },
        "gate": {"checks": {"output_loads": True, "bytes": {"passed": True, "error": 0.0002}}},
    }  # fmt: skip


@pytest.fixture
def report() -> dict[str, Any]:
    return make_report()


@pytest.fixture(scope="module")
def page() -> str:
    return render_html(make_report())


class Wellformed(HTMLParser):
    """Fails on a tag closed out of order; collects ids, loads and visible text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self._collect(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._collect(attrs)

    def _collect(self, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset")]
        self.ids += [v or "" for k, v in attrs if k == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


def parse(text: str) -> Wellformed:
    parser = Wellformed()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


def text_of(page: str) -> str:
    return " ".join(" ".join(parse(page).words).split())


def without(report: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in report.items() if name != key}


def test_page_shows_the_numbers_of_the_report(page: str, report: dict[str, Any]) -> None:
    text = text_of(page)
    scored = [report["perplexity"]["original"], report["perplexity"]["compressed"],
              *report["perplexity"]["baselines"].values()]  # fmt: skip
    for score in scored:
        for value in (score["overall"], *score["domains"].values()):
            assert f"{value:.2f}" in text or f"{value:.1f}" in text
    for value in report["bytes"].values():
        assert f"{value:,}" in text
    assert "11.9 MB \N{RIGHTWARDS ARROW} 6.8 MB (57 %)" in text
    assert "36,864" in text and "5,950,000" in text
    assert "coalesce run configs/quickstart.yaml" in text


def test_headline_is_one_sentence_with_every_baseline(report: dict[str, Any]) -> None:
    sentence = story.headline(report)
    assert sentence.startswith("Mixtral, 5 layers, 16 \N{RIGHTWARDS ARROW} 8 experts per layer: ")
    assert "plain pruning at the same bytes: REAP 37.61, frequency" in sentence
    assert sentence.endswith(".") and "\n" not in sentence


@pytest.mark.parametrize(
    ("factor", "kind", "words"),
    [(0.9, "beats", "beats the best"), (1.2, "loses", "loses to the best"), (1.0, "ties", "ties")],
)
def test_verdict_both_ways(report: dict[str, Any], factor: float, kind: str, words: str) -> None:
    best = report["perplexity"]["baselines"]["reap"]["overall"]
    report["perplexity"]["compressed"]["overall"] = best * factor
    verdict = story.verdict(report)
    assert verdict.kind == kind
    assert words in verdict.text and "REAP, at equal bytes" in verdict.text


def test_page_and_card_hold_the_verdict(page: str, report: dict[str, Any]) -> None:
    verdict = story.verdict(report).text
    assert "loses to" in verdict
    for text in (text_of(page), render_card(report, "")):
        assert verdict in text and story.NO_RECOVERY in text


def test_verdict_prefers_a_baseline_of_equal_bytes(report: dict[str, Any]) -> None:
    report["baseline_bytes"]["reap"] *= 1.5
    assert "frequency, at equal bytes" in story.verdict(report).text
    assert "bytes differ or are unknown" in story.headline(report)


def test_verdict_without_equal_bytes_names_the_size(report: dict[str, Any]) -> None:
    report["baseline_bytes"] = {"reap": report["bytes"]["after"] * 1.5}
    report["perplexity"]["baselines"] = {"reap": report["perplexity"]["baselines"]["reap"]}
    assert "which has 150 % of its bytes" in story.verdict(report).text
    del report["baseline_bytes"]
    assert "not recorded" in story.verdict(report).text


def test_verdict_without_rival_or_number(report: dict[str, Any]) -> None:
    report["perplexity"]["compressed"]["overall"] = math.inf
    assert "not a finite number" in story.verdict(report).text
    report["perplexity"]["compressed"]["overall"] = 40.0
    del report["perplexity"]["baselines"]
    assert story.verdict(report).kind == "unknown"
    del report["perplexity"]
    assert "not evaluated" in story.verdict(report).text


def test_rise_is_the_log_ratio(report: dict[str, Any]) -> None:
    report["routing"] = {}
    report["perplexity"]["original"]["overall"] = 20.0
    report["perplexity"]["compressed"]["overall"] = 20.0 * math.exp(0.25)
    assert story.rise(report) == pytest.approx(0.25)
    assert "+0.250" in text_of(render_html(report))


def test_page_is_well_formed_and_loads_nothing(page: str) -> None:
    parser = parse(page)
    assert all(load.startswith(("#", "data:")) for load in parser.loads)
    assert not re.search(r"url\(\s*['\"]?(?!#)|@import|<script|<link", page)
    assert len(parser.ids) == len(set(parser.ids))


def test_references_inside_the_figures_resolve(page: str) -> None:
    parser = parse(page)
    used = {load[1:] for load in parser.loads if load.startswith("#")}
    used |= set(re.findall(r"url\(#([^)]+)\)", page))
    assert used and used <= set(parser.ids)


def test_same_report_gives_the_same_bytes(page: str, report: dict[str, Any]) -> None:
    shuffled = json.loads(json.dumps(report, sort_keys=True))
    assert render_html(shuffled) == page
    assert png(overview_figure(report)) == png(overview_figure(shuffled))
    assert svg_data_uri(overview_figure(report)) == svg_data_uri(overview_figure(report))


def test_hostile_names_are_escaped(report: dict[str, Any]) -> None:
    report["run"]["name"] = report["model"]["path"] = report["model"]["family"] = HOSTILE
    report["warnings"] = [HOSTILE]
    report["method"] = {"name": HOSTILE, "config": {HOSTILE: HOSTILE}}
    report["run"]["command"] = HOSTILE
    report["seconds"][HOSTILE] = 1.0
    report["gate"]["checks"][HOSTILE] = HOSTILE
    report["perplexity"]["baselines"][HOSTILE] = report["perplexity"]["baselines"].pop("random")
    for score in (report["perplexity"]["original"], report["perplexity"]["compressed"]):
        score["domains"][HOSTILE + "\n"] = 3.0
    report["routing"]["0"][HOSTILE] = [1 / 16] * 16
    page = render_html(report)
    assert "<script" not in page
    assert HOSTILE in text_of(page)
    overview_figure(report)


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    """One layer and one domain: figures that are quick to draw."""
    report = make_report(layers=1, experts=4, kept=2)
    report["routing"]["0"] = {"legal": report["routing"]["0"]["legal"]}
    everything = [report["perplexity"]["original"], report["perplexity"]["compressed"]]
    for score in everything + list(report["perplexity"]["baselines"].values()):
        score["domains"] = {}
    return report


@pytest.mark.parametrize("key", OPTIONAL)
def test_every_part_may_be_missing(small: dict[str, Any], key: str) -> None:
    smaller = without(small, key)
    parse(render_html(smaller))
    assert render_card(smaller, "model: x\n")


def test_empty_report_renders(tmp_path: Path) -> None:
    parse(render_html({}))
    assert render_card({}, "")
    assert write_report({}, tmp_path).stat().st_size > 0


def blanked(value: Any) -> Any:
    """The same keys with None (or NaN in lists) for every leaf."""
    if isinstance(value, dict):
        return {key: blanked(item) for key, item in value.items()}
    return [None] * len(value) if isinstance(value, list) else None


def test_none_in_place_of_every_number(report: dict[str, Any]) -> None:
    for key in set(OPTIONAL) - {"groups", "format", "warnings", "method", "gate"}:
        report[key] = blanked(report[key])
    parse(render_html(report))
    overview_figure(report)
    assert render_card(report, "")


def test_one_domain_and_zero_share_experts(report: dict[str, Any]) -> None:
    for score in (report["perplexity"]["original"], report["perplexity"]["compressed"]):
        score["domains"] = {"text": score["overall"]}
    report["perplexity"]["baselines"] = {}
    report["routing"] = {"0": {"text": [0.0] * 16}, "1": {"text": []}}
    parse(render_html(report))


def test_wide_ratio_uses_a_log_scale(report: dict[str, Any]) -> None:
    report["routing"] = {}
    report["perplexity"]["baselines"]["random"]["domains"]["legal"] = 250_000.0
    assert "perplexity (log scale)" in render_html(report)


def test_mapped_and_uneven_layers(report: dict[str, Any]) -> None:
    report["routing"] = {}
    report["format"] = "mapped"
    report["experts"]["after"]["0"] = 6
    text = text_of(render_html(report))
    assert "16 \N{RIGHTWARDS ARROW} 6 to 8 experts per layer" in text
    assert "trust_remote_code=True" in text and "no expert map" in text


def test_big_model_stays_small(tmp_path: Path) -> None:
    big = make_report(layers=61, experts=256, kept=128)
    page = render_html(big)
    assert len(page) < 3_000_000
    assert "Showing 12 of 61 layers" in text_of(page)
    assert len(png(overview_figure(big))) < 1_000_000


def test_columns_stand_by_group() -> None:
    layer = facts.Layer(0, 6, 2, [[4, 1], [2, 5, 0]], [3], None, None)
    assert facts.expert_order(layer, 6) == [4, 1, 2, 5, 0, 3]
    assert facts.expert_order(None, 3) == [0, 1, 2]


def test_layers_know_what_was_dropped(report: dict[str, Any]) -> None:
    for layer in facts.layers(report):
        named = {expert for group in layer.groups for expert in group}
        assert named.isdisjoint(layer.dropped) and len(named) + len(layer.dropped) == 16


def test_spread_keeps_both_ends() -> None:
    assert facts.spread(list(range(61)), 4) == [0, 20, 40, 60]
    assert facts.spread([1, 2], 4) == [1, 2]


def test_write_report_leaves_three_files(report: dict[str, Any], tmp_path: Path) -> None:
    report["perplexity"]["compressed"]["overall"] = math.inf
    before = copy.deepcopy(report)
    page = write_report(report, tmp_path / "report")
    assert sorted(path.name for path in page.parent.iterdir()) == [
        "index.html", "overview.png", "report.json",
    ]  # fmt: skip
    text = (page.parent / "report.json").read_text()
    assert text.endswith("}\n") and json.loads(text)["bytes"] == report["bytes"]
    assert json.loads(text)["perplexity"]["compressed"]["overall"] == "inf"
    assert (page.parent / "overview.png").read_bytes().startswith(b"\x89PNG")
    assert report == before


@pytest.mark.parametrize(
    "path", ["a\"b'c", "two\nlines\n---\ntags: [evil]", "colon: # hash", "{x}", "naïve/模型"]
)
def test_card_front_matter_survives_any_path(report: dict[str, Any], path: str) -> None:
    report["model"]["path"] = path
    card = render_card(report, "model: x\n")
    front = yaml.safe_load(re.split(r"^---$", card, flags=re.MULTILINE)[1])
    assert front == {
        "base_model": path, "library_name": "transformers",
        "tags": ["mixture-of-experts", "merge", "compression", "coalesce"],
    }  # fmt: skip


def test_card_holds_config_numbers_and_reference(report: dict[str, Any]) -> None:
    config = "model: examples/bundled/model\nmethod: {name: msmoe}\n"
    card = render_card(report, config)
    assert config in card and "arXiv:2310.01334" in card and story.NO_RECOVERY in card
    assert "| pruned: REAP | 6.8 MB | 37.61 |" in card
    assert "trust_remote_code" not in card
    assert "trust_remote_code=True" in render_card({**report, "format": "mapped"}, config)


def test_card_fence_is_longer_than_any_inside(report: dict[str, Any]) -> None:
    card = render_card(report, "note: '```'\n")
    assert "````yaml\nnote: '```'\n````" in card


@pytest.mark.parametrize(
    ("function", "value", "expected"),
    [
        (wording.size, 999, "999 B"),
        (wording.size, 96_800_000_000, "96.8 GB"),
        (wording.size, None, "\N{EN DASH}"),
        (wording.duration, 3_725, "1 h 02 min"),
        (wording.duration, 61.2, "1 min 01 s"),
        (wording.perplexity, math.nan, "not finite"),
        (wording.perplexity, 123_456.7, "123,457"),
        (wording.percent, 0.571, "57 %"),
        (wording.nats, -0.1, "\N{MINUS SIGN}0.100"),
    ],
)
def test_wording(function: Any, value: Any, expected: str) -> None:
    assert function(value) == expected
