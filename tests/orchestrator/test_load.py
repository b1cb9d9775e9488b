"""Where a value comes from, and what is said about one that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator import load as loading
from orchestrator.config import RunConfig
from orchestrator.errors import ConfigError
from orchestrator.load import COMMAND_LINE, find_recipe, flatten, load, recipes
from tests.orchestrator.tiny_run import Command

MINIMAL: dict[str, Any] = {
    "run_dir": "runs/x",
    "model": {"path": "somewhere"},
    "calibrate": {"data": {"sources": [{"path": "text.txt"}]}, "shards": 3},
    "group": {"method": "mc_smoe", "budget": {"experts_per_layer": 4}},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(str(file), overrides)
    return str(caught.value)


# Precedence ---------------------------------------------------------------------------------------


def test_a_value_that_is_not_given_is_the_default(file: Path) -> None:
    loaded = load(str(file))
    assert loaded.config.calibrate.batch_size == 8
    assert loaded.sources["calibrate.batch_size"] == "default"


def test_the_file_wins_over_the_default(file: Path) -> None:
    loaded = load(str(file))
    assert loaded.config.calibrate.shards == 3
    assert loaded.sources["calibrate.shards"] == str(file)


def test_the_command_line_wins_over_the_file(file: Path) -> None:
    loaded = load(str(file), ["calibrate.shards=5"])
    assert loaded.config.calibrate.shards == 5
    assert loaded.sources["calibrate.shards"] == COMMAND_LINE


def test_of_two_overrides_the_later_wins(file: Path) -> None:
    config = load(str(file), ["calibrate.shards=5", "calibrate.shards=6"]).config
    assert config.calibrate.shards == 6


def test_an_override_may_name_a_key_that_the_file_does_not_have(file: Path) -> None:
    loaded = load(str(file), ["executor.kind=local"])
    assert loaded.config.executor.kind == "local"
    assert loaded.sources["executor.kind"] == COMMAND_LINE
    assert loaded.sources["executor.workers"] == "default"


def test_an_override_of_a_section_replaces_it_and_its_sources(file: Path) -> None:
    loaded = load(str(file), ["group.budget={keep_ratio: 0.25}"])
    assert loaded.config.group.budget.keep_ratio == 0.25
    assert loaded.sources["group.budget.keep_ratio"] == COMMAND_LINE
    assert loaded.sources["group.budget.experts_per_layer"] == "default"


def test_overrides_are_yaml(file: Path) -> None:
    words = ["group.skip_layers=[0, 3]", "model.allow_links=true", "evaluate=null"]
    config = load(str(file), words).config
    assert config.group.skip_layers == (0, 3)
    assert config.model.allow_links is True
    assert config.evaluate is None


def test_a_value_may_hold_an_equals_sign(file: Path) -> None:
    assert load(str(file), ["model.path=a=b"]).config.model.path == "a=b"


def test_every_resolved_key_has_a_source(file: Path) -> None:
    loaded = load(str(file))
    assert set(loaded.sources) == set(flatten(loaded.config.model_dump(mode="json")))


def test_a_resolved_config_loads_as_itself(file: Path, tmp_path: Path) -> None:
    config = load(str(file)).config
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load(str(again)).config == config


# Hints --------------------------------------------------------------------------------------------

TYPOS = {
    "grup.method=reap": ("grup: unknown key", "did you mean group?", "run_dir"),
    "calibrate.shard=2": ("calibrate.shard: unknown key", "did you mean shards?", "batch_size"),
    "group.buget=1": ("group.buget: unknown key", "did you mean budget?", "skip_layers"),
    "group.budget.keep_rato=0.5": ("group.budget.keep_rato", "did you mean keep_ratio?"),
    "calibrate.data.tokns=9": ("calibrate.data.tokns", "did you mean tokens?", "sequence_length"),
    "calibrate.data.sources=[{path: a, wieght: 2}]": (
        "calibrate.data.sources.0.wieght: unknown key",
        "did you mean weight?",
        "text_column",
    ),
    "evaluate={data: {sources: [{path: a}]}, baslines: []}": (
        "evaluate.baslines: unknown key",
        "did you mean baselines?",
        "kl_positions",
    ),
    "group.method=mc_smo": ("group.method", "did you mean mc_smoe?", "frequency, reap"),
    "export.format=nativ": ("export.format", "did you mean native?", "mapped, expanded"),
}


@pytest.mark.parametrize("override", TYPOS)
def test_a_typo_is_answered_with_the_nearest_name_and_all_names(file: Path, override: str) -> None:
    message = refusal(file, override)
    for fragment in TYPOS[override]:
        assert fragment in message


def test_a_key_of_another_method_is_refused_with_the_keys_of_this_one(file: Path) -> None:
    message = refusal(file, "group={method: reap, scope: global}")
    assert "group.scope: unknown key" in message
    assert "valid: budget, method, protect_super_experts, skip_layers, task" in message


WRONG = {
    "calibrate.shards=many": ("calibrate.shards", "integer", "'many'"),
    "calibrate.shards=0": ("calibrate.shards", "greater than 0", "0"),
    "group.budget={keep_ratio: 1.5}": ("group.budget.keep_ratio", "less than or equal to 1", "1.5"),
    "executor.workers=1.5": ("executor.workers", "integer", "1.5"),
    "model=tiny": ("model: holds keys of its own", "path", "'tiny'"),
    "group=reap": ("group: holds keys of its own", "method", "'reap'"),
    "group=null": ("group: holds keys of its own", "method", "None"),
    "group={budget: {keep_ratio: 0.5}}": ("group.method: is missing", "coalesce, mc_smoe, uncurl"),
    "calibrate.data.sources=[]": ("calibrate.data.sources", "at least 1"),
    "calibrate={}": ("calibrate.data: Field required",),
    "group.budget.keep_ratio=0.5": ("exactly one of", "got experts_per_layer, keep_ratio"),
    "group.budget={}": ("exactly one of", "got none"),
    "group.budget={target_bytes: 9, keep_ratio: 0.5, experts_per_layer: 1}": (
        "got experts_per_layer, keep_ratio, target_bytes",
    ),
}


@pytest.mark.parametrize("override", WRONG)
def test_a_value_that_cannot_be_is_refused_with_its_key(file: Path, override: str) -> None:
    message = refusal(file, override)
    for fragment in WRONG[override]:
        assert fragment in message


def test_all_mistakes_are_listed_at_once(file: Path) -> None:
    message = refusal(file, "calibrate.shards=-1", "executor.kind=cloud", "modle=1")
    for key in ("calibrate.shards", "executor.kind", "modle"):
        assert message.count(f"\n  {key}: ") == 1


@pytest.mark.parametrize("word", ["calibrate.shards", "=3", "", "--shards"])
def test_a_word_that_is_no_assignment_is_refused(file: Path, word: str) -> None:
    message = refusal(file, word)
    assert f"{word!r} is not an override" in message
    assert "key.path=value" in message


def test_an_override_that_is_not_yaml_is_refused(file: Path) -> None:
    assert "the value of 'group.skip_layers=[1' is not YAML" in refusal(
        file, "group.skip_layers=[1"
    )


def test_an_empty_part_of_a_key_is_refused(file: Path) -> None:
    assert "model.: unknown key" in refusal(file, "model..path=x")


# Files and recipes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"- a\n- b\n", "must hold `key: value` lines"),
        (b"", "must hold `key: value` lines"),
        (b"a: [1\n", "cannot read"),
        (b"\xff\xfe", "cannot read"),
        (b"1: x\n", "the config is not valid"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, content: bytes, fragment: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    message = refusal(path)
    assert fragment in message


def test_an_unknown_recipe_is_answered_with_the_nearest_and_all_names() -> None:
    with pytest.raises(ConfigError) as caught:
        find_recipe("quikstart")
    assert "no config file or recipe 'quikstart'" in str(caught.value)
    assert "did you mean quickstart?" in str(caught.value)
    assert all(name in str(caught.value) for name in recipes())


def test_a_file_that_is_missing_is_answered_like_a_recipe() -> None:
    with pytest.raises(ConfigError, match="did you mean quickstart"):
        find_recipe("elsewhere/quickstrt.yaml")


def test_a_file_wins_over_a_recipe_of_the_same_name(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.rename(file.parent / "quickstart")
    monkeypatch.chdir(file.parent)
    assert find_recipe("quickstart") == Path("quickstart")


RECIPES = sorted(Path(loading.__file__).resolve().parents[1].glob("configs/*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_found_by_name_and_valid(path: Path) -> None:
    assert recipes()[path.stem] == path
    assert isinstance(load(path.stem).config, RunConfig)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_begins_with_a_line_that_says_what_it_is_for(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ") and len(first) > 20


def test_there_are_recipes() -> None:
    assert "quickstart" in {path.stem for path in RECIPES}


def test_show_config_prints_every_value_with_its_source(coalesce: Command, file: Path) -> None:
    outcome = coalesce("show-config", file, "calibrate.shards=5")
    lines = {line.split()[0]: line for line in outcome.out.splitlines()}
    assert outcome.code == 0
    assert lines["calibrate.shards"].split() == [
        "calibrate.shards", "5", "#", "command", "line"
    ]  # fmt: skip
    assert lines["run_dir"].endswith(f"# {file}")
    assert lines["calibrate.batch_size"].endswith("# default")
    assert lines["refit.polish.steps"].split("#")[0].split()[1:] == ["150", "|", "1500"]
    assert lines["refit.joint_limit"].split()[1:] == ["8192", "#", "default"]
    waiting = {key for key in lines if key.startswith("refit.")} - {"refit.preset"}
    assert set(lines) - waiting == set(load(str(file)).sources)
