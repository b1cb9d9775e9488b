"""Do all nodes that run units see the same files? Asked of the nodes, before any unit runs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

import ray
import ray.exceptions as failures
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import InfrastructureError, NotShared

# A network file system may show a new file to other nodes late; NFS caches folders for seconds.
_PATIENCE_SECONDS = 30.0
_ANSWER_SECONDS = 120.0


def check_shared(run: Path, inputs: Sequence[Path]) -> None:
    """Writes a file into `run`, lets every node read it and write one back, and reads those.

    Nodes without CPUs take no units and are not asked. Of every input, each node must see what
    this process sees: a file of the same size, a folder with the same names in it (where a mount
    is missing there is often an empty folder).

    Raises:
        NotShared: with the nodes that do not see the run folder or an input.
        InfrastructureError: a node did not answer at all.
    """
    nodes = {
        node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU")
    }
    this = ray.get_runtime_context().get_node_id()
    if not set(nodes) - {this}:
        return
    with _marker(run) as (folder, word):
        answers = _ask(nodes, folder, word, inputs)
        blind = [nodes[node] for node in nodes if not _seen(folder / node, word)]
    if blind:
        raise NotShared(f"the run folder {run} is not the same on {_names(blind)}")
    for path in inputs:
        lacking = [nodes[node] for node, seen in answers.items() if seen[str(path)] is None]
        if lacking:
            raise NotShared(f"{path} does not exist on {_names(lacking)}")
        ours = look(path)
        other = [nodes[node] for node, seen in answers.items() if seen[str(path)] != ours]
        if other:
            raise NotShared(f"{path} has other contents on {_names(other)}")


def look(path: Path) -> str | None:
    """What lies at a path, in a few words that are the same wherever it is the same."""
    try:
        if path.is_dir():
            return _digest(sorted(entry.name for entry in path.iterdir()))
        return f"{path.stat().st_size} bytes"
    except OSError:
        return None


def _digest(names: Sequence[str]) -> str:
    """A digest, since a folder of text may hold very many files."""
    return sha256("\0".join(names).encode()).hexdigest()


@contextmanager
def _marker(run: Path) -> Iterator[tuple[Path, str]]:
    """A folder for this question alone, with a word in it that no earlier one can have left."""
    word = uuid4().hex
    folder = run / f".shared.{word}.tmp"
    folder.mkdir()
    (folder / "driver").write_text(word)
    try:
        yield folder, word
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _ask(
    nodes: dict[str, str], folder: Path, word: str, inputs: Sequence[Path]
) -> dict[str, dict[str, str | None]]:
    """Node -> input -> what the node sees there."""
    asked = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        task = ray.remote(_answer).options(num_cpus=0, scheduling_strategy=there)
        asked[node] = task.remote(folder / "driver", folder / node, word, [*map(str, inputs)])
    ready, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=_ANSWER_SECONDS)
    answers, silent = {}, []
    for node, reference in asked.items():
        try:
            answers[node] = ray.get(reference, timeout=0 if reference not in ready else None)
        except (failures.RayError, failures.GetTimeoutError):
            silent.append(nodes[node])
    if silent:
        raise InfrastructureError(
            f"no answer from {_names(silent)} within {_ANSWER_SECONDS:.0f} s;"
            " is the same version of coalesce installed there?"
        )
    return answers


def _answer(question: Path, reply: Path, word: str, inputs: Sequence[str]) -> dict[str, str | None]:
    """Runs on the node asked."""
    if _seen(question, word):
        reply.write_text(word)
    return {path: look(Path(path)) for path in inputs}


def _seen(path: Path, word: str) -> bool:
    """Whether a file with this word appears within the patience."""
    deadline = time.monotonic() + (_PATIENCE_SECONDS if path.parent.exists() else 5.0)
    while True:
        with suppress(OSError):
            if path.read_text() == word:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def _names(nodes: Sequence[str]) -> str:
    return ", ".join(sorted(nodes))
