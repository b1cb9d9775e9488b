"""`python -m orchestrator` is `coalesce`."""

from orchestrator.cli import main

main()
