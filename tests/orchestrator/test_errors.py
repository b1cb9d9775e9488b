"""Errors: one tree, an exit code each, and a message that survives the way between processes."""

from __future__ import annotations

import pickle
import sys

import pytest

from cluster.errors import InfrastructureError
from models.errors import (
    CheckpointError,
    DiskFull,
    StorageError,
    StoreSilent,
    UnknownFamily,
    UnsupportedFeature,
    UserError,
)
from models.remote.urls import UrlError
from orchestrator import cli
from orchestrator.errors import ConfigError, RunFolderError, exit_code
from stages.errors import BudgetError, DataError, GateError, StaleUnit, StatisticsError
from tests.orchestrator.tiny_run import Command

KINDS: list[type[UserError]] = [
    BudgetError,
    CheckpointError,
    ConfigError,
    DataError,
    DiskFull,
    GateError,
    RunFolderError,
    StaleUnit,
    StatisticsError,
    StorageError,
    UnknownFamily,
    UnsupportedFeature,
    UrlError,
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_a_user_can_mend_ends_with_code_2(kind: type[UserError]) -> None:
    assert exit_code(kind("cause", "remedy")) == 2


def test_a_failing_cluster_ends_with_the_code_for_trying_again() -> None:
    assert exit_code(InfrastructureError("nodes are gone")) == 75
    assert exit_code(StoreSilent("no answer")) == 75


def test_a_bug_ends_with_code_1() -> None:
    assert exit_code(ZeroDivisionError()) == 1


def test_a_message_has_cause_and_remedy() -> None:
    assert str(UserError("too small", "make it larger")) == "too small\n  -> make it larger"


def test_a_message_without_remedy_is_its_cause() -> None:
    assert str(UserError("too small")) == "too small"


@pytest.mark.parametrize("kind", KINDS)
def test_errors_survive_pickling(kind: type[UserError]) -> None:
    copy = pickle.loads(pickle.dumps(kind("cause", "remedy")))
    assert type(copy) is kind
    assert (copy.cause, copy.remedy, str(copy)) == ("cause", "remedy", "cause\n  -> remedy")


@pytest.mark.parametrize(
    ("error", "code"), [(DiskFull("no space", "free some"), 2), (InfrastructureError("lost"), 75)]
)
def test_the_command_prints_one_message_and_no_stack_trace(
    coalesce: Command, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("orchestrator.load.load", fail)
    outcome = coalesce("show-config", "quickstart")
    assert outcome.code == code
    assert outcome.err == f"error: {error}\n"


def test_a_bug_keeps_its_stack_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("orchestrator.load.load", fail)
    monkeypatch.setattr(sys, "argv", ["coalesce", "show-config", "quickstart"])
    with pytest.raises(ZeroDivisionError):
        cli.main()
