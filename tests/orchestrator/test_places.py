"""URLs in a config: where folders are needed, where they hold secrets, and where nothing is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.orchestrator.tiny_run import Command, Inputs, snapshot


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run_dir": "s3://bucket/run"}, "run_dir is a URL, it must be a folder"),
        ({"model__tokenizer": "s3://bucket/t"}, "model.tokenizer is a URL, it must be a folder"),
        ({"cache__dir": "file:///tmp/x"}, "cache.dir is a URL, it must be a folder"),
        ({"upload": {"url": "/folder"}}, "upload.url is no URL"),
        ({"cache__local_paths": True}, "local_paths=true needs a folder to copy to"),
        ({"model__path": "memory://m"}, "model.path is a memory:// URL"),
        ({"upload": {"url": "s3://a:planted@b/c"}}, "upload.url holds credentials"),
        (
            {"calibrate__data__sources": [{"path": "https://host/x.txt?token=planted"}]},
            "calibrate.data.sources.0.path holds credentials",
        ),
        ({"model__path": "xyz://bucket/model"}, "nothing here reads xyz://bucket/model"),
        ({"model__path": "gs://bucket/model"}, "gs:// URLs need a package that is missing"),
        ({"model__path": "file:///nowhere"}, "file:///nowhere is no checkpoint"),
        ({"calibrate__data__sources": [{"path": "file:///no.txt"}]}, "there is no text at file:"),
    ],
)
def test_one_clear_error_before_any_work(
    inputs: Inputs, coalesce: Command, changes: dict[str, Any], message: str
) -> None:
    recipe = inputs.recipe(**changes)
    before = snapshot(inputs.root)
    outcome = coalesce("run", recipe)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err and "planted" not in outcome.err
    assert snapshot(inputs.root) == before


def test_a_folder_of_something_else_gets_nothing_fetched_into_it(
    inputs: Inputs, coalesce: Command
) -> None:
    recipe = inputs.recipe(model__path=f"file://{inputs.model}")
    inputs.run_dir.mkdir()
    (inputs.run_dir / "thesis.txt").write_text("mine")
    outcome = coalesce("run", recipe)
    assert outcome.code == 2 and "holds no run: thesis.txt" in outcome.err
    assert [path.name for path in inputs.run_dir.iterdir()] == ["thesis.txt"]


def test_plan_says_what_a_cache_will_hold(inputs: Inputs, coalesce: Command) -> None:
    size = inputs.weights.stat().st_size
    recipe = inputs.recipe(cache={"dir": str(inputs.root / "cache"), "local_paths": True})
    outcome = coalesce("plan", recipe)
    assert outcome.code == 0, outcome.err
    # Without blanks: a long path is broken anywhere.
    wanted = f"{size / 1000:.1f} kB are fetched to {inputs.root / 'cache'}"
    assert "".join(wanted.split()) in "".join(outcome.out.split())
    assert not (inputs.root / "cache").exists()


def test_a_cache_on_a_disk_that_is_too_small_is_refused(
    inputs: Inputs, coalesce: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = inputs.root / "cache"

    def free(folder: Path) -> int:
        return 1000 if cache in (folder, *folder.parents) else 1 << 40

    monkeypatch.setattr("orchestrator.disk._free", free)
    recipe = inputs.recipe(cache={"dir": str(cache), "local_paths": True})
    outcome = coalesce("run", recipe)
    size = inputs.weights.stat().st_size
    assert outcome.code == 2
    assert f"lacks {size:,} bytes of the checkpoint, 1,000 are free" in outcome.err
