"""The tiny run of the command-line tests, for tests on clusters."""

from tests.orchestrator.conftest import coalesce, inputs, pristine

__all__ = ["coalesce", "inputs", "pristine"]
