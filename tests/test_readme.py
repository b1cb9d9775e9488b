"""Every command of the README is executed, in order, in a copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text()
# Its example reads what the README's commands made.
STATISTICS = (REPOSITORY / "docs" / "statistics.md").read_text()
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", README + STATISTICS, re.DOTALL | re.MULTILINE)
# These run this very test: that they exist and resolve is all that can be asked of them here.
RECURSIVE = ("make check", "make test")


def tracked_files() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in listed.stdout.splitlines() if (REPOSITORY / name).is_file()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's files with their times, so that make sees a finished installation."""
    folder = tmp_path_factory.mktemp("clone")
    for name in tracked_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)
    (Path(sys.prefix) / ".ready").touch()
    return folder


def run(clone: Path, kind: str, text: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("VENV", "MAKEFLAGS")}
    environment["PATH"] = f"{Path(sys.prefix) / 'bin'}:{environment['PATH']}"
    words = [sys.executable, "-c", text] if kind == "python" else ["bash", "-euc", text]
    return subprocess.run(
        words, cwd=clone, env=environment, capture_output=True, text=True, check=False
    )


def commands() -> list[tuple[str, str]]:
    """(kind, text): a Python block as a whole, shell lines one by one."""
    found = []
    for kind, block in BLOCKS:
        found += [(kind, block)] if kind == "python" else [(kind, c) for c in block.splitlines()]
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_works_in_order(clone: Path) -> None:
    for kind, text in commands():
        line = text.replace("make", "make -n", 1) if text in RECURSIVE else text
        done = run(clone, kind, line)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    assert (clone / "runs" / "demo" / "report" / "index.html").exists()
    assert (clone / "runs" / "small" / "output" / "config.json").exists()


def test_the_readme_is_short_and_opens_with_a_picture_that_exists() -> None:
    assert README.count("\n") <= 200
    first = README.index("![")
    assert first < README.index("## ")
    picture = re.search(r"!\[.*?\]\((.*?)\)", README)
    assert picture is not None and (REPOSITORY / picture[1]).stat().st_size > 10_000


@pytest.mark.parametrize(
    "page", sorted(REPOSITORY.glob("*.md")) + sorted(REPOSITORY.glob("docs/*.md"))
)
def test_links_between_pages_resolve(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
